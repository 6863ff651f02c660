"""What a device needs: its name, static shapes, and a number format that suits the autoencoder."""

from typing import Any

import openvino as ov

from ov_decidiffusion.model_folder.layout import TINY_DECODER

SEVERAL = ("AUTO", "MULTI", "HETERO")  # stand for the devices listed after them


def make_core() -> ov.Core:
    """An OpenVINO core whose threads on the CPU may run on any processor.

    By default OpenVINO ties them to processors, each process to the same ones: there they wait for other programs, and
    for each other, while other processors are idle.
    """
    core = ov.Core()
    if "CPU" in core.available_devices:
        core.set_property("CPU", {"ENABLE_CPU_PINNING": False})
    return core


def find_device(core: ov.Core, device: Any) -> str:
    """OpenVINO's name of a device: "cpu" and ``torch.device("cpu")`` are "CPU", "auto:gpu,cpu" is "AUTO:GPU,CPU".

    Raises:
        ValueError: there is no such device on this machine.
    """
    available = core.available_devices
    name = str(device).upper()  # str() of a torch.device is its name
    family, _, listed = name.partition(":")
    named = listed.split(",") if family in SEVERAL and listed else [] if name == "AUTO" else [name]
    whole = {one.split(".")[0] for one in available}
    known = all(one.removeprefix("-") in (*available, *whole, "CPU.0") for one in named)
    if not known or not devices_of(core, name):
        raise ValueError(f"`device` must be AUTO or one of {', '.join(available)} on this machine, got {device!r}.")
    return "CPU" if name == "CPU.0" else name


def devices_of(core: ov.Core, device: str) -> list[str]:
    """The devices that models may run on: the device itself, or those that AUTO, MULTI or HETERO choose from."""
    family, _, listed = device.partition(":")
    if family not in SEVERAL:
        return [device]
    named = [one for one in listed.split(",") if one]
    without = [one.removeprefix("-") for one in named if one.startswith("-")]
    left = [one for one in core.available_devices if not {one, one.split(".")[0]} & set(without)]
    return [one for one in named if not one.startswith("-")] or left


def needs_static_shapes(device: str) -> bool:
    """Whether the device compiles for one shape only, as NPUs do."""
    return device.split(".")[0] == "NPU"


def precision_hint(name: str, device: str, precision: str | None) -> dict[str, str]:
    """The precision for a model. Never f16 for the autoencoder: its activations overflow, and pictures turn black."""
    may_be_f16 = precision == "f16" or (precision is None and device.split(".")[0] != "NPU")
    if may_be_f16 and name in ("vae_encoder", "vae_decoder", TINY_DECODER):
        precision = "f32"
    return {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
