"""Checkpoint folder -> OpenVINO model folder, a component at a time.

The model folder has the layout that Optimum Intel and OpenVINO GenAI load as it is; whoever has it needs no
torch weights, no hub and no checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers.models.embeddings import Timesteps
from openvino.frontend.pytorch import ModuleExtension
from openvino_tokenizers import convert_tokenizer
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ov_decidiffusion.checkpoint import (
    CONVERSION_REPORT,
    DEFAULTS_1_0,
    DEFAULTS_2_0,
    DEFAULTS_FILE,
    checkpoint_files,
    find_checkpoint,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    read_json,
    weights_size,
)
from ov_decidiffusion.memory import release_freed_memory
from ov_decidiffusion.schedulers import make_scheduler, peer_scheduler_config

WEIGHT_FORMATS = ("fp16", "fp32")
MIN_PSNR = 40.0  # dB
SMALL_CHECKPOINT = 500e6  # bytes; up to this size a conversion is verified unless told otherwise
LARGE_PARAMETER = 100_000  # numbers


class ConversionError(RuntimeError):
    """A converted model does not agree with the PyTorch model that it came from."""


@dataclass(frozen=True)
class PartReport:
    """One converted component."""

    name: str
    megabytes: float
    seconds: float
    psnr: float | None  # dB against PyTorch, None where it was not verified


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion produced; ``str()`` gives it as a table."""

    model_dir: Path
    weight_format: str
    parts: tuple[PartReport, ...]
    converted: bool  # False: the folder had been there before

    def __str__(self) -> str:
        lines = [f"{'part':<13}{'size':>10}{'time':>9}{'agreement with PyTorch':>25}"]
        for part in self.parts:
            psnr = "not verified" if part.psnr is None else f"{part.psnr:.1f} dB"
            lines.append(f"{part.name:<13}{part.megabytes:>7.1f} MB{part.seconds:>7.1f} s{psnr:>25}")
        verb = "converted to" if self.converted else "found in"
        return "\n".join([*lines, f"{verb} {self.model_dir} ({self.weight_format} weights)"])


@dataclass(frozen=True)
class _Part:
    """How one component is loaded, traced and named."""

    load: Callable[[Path, torch.dtype], nn.Module]
    example: Callable[[dict[str, Any]], dict[str, torch.Tensor]]
    shapes: dict[str, list[int]]
    outputs: tuple[str, ...]
    traced_size: int | None = None  # ``sample_size`` to trace at: a small one shows the same graph


class _TextEncoder(nn.Module):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.model = load_text_encoder(folder, dtype)
        self.config = self.model.config

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(input_ids)
        return out.last_hidden_state, out.pooler_output


class _TimeProjection(nn.Module):
    """diffusers' sinusoidal time embedding, made to survive weights of 16 bits.

    The frequencies are multiplied by timesteps of up to a thousand and put through sine and cosine, so rounding
    them to 16 bits shows. Split into two numbers of 16 bits each, they keep their precision.
    """

    def __init__(self, time_proj: Timesteps):
        super().__init__()
        half = time_proj.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - time_proj.downscale_freq_shift)
        frequencies = torch.exp(-math.log(10000) * exponents)[None]
        self.register_buffer("coarse", frequencies.half().float())
        self.register_buffer("rest", frequencies - self.coarse)
        self.flip_sin_to_cos = time_proj.flip_sin_to_cos

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        timesteps = timesteps[:, None].float()
        angles = timesteps * self.coarse + timesteps * self.rest
        halves = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(halves[::-1] if self.flip_sin_to_cos else halves, dim=-1)


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.model = unet
        self.model.time_proj = _TimeProjection(self.model.time_proj)
        self.config = self.model.config

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _VAEEncoder(nn.Module):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        vae = load_vae(folder, dtype)
        self.encoder, self.quant_conv, self.config = vae.encoder, vae.quant_conv, vae.config

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(sample)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class _VAEDecoder(nn.Module):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        vae = load_vae(folder, dtype)
        self.decoder, self.post_quant_conv, self.config = vae.decoder, vae.post_quant_conv, vae.config

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


class _Upcast(nn.Module):
    """A weight of 16 bits, as float32 while it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("float32", torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.type_as(self.float32)


# Tracing holds on to every tensor it meets, so weights that were really cast would all be there in float32 at once.
# Instead the cast is noted down, and its result is one zero, repeated without memory.
_UPCAST_EXTENSION = ModuleExtension(
    _Upcast,
    "aten::type_as",
    convert=lambda module, target_op, weight: target_op(weight, module.float32),
    evaluate=lambda module, weight, float32: torch.zeros(()).expand(weight.shape),
)


def _compute_in_float32(module: nn.Module) -> None:
    """Let a module with 16-bit weights compute in float32 without ever holding all its weights in float32.

    The cast becomes a part of the traced graph: a constant of 16 bits and its decompression, which is how OpenVINO
    stores compressed weights. Small parameters are simply made float32.
    """
    for layer in list(module.modules()):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.numel() >= LARGE_PARAMETER and parameter.dtype == torch.float16:
                parametrize.register_parametrization(layer, name, _Upcast(), unsafe=True)
            else:
                parameter.data = parameter.data.float()


def _forget_traces() -> None:
    """Drop what torch.jit remembers of every module it traced: 0.3 GB for the U-Net, and nobody asks again."""
    with contextlib.suppress(AttributeError):  # torch has no public way; without it, it only costs memory
        torch._C._jit_clear_class_registry()
        torch.jit._state._clear_class_state()
        torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _example_text(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens = config["max_position_embeddings"]
    ids = torch.randint(0, config["vocab_size"], (2, tokens), generator=_generator())
    return {"input_ids": ids}


def _example_unet(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator, side = _generator(), min(config["sample_size"], 32)  # more costs memory and proves no more
    return {
        "sample": torch.randn((2, config["in_channels"], side, side), generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn((2, 77, config["cross_attention_dim"]), generator=generator),
    }


def _example_picture(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    # A quarter of the default picture proves as much and costs a fraction of the memory.
    side = config["sample_size"] // 2
    noise = torch.randn((1, config["in_channels"], side, side), generator=_generator())
    return {"sample": noise.clamp(-1, 1)}


def _example_latents(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    side = config["sample_size"] // 2 ** len(config["block_out_channels"])
    return {"latent_sample": torch.randn((1, config["latent_channels"], side, side), generator=_generator())}


PARTS = {
    "text_encoder": _Part(_TextEncoder, _example_text, {"input_ids": [-1, 77]}, ("last_hidden_state", "pooler_output")),
    "unet": _Part(
        lambda folder, dtype: _UNet(load_unet(folder, dtype)),
        _example_unet,
        {"sample": [-1, 4, -1, -1], "timestep": [-1], "encoder_hidden_states": [-1, 77, -1]},
        ("out_sample",),
        traced_size=16,
    ),
    "vae_encoder": _Part(_VAEEncoder, _example_picture, {"sample": [-1, 3, -1, -1]}, ("latent_parameters",), 128),
    "vae_decoder": _Part(_VAEDecoder, _example_latents, {"latent_sample": [-1, 4, -1, -1]}, ("sample",), 128),
}


def default_model_dir(checkpoint: str | Path, weight_format: str = "fp16") -> Path:
    """``models/<name>-<format>`` in the current folder, the name being the last part of the folder or hub id."""
    return Path("models") / f"{Path(checkpoint).name}-{weight_format}"


def convert_checkpoint(
    checkpoint: str | Path,
    model_dir: str | Path | None = None,
    weight_format: str = "fp16",
    verify: bool | None = None,
    revision: str | None = None,
) -> ConversionReport:
    """Convert a DeciDiffusion checkpoint to an OpenVINO model folder; does nothing where one is complete.

    Args:
        checkpoint: a folder or a hub id, as ``find_checkpoint`` takes it.
        model_dir: the folder to make; ``default_model_dir(checkpoint, weight_format)`` if None.
        weight_format: how weights are stored, "fp16" or "fp32".
        verify: run the same seeded input through PyTorch and through the converted model at f32, and fail below
            40 dB. None verifies small checkpoints only.
        revision: of a hub id.

    Returns:
        sizes in MB, seconds, and the agreement with PyTorch in dB: 20 log10(max|reference| / RMSE).

    Raises:
        ValueError: a wrong argument, an unknown scheduler, or ``model_dir`` holds something else.
        CheckpointError: as ``find_checkpoint``.
        ConversionError: a converted model disagrees with PyTorch.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"`weight_format` must be one of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}.")
    model_dir = default_model_dir(checkpoint, weight_format) if model_dir is None else Path(model_dir).expanduser()
    if model_dir.exists():
        return _existing_report(model_dir, checkpoint, revision, weight_format, verify)
    folder = find_checkpoint(checkpoint, revision)
    make_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))  # refused now, not after the work
    if verify is None:
        verify = weights_size(folder) <= SMALL_CHECKPOINT
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = model_dir.with_name(f".{model_dir.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        parts = _convert_parts(folder, partial, weight_format, verify)
        _write_settings(folder, partial)
        source = _source(checkpoint, revision) | {"fingerprint": _fingerprint(folder), "weight_format": weight_format}
        write_json(partial / CONVERSION_REPORT, source | {"parts": [asdict(part) for part in parts]})
        os.replace(partial, model_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ConversionReport(model_dir, weight_format, tuple(parts), converted=True)


def _existing_report(
    model_dir: Path, checkpoint: str | Path, revision: str | None, weight_format: str, verify: bool | None
) -> ConversionReport:
    """The report of a complete folder; anything else in the way is left alone and refused."""
    report_file = model_dir / CONVERSION_REPORT
    missing = [name for name in PARTS if not (model_dir / name / "openvino_model.bin").is_file()]
    if missing or not report_file.is_file():
        raise ValueError(
            f"`model_dir` {model_dir} exists and is no complete conversion of ours (it lacks "
            f"{', '.join(missing) or CONVERSION_REPORT}): delete it or choose another folder."
        )
    report = read_json(report_file)
    wanted = _source(checkpoint, revision) | {"weight_format": weight_format}
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        wanted["fingerprint"] = _fingerprint(folder)
    differing = [name for name, value in wanted.items() if report[name] != value]
    if differing:
        raise ValueError(
            f"`model_dir` {model_dir} holds {report['checkpoint']} (revision {report['revision']}, "
            f"{report['weight_format']} weights), and its {' and '.join(differing)} differs from what is asked for "
            f"({checkpoint}, revision {revision}, {weight_format}): delete it or choose another folder."
        )
    parts = tuple(PartReport(**part) for part in report["parts"])
    if verify and any(part.psnr is None for part in parts):
        parts = _verify_parts(parts, find_checkpoint(checkpoint, revision), model_dir)
        write_json(report_file, report | {"parts": [asdict(part) for part in parts]})
    return ConversionReport(model_dir, weight_format, parts, converted=False)


def _verify_parts(parts: tuple[PartReport, ...], folder: Path, model_dir: Path) -> tuple[PartReport, ...]:
    """Check a folder that was converted without a check."""
    verified = []
    for report in tqdm(parts, desc="verifying", unit="part"):
        part, file = PARTS[report.name], model_dir / report.name / "openvino_model.xml"
        reference, example = _run_torch(part, folder)
        verified.append(replace(report, psnr=_check_agreement(report.name, file, example, reference)))
    return tuple(verified)


def _source(checkpoint: str | Path, revision: str | None) -> dict[str, str | None]:
    """What a model folder was made of: a hub id with its revision, or the name of a folder, which may move."""
    folder = Path(checkpoint).expanduser()
    return {"checkpoint": folder.resolve().name if folder.is_dir() else str(checkpoint), "revision": revision}


def _fingerprint(folder: Path) -> str:
    """Tells trainings of one architecture apart: names, sizes and beginnings of all files of a checkpoint."""
    digest = hashlib.sha256()
    for file in checkpoint_files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()[:32]


def _convert_parts(folder: Path, target: Path, weight_format: str, verify: bool) -> list[PartReport]:
    reports = []
    with tqdm(total=len(PARTS) + 1, desc="converting", unit="part") as progress:
        for name, part in PARTS.items():
            progress.set_postfix_str(name)
            reports.append(_convert_part(name, part, folder, target / name, weight_format, verify))
            progress.update()
        progress.set_postfix_str("tokenizer")
        _convert_tokenizer(folder, target / "tokenizer")
        progress.update()
    return reports


def _convert_part(name: str, part: _Part, folder: Path, target: Path, weight_format: str, verify: bool) -> PartReport:
    """Trace one component and write it; PyTorch's copy is freed before the converted one is checked."""
    start = time.perf_counter()
    target.mkdir(parents=True)
    file = target / "openvino_model.xml"
    reference, example = None, None
    if verify:
        reference, example = _run_torch(part, folder)
        release_freed_memory()
    module, config = _load_part(part, folder, torch.float16 if weight_format == "fp16" else torch.float32)
    model = _trace(module, config, part)
    ov.save_model(model, file, compress_to_fp16=weight_format == "fp16")
    write_json(target / "config.json", _config_for_peers(name, config))
    del module, model
    release_freed_memory()
    psnr = None if reference is None else _check_agreement(name, file, example, reference)
    size = sum(path.stat().st_size for path in target.iterdir())
    return PartReport(name, size / 1e6, time.perf_counter() - start, psnr)


def convert_unet(unet: nn.Module, file: str | Path) -> None:
    """Convert a U-Net on its own, without the folder around it: U-Net-NAS or any other of diffusers' kind.

    Args:
        unet: takes latents, a timestep and hidden states; its weights may be float16. It is used up.
        file: the ``.xml`` to write; weights of 16 bits go beside it.
    """
    module = _UNet(unet.eval())
    _compute_in_float32(module)
    ov.save_model(_trace(module, dict(module.config), PARTS["unet"]), file)


def _trace(module: nn.Module, config: dict[str, Any], part: _Part) -> ov.Model:
    traced = part.example(config | {"sample_size": part.traced_size})
    inputs = [(key, ov.PartialShape(shape)) for key, shape in part.shapes.items()]
    with torch.no_grad(), _quiet_tracing():
        model = ov.convert_model(module, example_input=traced, input=inputs, extension=[_UPCAST_EXTENSION])
    _forget_traces()
    release_freed_memory()
    _name_ports(model, list(part.shapes), part.outputs)
    return model


def _load_part(part: _Part, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A component that computes in float32, its weights held in ``dtype``, and its settings."""
    with _quiet_tracing():
        module = part.load(folder, dtype).eval()
    if dtype != torch.float32:
        _compute_in_float32(module)
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return module, config


@torch.no_grad()
def _run_torch(part: _Part, folder: Path) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """What PyTorch at float32 makes of a component's example, and that example."""
    module, config = _load_part(part, folder, torch.float32)
    example = part.example(config)
    out = module(**example)
    return [value.numpy() for value in (out if isinstance(out, tuple) else (out,))], example


def _check_agreement(name: str, file: Path, example: dict[str, torch.Tensor], reference: list[np.ndarray]) -> float:
    agreement = _measure_agreement(file, example, reference)
    if agreement < MIN_PSNR:
        raise ConversionError(
            f"The converted {name} agrees with PyTorch to {agreement:.1f} dB only; at least {MIN_PSNR:.0f} dB are "
            "needed. The conversion is not to be used."
        )
    return agreement


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Hide what tracing provokes and no reader can act on: it touches every attribute, also deprecated ones, and
    warns of shape checks that diffusers makes only to refuse wrong shapes."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _name_ports(model: ov.Model, inputs: list[str], outputs: tuple[str, ...]) -> None:
    """Give every port exactly one name: the one that other tools look for."""
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()


def _measure_agreement(file: Path, example: dict[str, torch.Tensor], reference: list[np.ndarray]) -> float:
    """The lowest PSNR in dB over a model's outputs, run on the CPU at f32."""
    compiled = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled({key: value.numpy() for key, value in example.items()})
    return min(psnr(results[i], expected) for i, expected in enumerate(reference))


def psnr(value: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: 20 log10(max|reference| / RMSE).

    Infinite where both are equal, and minus infinity where one holds what is no number.
    """
    error = math.sqrt(np.mean(np.square(value.astype(np.float64) - reference)))
    if not math.isfinite(error):
        return -math.inf
    return 20 * math.log10(float(np.abs(reference).max()) / error) if error > 0 else math.inf


def _config_for_peers(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings beside a converted model, under the class names that other tools know."""
    if name == "unet":
        config = config | {"_class_name": "UNet2DConditionModel", "time_cond_proj_dim": None}
    elif name.startswith("vae"):
        config = config | {"_class_name": "AutoencoderKL"}
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def _convert_tokenizer(folder: Path, target: Path) -> None:
    shutil.copytree(folder / "tokenizer", target)
    ov.save_model(convert_tokenizer(load_tokenizer(folder)), target / "openvino_tokenizer.xml")


def _write_settings(folder: Path, target: Path) -> None:
    """The scheduler, the pipeline's defaults, and the index that other tools start from."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    for_peers = peer_scheduler_config(scheduler)
    write_json(target / "scheduler" / "scheduler_config.json", for_peers)
    if for_peers is not scheduler:
        write_json(target / "ov_scheduler" / "scheduler_config.json", scheduler)
    defaults = DEFAULTS_2_0 if scheduler["_class_name"] == "SqueezedDPMSolverMultistepScheduler" else DEFAULTS_1_0
    if (folder / DEFAULTS_FILE).is_file():
        defaults = defaults | read_json(folder / DEFAULTS_FILE)
    write_json(target / DEFAULTS_FILE, defaults)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", for_peers["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(target / "model_index.json", index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)
