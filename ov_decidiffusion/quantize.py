"""OpenVINO model folder -> a folder of quantized models beside it: ``python -m ov_decidiffusion quantize FOLDER``.

The models are calibrated on the inputs that the pipeline really gives them: the U-Net's inputs along whole denoising
runs of the checkpoint's own prompts, and the latents at their end. Each part has a budget in decibels: on runs left out
of the calibration, its output must agree this closely with the plain model's. A part that misses its budget is kept
unquantized.
"""

import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import torch

from ov_decidiffusion.arguments import check_path, check_whole
from ov_decidiffusion.calibration import (
    Feed,
    Inputs,
    Recorded,
    Run,
    agreement_with_plain,
    bars_for_terminals_only,
    plain_run,
    quantize_within_budget,
)
from ov_decidiffusion.conversion.reports import read_parts
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.generation.guidance import rescaled
from ov_decidiffusion.model_folder.integrity import check_model_dir, describe_files, leads_out, read_json
from ov_decidiffusion.model_folder.layout import (
    CONVERSION_REPORT,
    MAX_TOKENS,
    PARTS,
    QUANTIZABLE,
    QUANTIZATION_FORMAT,
    QUANTIZATION_REPORT,
    QUANTIZED_KINDS,
    config_file,
    graph_file,
    quantized_sibling,
    weights_file,
)
from ov_decidiffusion.model_folder.writing import (
    building,
    check_disk,
    copy_folder,
    is_free,
    naming_a_full_disk,
    only_one,
    refuse_own_folder,
    write_json,
)
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.progress import progress_bar
from ov_decidiffusion.runtime.memory import check_memory
from ov_decidiffusion.runtime.transformations import merge_upsampling
from ov_decidiffusion.schedulers.registry import make_solver

logger = logging.getLogger(__name__)

BUDGETS = {"unet": 30.0, "vae_decoder": 35.0}  # dB
WEIGHT_MODES = {
    "int8-weights": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
    "int4-weights": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32},  # 32 divides every width
}
MODES = QUANTIZED_KINDS
CALIBRATION_PROMPTS = 8  # number of the checkpoint's calibration prompts to run by default
STEPS = 4  # of a calibration run
RECORDED = 2  # one step in so many is recorded for ranking layers; which ones alternates every HELD_OUT prompts
HELD_OUT = 4  # one in so many prompts is for checking only
MEMORY = (1.5e9, 2.2)  # bytes needed, and a factor for the U-Net's weights in 16 bits: 5 GB at full size
CROP = 32  # side in latent positions of the crops that calibrate the decoder, to save memory


@dataclass(frozen=True)
class QuantizedPart:
    """One part of a quantized folder."""

    name: str
    quantized: bool  # False: it missed its budget and is a copy of the plain model
    megabytes: float
    plain_megabytes: float
    seconds: float  # time of quantizing it
    psnr: float  # dB against the plain model, on runs left out of the calibration


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization produced; ``str()`` formats it as a table."""

    model_dir: Path
    mode: str
    parts: tuple[QuantizedPart, ...]

    def __str__(self) -> str:
        lines = [f"{'part':<13}{'size':>22}{'time':>9}{'agreement with plain model':>28}"]
        for part in self.parts:
            size = f"{part.plain_megabytes:.1f} -> {part.megabytes:.1f} MB"
            note = "" if part.quantized else "  (too low: kept as it was)"
            lines.append(f"{part.name:<13}{size:>22}{part.seconds:>7.0f} s{part.psnr:>25.1f} dB{note}")
        return "\n".join([*lines, f"{self.mode} models are in {self.model_dir}"])


def quantize_models(model_dir: str | Path, mode: str = "int8", prompts: int | None = None) -> QuantizationReport:
    """Quantize the U-Net and the VAE decoder of a model folder; does nothing if they are, whatever the other arguments.

    The new folder has the same layout and is complete: this project's pipeline, Optimum Intel and OpenVINO GenAI can
    load it. A pipeline of ``model_dir`` finds "int8" models automatically, and uses them on request.

    Args:
        model_dir: a folder that ``convert_checkpoint`` made.
        mode: "int8" computes in 8 bits, which is fast. "int8-weights" and "int4-weights" only store the U-Net's and
            the text encoder's weights in 8 or 4 bits, which saves memory.
        prompts: how many of the checkpoint's calibration prompts to run, at least 2; None for the first 8.

    Returns:
        for each part the sizes in MB, the seconds, and the agreement with the plain model in dB:
        20 log10(max|plain| / RMSE).

    Raises:
        ValueError: an argument is wrong, the new folder's place is taken by something else, or too little memory is
            free.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if prompts is not None:
        check_whole("prompts", prompts, 2)
    model_dir = check_path("model_dir", model_dir)
    if (model_dir / QUANTIZATION_REPORT).is_file():
        raise ValueError(f"`model_dir` {model_dir} holds quantized models; give the folder that they were made from.")
    check_model_dir(model_dir)
    target = quantized_sibling(model_dir, mode)
    with only_one(target):
        found = None if is_free(target) else existing_quantization(target, model_dir)
        return found or _quantize(model_dir, target, mode, prompts)


def _quantize(model_dir: Path, target: Path, mode: str, prompts: int | None) -> QuantizationReport:
    if mode == "int8":
        instead = "make them on another machine and copy the folder, or use the mode 'int8-weights', which needs less"
        check_memory(_needed_memory(model_dir), "INT8 models", instead)
    refuse_own_folder(target)
    _refuse_links(model_dir)
    names = QUANTIZABLE if mode == "int8" else ("unet", "text_encoder")
    size = sum(weights_file(model_dir, part).stat().st_size // (4 if part in names else 1) for part in PARTS)
    check_disk(target.parent, size, "The folder of quantized models")  # its smallest size
    with building(target) as partial:
        copy_folder(model_dir, partial, leave_out=names)
        runs = CalibrationRuns.of(model_dir, prompts or CALIBRATION_PROMPTS)
        bar = progress_bar(names, desc=f"quantizing ({mode})", unit="part")
        parts = [_quantize_part(name, model_dir, partial, mode, getattr(runs, name)) for name in bar]
        report = QuantizationReport(target, mode, tuple(parts))
        content = {"format": QUANTIZATION_FORMAT, "mode": mode, "nncf": nncf.__version__}
        content |= {"files": describe_files(partial), "parts": [asdict(part) for part in parts]}
        write_json(partial / QUANTIZATION_REPORT, content)
    return report


def _refuse_links(folder: Path) -> None:
    """Refuse links that would make a copy of the folder include files from outside.

    Raises:
        ModelDirError: the message names the link.
    """
    for file in folder.rglob("*"):
        if leads_out(file, folder) or (file.is_symlink() and file.is_dir()):
            raise ModelDirError(f"{file} is a link, to {file.resolve()}: replace it by the file or folder itself.")


def _needed_memory(model_dir: Path) -> int:
    report, size = model_dir / CONVERSION_REPORT, weights_file(model_dir, "unet").stat().st_size
    if report.is_file() and read_json(report).get("weight_format") == "fp32":
        size //= 2
    return int(MEMORY[0] + MEMORY[1] * size)


def existing_quantization(target: Path, model_dir: Path) -> QuantizationReport | None:
    """The report of a complete folder, or None for one of an older format; anything else is refused and left alone."""
    if not (target / QUANTIZATION_REPORT).is_file():
        raise ValueError(f"{target} exists and holds no quantized models of ours: delete or move it.")
    content, copied = read_json(target / QUANTIZATION_REPORT), read_json(target / CONVERSION_REPORT)
    if content.get("format") != QUANTIZATION_FORMAT:
        logger.warning("%s is of an older format: quantizing it again.", target)
        return None
    if copied.get("fingerprint") != read_json(model_dir / CONVERSION_REPORT).get("fingerprint"):
        raise ValueError(f"{target} was made from another checkpoint than {model_dir}: delete or move it.")
    check_model_dir(target)
    return QuantizationReport(target, content.get("mode", "?"), read_parts(target, content, QuantizedPart))


class CalibrationRuns:
    """Guided runs of the checkpoint's own prompts, in which each part gets the inputs that the pipeline would give it.

    One in ``HELD_OUT`` prompts is for checking only. The U-Net has to run before the decoder, which takes its latents.

    Args:
        pipe: the model folder's pipeline; it is not needed afterwards.
        prompts: the prompts to run.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, prompts: list[str]):
        self._texts = [pipe.encode_text(["", prompt])[:, :MAX_TOKENS] for prompt in prompts]  # the U-Net's 77 states
        self._ids = [pipe.token_ids([prompt]) for prompt in prompts]
        self._scheduler = make_solver("dpm++", pipe.scheduler)
        self._scale, self._rescale = (pipe.defaults[f"guidance_{name}"] for name in ("scale", "rescale"))
        self._scaling = pipe.vae_scaling_factor
        side = pipe.default_size[0] // pipe.vae_scale_factor
        self._shape = 1, pipe.latent_channels, side, side
        self._latents: list[torch.Tensor] = []

    @classmethod
    def of(cls, model_dir: Path, prompts: int) -> "CalibrationRuns":
        """The runs of a model folder's first calibration prompts."""
        pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
        runs = cls(pipe, pipe.defaults["calibration_prompts"][:prompts])
        pipe.close()
        return runs

    @torch.no_grad()
    def unet(self, run: Run) -> Recorded:
        """Denoise, a row at a time; record all steps of prompts for checking, and every ``RECORDED``-th of others."""
        recorded, scheduler = Recorded(), self._scheduler
        for i, texts in enumerate(progress_bar(self._texts, desc="running the U-Net", unit="prompt", leave=False)):
            checked = _is_held_out(i)
            latents = torch.randn(self._shape, generator=torch.Generator().manual_seed(i))
            scheduler.set_timesteps(STEPS)
            for number, timestep in enumerate(scheduler.timesteps):
                sample, predictions = scheduler.scale_model_input(latents, timestep).numpy(), []
                for text in texts:
                    inputs = {"sample": sample, "timestep": timestep.reshape(1).long().numpy()}
                    inputs["encoder_hidden_states"] = text[None].numpy()
                    predictions.append(torch.from_numpy(run(inputs, not checked)))
                    if checked or (i // HELD_OUT + number) % RECORDED == 0:
                        _keep(recorded, inputs, predictions[-1].numpy(), checked)
                without, conditional = predictions
                guided = rescaled(without + self._scale * (conditional - without), conditional, self._rescale)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            self._latents.append(latents / self._scaling)
        return recorded

    def vae_decoder(self, run: Run) -> Recorded:
        """Decode the latents at the end of the U-Net's runs."""
        crops = [[{"latent_sample": crop} for crop in _crops(latents.numpy())] for latents in self._latents]
        return _run_all(crops, run)

    def text_encoder(self, run: Run) -> Recorded:
        """Encode the prompts."""
        return _run_all([[{"input_ids": ids}] for ids in self._ids], run)


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT == 1


def _run_all(rows_of_prompts: list[list[Inputs]], run: Run) -> Recorded:
    recorded = Recorded()
    for i, rows in enumerate(rows_of_prompts):
        for inputs in rows:
            _keep(recorded, inputs, run(inputs, not _is_held_out(i)), _is_held_out(i))
    return recorded


def _keep(recorded: Recorded, inputs: Inputs, output: np.ndarray, checked: bool) -> None:
    if checked:
        recorded.checks.append(inputs)
        recorded.expected.append(output)
    else:
        recorded.rows.append(inputs)


def _crops(latents: np.ndarray) -> list[np.ndarray]:
    """The latents themselves if they are small, else crops of their corners."""
    height, width = latents.shape[-2:]
    if max(height, width) <= CROP:
        return [latents]
    corners = [(top, left) for top in (0, height - CROP) for left in (0, width - CROP)]
    return [latents[..., top : top + CROP, left : left + CROP].copy() for top, left in corners]


def _quantize_part(name: str, source: Path, target: Path, mode: str, feed: Feed) -> QuantizedPart:
    """Write one quantized part, or a copy of the plain one if the two disagree too much."""
    start, weights = time.perf_counter(), weights_file(source, name)
    model = ov.Core().read_model(graph_file(source, name))
    if mode == "int8":
        merge_upsampling(model, to_skips="crop")  # not possible with INT8 weights
        model, agreement = quantize_within_budget(model, weights, feed, BUDGETS[name])
    else:
        recorded = feed(plain_run(model, weights))
        with bars_for_terminals_only():
            model = nncf.compress_weights(model, **WEIGHT_MODES[mode])
        agreement = agreement_with_plain(model, weights, recorded)
    good_enough = mode != "int8" or (agreement >= BUDGETS[name] and _computes_in_int8(model))
    if good_enough:
        (target / name).mkdir()
        with naming_a_full_disk(target):
            ov.save_model(model, graph_file(target, name), compress_to_fp16=True)
        shutil.copyfile(config_file(source, name), config_file(target, name))
    else:
        copy_folder(source / name, target / name)
    size, plain_size = (weights_file(folder, name).stat().st_size / 1e6 for folder in (target, source))
    return QuantizedPart(name, good_enough, size, plain_size, time.perf_counter() - start, agreement)


def _computes_in_int8(model: ov.Model) -> bool:
    """Whether any layer is still in INT8, after some were restored to full precision."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
