"""What the trainings have in common: precision, learning rates, and state that survives an interruption."""

import math
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision: ``bf16`` computes layers in bfloat16 on float32 weights, ``f32`` changes nothing."""
    if precision not in ("f32", "bf16"):
        raise ValueError(f"`precision` must be 'f32' or 'bf16', got {precision!r}.")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fastest_precision(device: torch.device) -> str:
    """The faster precision for one convolution, measured: bfloat16 is faster on some processors, slower on others."""
    x = torch.randn(32, 64, 32, 32, device=device, requires_grad=True)
    conv = nn.Conv2d(64, 64, 3, padding=1).to(device)
    seconds = {}
    for precision in ("f32", "bf16"):
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            with autocast(device, precision):
                y = conv(x)
            y.float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        seconds[precision] = best
    return min(seconds, key=seconds.get)


def falling_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor in 0…1: a short linear rise, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def held_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor in 0…1: a short linear rise, then 1, and a linear fall to zero over the last fifth.

    Before that fifth nothing depends on the number of steps, so that a running training can be made longer or shorter.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps // 5))


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one step; with it, a resumed run draws the same numbers as an uninterrupted one, on the
    same kind of device."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def fingerprint(tensors: Iterable[torch.Tensor]) -> list[float]:
    """Two numbers by which sets of tensors can be told apart."""
    flat = torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])
    return [flat.sum().item(), flat.square().sum().item()]


def optimizer_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step down the gradient of ``loss``, whose norm is clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def write_file(path: Path, content: dict) -> None:
    """Write a temporary file beside ``path`` and move it there, so that a killed run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def read_file(path: Path, key: list) -> dict | None:
    """The content that ``write_file`` wrote, if the file exists and has the same ``key``; otherwise None."""
    if not path.exists():
        return None
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content if content["key"] == key else None


def save_state(path: Path, key: list, step: int, **parts) -> None:
    """Write the state of a training after ``step`` steps; each of ``parts`` has a ``state_dict``."""
    write_file(path, {"key": key, "step": step} | {name: part.state_dict() for name, part in parts.items()})


def resume(path: Path, key: list, **parts) -> int:
    """Load the state that an interrupted run with the same ``key`` left; returns the step to resume from.

    Optimizers load their state to the device of their parameters, so move the model to its device first.
    """
    state = read_file(path, key)
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]
