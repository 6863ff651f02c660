"""The work of a U-Net, the machine's rate of multiplication, and Stable Diffusion 1.5's U-Net for comparison."""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from diffusers.models.attention_processor import AttnProcessor
from openvino import opset13 as ops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.make_checkpoint import random_value, unet_of
from ov_decidiffusion.conversion.trace import convert_unet

MATRIX = 4096  # rows and columns of the matrices whose product measures the machine's rate


def gigaflops(unet: nn.Module, side: int = 512, batch: int = 2) -> float:
    """Floating-point operations, in 1e9, of one run of a U-Net; counted on torch's meta device.

    PyTorch's counter leaves out fused attention on CPUs; with attention as plain products it counts everything.
    """
    unet.set_attn_processor(AttnProcessor())
    latents = torch.empty((batch, 4, side // 8, side // 8), device="meta")
    text = torch.empty((batch, 77, unet.config["cross_attention_dim"]), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, torch.empty((batch,), device="meta"), text)
    return counter.get_total_flops() / 1e9


def machine_rate(precision: str, threads: int) -> float:
    """GFLOP/s of a product of two large matrices, with PyTorch or OpenVINO, whichever is faster."""
    return max(_torch_rate(precision, threads), _openvino_rate(precision))


def _torch_rate(precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return _rate(lambda: torch.mm(a, b))


def _openvino_rate(precision: str) -> float:
    weights = np.random.default_rng(0).standard_normal((MATRIX, MATRIX)).astype(np.float32)
    sample = ops.parameter([MATRIX, MATRIX], np.float32)
    model = ov.Model([ops.matmul(sample, ops.constant(weights), False, True)], [sample])
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
    return _rate(lambda: request.infer([weights], share_inputs=True))


def _rate(multiply) -> float:
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / 1e9 / min(seconds)


def time_unet(options: dict) -> dict:
    """Seconds of each of three runs of a converted U-Net, and the machine's own rate right after."""
    model = ov.Core().compile_model(options["xml"], "CPU", {"INFERENCE_PRECISION_HINT": options["precision"]})
    rng, side = np.random.default_rng(0), options["side"] // 8
    batch = 2 * options["pictures"]
    inputs = {
        "sample": rng.standard_normal((batch, 4, side, side)).astype(np.float32),
        "timestep": np.array([500]),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 768)).astype(np.float32),
    }
    model(inputs)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(inputs)
        seconds.append(time.perf_counter() - start)
    threads = model.get_property("INFERENCE_NUM_THREADS")
    rate = machine_rate(options["precision"], threads)
    return {
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "machine_gflops": rate,
        "threads": threads,
        "share": options["gigaflop"] / statistics.median(seconds) / rate,
    }


def convert_sd15(file: Path) -> None:
    """Stable Diffusion 1.5's U-Net with random weights, converted to an OpenVINO model."""
    unet = unet_of("sd15")
    weights = {name: random_value(name, value.shape).half() for name, value in unet.named_parameters()}
    unet.load_state_dict(weights, strict=False, assign=True)
    partial = file.with_name(f"partial-{file.name}")
    convert_unet(unet, partial)
    os.replace(partial.with_suffix(".bin"), file.with_suffix(".bin"))
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sd15",))
    parser.add_argument("file", type=Path, help="the .xml to write")
    convert_sd15(parser.parse_args().file)


if __name__ == "__main__":
    main()
