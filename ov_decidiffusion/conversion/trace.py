"""Torch module -> OpenVINO model, and how closely the two agree. All code that uses torch's internals is here."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers.models.embeddings import Timesteps
from openvino.frontend.pytorch import ModuleExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import logging as transformers_logging

from ov_decidiffusion.conversion.torch_modules import load_text_encoder, load_tiny_decoder, load_unet, load_vae
from ov_decidiffusion.model_folder.layout import TINY_DECODER
from ov_decidiffusion.runtime.devices import make_core
from ov_decidiffusion.runtime.memory import release_freed_memory

LARGE_PARAMETER = 100_000  # elements


class _Component(nn.Module):
    """A part of a checkpoint as a module that can be traced, with its settings."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = None


@dataclass(frozen=True)
class TracedPart:
    """How one component is loaded, traced and named."""

    load: Callable[[Path, torch.dtype], _Component]
    example: Callable[[dict[str, Any]], dict[str, torch.Tensor]]
    shapes: dict[str, list[int]]
    outputs: tuple[str, ...]
    traced_size: int | None = None  # ``sample_size`` to trace at: a small one gives the same graph


class _TextEncoder(_Component):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.model = load_text_encoder(folder, dtype)
        self.config = self.model.config

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(input_ids)
        return out.last_hidden_state, out.pooler_output


class _TimeProjection(nn.Module):
    """diffusers' sinusoidal time embedding, in a form that keeps its precision with 16-bit weights.

    The frequencies are multiplied by timesteps of up to a thousand and put through sine and cosine, so rounding
    them to 16 bits shows. Split into two 16-bit numbers each, they keep their precision.
    """

    coarse: torch.Tensor
    rest: torch.Tensor

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


class _UNet(_Component):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.model = unet
        assert isinstance(unet.time_proj, Timesteps)  # the class that all Stable Diffusion models use
        self.model.time_proj = _TimeProjection(unet.time_proj)
        self.config = self.model.config

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _VAEEncoder(_Component):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        vae = load_vae(folder, dtype)
        self.encoder, self.quant_conv, self.config = vae.encoder, vae.quant_conv, vae.config

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(sample)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class _VAEDecoder(_Component):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        vae = load_vae(folder, dtype)
        self.decoder, self.post_quant_conv, self.config = vae.decoder, vae.post_quant_conv, vae.config

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


class _TinyDecoder(_Component):
    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        vae = load_tiny_decoder(folder, dtype)
        self.decoder, self.config = vae.decoder, vae.config

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.decoder(latent_sample)


class _Upcast(nn.Module):
    """Casts a 16-bit weight to float32 whenever it is used."""

    float32: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("float32", torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.type_as(self.float32)


# Tracing keeps every tensor that it meets, so if weights were really cast, all would be in memory in float32 at once.
# Instead only the cast is recorded, and its result is a single zero, expanded without taking memory.
_UPCAST_EXTENSION = ModuleExtension(
    _Upcast,
    "aten::type_as",
    convert=lambda module, target_op, weight: target_op(weight, module.float32),
    evaluate=lambda module, weight, float32: torch.zeros(()).expand(weight.shape),
)


def _compute_in_float32(module: nn.Module) -> None:
    """Let a module with 16-bit weights compute in float32 without ever holding all its weights in float32.

    The cast becomes part of the traced graph: a 16-bit constant and its decompression, which is how OpenVINO stores
    compressed weights. Small parameters are simply converted to float32.
    """
    for layer in list(module.modules()):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.numel() >= LARGE_PARAMETER and parameter.dtype == torch.float16:
                parametrize.register_parametrization(layer, name, _Upcast(), unsafe=True)
            else:
                parameter.data = parameter.data.float()


def _remembered_by_torch() -> bool:
    """Whether torch.jit remembers anything that this process has scripted or traced."""
    with contextlib.suppress(AttributeError):  # private attributes of torch, which its stubs leave out
        types = torch.jit._recursive.concrete_type_store.type_store  # pyright: ignore[reportAttributeAccessIssue]
        return bool(torch.jit._state._script_classes or types)  # pyright: ignore[reportAttributeAccessIssue]
    return True


def _forget_traces() -> None:
    """Free what torch.jit remembers of every traced module: 0.3 GB for the U-Net, which is never used again."""
    with contextlib.suppress(AttributeError):  # torch has no public way; if this one goes, it only costs memory
        torch._C._jit_clear_class_registry()
        torch.jit._state._clear_class_state()  # pyright: ignore[reportAttributeAccessIssue]
        inner = torch.jit._recursive  # pyright: ignore[reportAttributeAccessIssue]
        inner.concrete_type_store = inner.ConcreteTypeStore()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _example_text(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens = config["max_position_embeddings"]
    ids = torch.randint(0, config["vocab_size"], (2, tokens), generator=_generator())
    return {"input_ids": ids}


def _example_unet(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator, side = _generator(), min(config["sample_size"], 32)  # a larger one costs memory and proves no more
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


def _example_tiny_latents(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"latent_sample": torch.randn((1, config["latent_channels"], 16, 16), generator=_generator())}


TRACED = {
    "text_encoder": TracedPart(
        _TextEncoder, _example_text, {"input_ids": [-1, 77]}, ("last_hidden_state", "pooler_output")
    ),
    "unet": TracedPart(
        lambda folder, dtype: _UNet(load_unet(folder, dtype)),
        _example_unet,
        {"sample": [-1, 4, -1, -1], "timestep": [-1], "encoder_hidden_states": [-1, 77, -1]},
        ("out_sample",),
        traced_size=17,  # odd, so that diffusers' forward passes each upsampler the size of its skip
    ),
    "vae_encoder": TracedPart(_VAEEncoder, _example_picture, {"sample": [-1, 3, -1, -1]}, ("latent_parameters",), 128),
    "vae_decoder": TracedPart(_VAEDecoder, _example_latents, {"latent_sample": [-1, 4, -1, -1]}, ("sample",), 128),
    TINY_DECODER: TracedPart(_TinyDecoder, _example_tiny_latents, {"latent_sample": [-1, 4, -1, -1]}, ("sample",)),
}


def trace(module: nn.Module, config: dict[str, Any], part: TracedPart) -> ov.Model:
    traced = part.example(config | {"sample_size": part.traced_size})
    inputs = [(key, ov.PartialShape(shape)) for key, shape in part.shapes.items()]
    others = _remembered_by_torch()  # what the caller has scripted must stay
    with torch.no_grad(), _quiet_tracing():
        # No second trace to compare with the first: the whole model's output is compared instead.
        decoder = TorchScriptPythonDecoder(
            module,
            example_input=traced,
            module_extensions={_Upcast: _UPCAST_EXTENSION},
            trace_kwargs={"check_trace": False},
        )
        model = ov.convert_model(decoder, input=inputs)
        del decoder
    if not others:
        _forget_traces()
    release_freed_memory()
    _name_ports(model, list(part.shapes), part.outputs)
    return model


def load_part(part: TracedPart, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A part that computes in float32 with its weights stored in ``dtype``, and its settings."""
    with _quiet_tracing():
        module = part.load(folder, dtype).eval()
    if dtype != torch.float32:
        _compute_in_float32(module)
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return module, config


@torch.no_grad()
def run_torch(part: TracedPart, folder: Path) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """PyTorch's float32 outputs for a part's example input, and that input."""
    module, config = load_part(part, folder, torch.float32)
    example = part.example(config)
    out = module(**example)
    return [value.numpy() for value in (out if isinstance(out, tuple) else (out,))], example


def convert_unet(unet: nn.Module, file: str | Path) -> None:
    """Convert a U-Net alone, without a model folder around it: U-Net-NAS or one of diffusers'.

    Args:
        unet: a module that takes latents, a timestep and hidden states; its weights may be float16. It is changed,
            and cannot be used afterwards.
        file: the ``.xml`` file to write; the 16-bit weights go beside it.
    """
    module = _UNet(unet.eval())
    _compute_in_float32(module)
    ov.save_model(trace(module, dict(module.config), TRACED["unet"]), file)


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Hide warnings of tracing that no reader can act on: it touches every attribute, even deprecated ones, and warns
    of shape checks that diffusers makes only to refuse wrong shapes."""
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
    """Give every input and output exactly one name: the one that other tools look for."""
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()


def measure_agreement(file: Path, example: dict[str, torch.Tensor], reference: list[np.ndarray]) -> float:
    """The lowest PSNR in dB of a model's outputs, which are computed on the CPU at f32."""
    compiled = make_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled({key: value.numpy() for key, value in example.items()})
    return min(psnr(results[i], expected) for i, expected in enumerate(reference))


def psnr(value: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: 20 log10(max|reference| / RMSE).

    Infinity if both are equal, and minus infinity if one has NaN or infinity, or if only the reference is all zeros.
    """
    error = math.sqrt(np.mean(np.square(value.astype(np.float64) - reference)))
    peak = float(np.abs(reference).max())
    if not math.isfinite(error) or (error > 0 and peak == 0):
        return -math.inf
    return 20 * math.log10(peak / error) if error > 0 else math.inf
