"""Checks whether a checkpoint works on this machine, from its files to its pictures, and writes a report to share."""

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil
import torch
from PIL import Image
from safetensors import safe_open

from ov_decidiffusion import __version__
from ov_decidiffusion.analysis.pictures import picture_grid
from ov_decidiffusion.arguments import check_path
from ov_decidiffusion.conversion.checkpoint import weights_files, weights_size
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.conversion.reports import ConversionReport, fingerprint_of, source_files, source_of
from ov_decidiffusion.conversion.torch_modules import load_text_encoder, load_tokenizer, load_unet, load_vae
from ov_decidiffusion.conversion.unet_nas import V1_UNET_CONFIG
from ov_decidiffusion.errors import DeciDiffusionError, NotEnoughMemory
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.model_folder.configs import read_scheduler
from ov_decidiffusion.model_folder.defaults import read_defaults
from ov_decidiffusion.model_folder.integrity import read_json, verify_model_dir
from ov_decidiffusion.model_folder.writing import write_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import quantize_models
from ov_decidiffusion.runtime.memory import peak_memory, release_freed_memory
from ov_decidiffusion.schedulers.registry import make_scheduler

STEPS = 2  # number of steps for the picture that is compared with diffusers'
MOST_DIFFERENCE = 2  # of 255, in any pixel
CALIBRATION_PROMPTS = 4
REAL_DOWNLOAD = 2.1e9  # bytes of DeciDiffusion 1.0's files that are needed
FIRST_PROMPT = "a photo of a grumpy cat"
OK, WRONG, SKIPPED = "right", "wrong", "left out"
MARKS = {OK: "✓", WRONG: "✗", SKIPPED: "–"}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        verdict: "right", "wrong" or "left out".
        told: what was found, and what to do if it is wrong.
        seconds: how long the check took.
    """

    name: str
    verdict: str
    told: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{MARKS[self.verdict]} {self.name}: {self.told}"


class Doctor:
    """Checks one checkpoint; finished work is kept in the report's folder, and not repeated.

    Args:
        checkpoint, revision: see ``find_checkpoint``.
        out: the report's folder.
        quick: skip the INT8 models and the drawing.
        tell: is called with each line as soon as it is known.
    """

    def __init__(
        self, checkpoint: str | Path, revision: str | None, out: Path, quick: bool, tell: Callable[[str], None]
    ):
        self.checkpoint, self.revision, self.out, self.quick, self.tell = checkpoint, revision, out, quick, tell
        self.checks: list[Check] = []
        self.seconds: dict[str, list[float]] = {}  # for each picture, by preset
        self.kept: dict[str, Any] = {}
        self._key = ""

    @property
    def name(self) -> str:
        """The hub id, or a folder's name without its path."""
        return str(source_of(self.checkpoint, self.revision)["checkpoint"])

    @property
    def is_right(self) -> bool:
        return not any(check.verdict == WRONG for check in self.checks)

    def run(self) -> None:
        """Run all checks in order; those that depend on a failed one are left out."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.tell(self._needs())
        folder = self._try("the checkpoint's files", self._look_at_files)
        report = None if folder is None else self._try("conversion to OpenVINO", lambda: self._convert(folder))
        if folder is None or report is None:
            self._leave_out("the picture beside diffusers'", "INT8 models", "drawing")
        else:
            self._try("the picture beside diffusers'", lambda: self._compare(folder, report.model_dir))
            if self.quick:
                self._leave_out("INT8 models", "drawing", why="--quick")
            else:
                has_int8 = self._try("INT8 models", lambda: self._quantize(report.model_dir))
                self._try("drawing", lambda: self._draw(report.model_dir, bool(has_int8)))
        self._write()

    def _needs(self) -> str:
        folder = Path(self.checkpoint).expanduser()
        size = weights_size(folder) if (folder / "flexible_unet").is_dir() else REAL_DOWNLOAD
        download = 0 if folder.is_dir() else size
        parts = [f"{download / 1e9:.1f} GB of download" if download else "no download"]
        parts += [f"{(download + 1.6 * size) / 1e9:.1f} GB of disk", f"{1.5 + 3.4 * size / 1e9:.0f} GB of memory"]
        minutes = max(1, round(size / 1e9 * (4 if self.quick else 15)))
        return f"This needs at most {', '.join(parts)} and, on two cores, about {minutes} min. It can be resumed."

    def _try(self, name: str, look: Callable[[], tuple[str, Any]]) -> Any:
        """Run one check, and note what it found or why it failed; returns its result, or None."""
        begun = time.perf_counter()
        try:
            told, found = look()
            verdict = OK
        except NotEnoughMemory as error:
            told, found, verdict = str(error), None, SKIPPED
        except (DeciDiffusionError, ValueError, OSError, ArithmeticError) as error:
            told, found, verdict = str(error), None, WRONG
        except Exception as error:  # unforeseen errors belong into the report most of all
            told, found, verdict = f"{type(error).__name__}: {error}. Please report this.", None, WRONG
        self._note(Check(name, verdict, told, round(time.perf_counter() - begun, 1)))
        return found

    def _leave_out(self, *names: str, why: str = "a check that it depends on failed") -> None:
        for name in names:
            self._note(Check(name, SKIPPED, why))

    def _note(self, check: Check) -> None:
        self.checks.append(check)
        self.tell(str(check))

    def _look_at_files(self) -> tuple[str, Path]:
        folder = find_checkpoint(self.checkpoint, self.revision)
        self._key = f"{fingerprint_of(source_files(folder))} {__version__} {version('openvino')}"
        kept = self.out / "kept.json"
        found = read_json(kept) if kept.is_file() else {}
        self.kept = found if found.get("key") == self._key else {"key": self._key}
        config = read_json(folder / "flexible_unet" / "config.json")
        kind = "another U-Net-NAS of the family"
        if config.get("configurations") == read_json(V1_UNET_CONFIG).get("configurations"):
            kind = "the U-Net-NAS of DeciDiffusion 1.0"
        numbers = sum(_parameters(file) for file in weights_files(folder, "flexible_unet"))
        return f"{weights_size(folder) / 1e9:.2f} GB of weights; {kind}, {numbers:,} parameters", folder

    def _convert(self, folder: Path) -> tuple[str, ConversionReport]:
        report = convert_checkpoint(self.checkpoint, revision=self.revision, verify=True)
        verify_model_dir(report.model_dir)
        agreements = ", ".join(f"{part.name} {part.psnr:.0f} dB" for part in report.parts if part.psnr is not None)
        seconds = sum(part.seconds for part in report.parts)
        return f"{seconds:.0f} s; agreement with PyTorch: {agreements}", report

    def _compare(self, folder: Path, model_dir: Path) -> tuple[str, None]:
        """Compare a picture of few steps by diffusers' own pipeline, on the checkpoint's modules, with ours in f32."""
        if "difference" not in self.kept:
            self.kept["difference"] = _difference(folder, model_dir)
            self._keep()
        difference = self.kept["difference"]
        if difference > MOST_DIFFERENCE:
            raise ValueError(
                f"after {STEPS} steps in f32 a pixel differs by {difference:.1f} of 255; at most {MOST_DIFFERENCE} are "
                "allowed. Please report this."
            )
        return f"after {STEPS} steps in f32 no pixel differs by more than {difference:.1f} of 255", None

    def _quantize(self, model_dir: Path) -> tuple[str, bool]:
        report = quantize_models(model_dir, prompts=CALIBRATION_PROMPTS)
        told = [f"{part.name} {part.psnr:.1f} dB" + ("" if part.quantized else ", kept") for part in report.parts]
        return f"{sum(part.seconds for part in report.parts):.0f} s; {', '.join(told)}", True

    def _draw(self, model_dir: Path, has_int8: bool) -> tuple[str, None]:
        """Draw eight prompts with each preset, as one sheet."""
        pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
        presets = [name for name in PRESETS if name == "exact" or has_int8 or not pipe.models.int8_pays]
        pictures, titles = [], []
        try:
            for number, prompt in enumerate(prompts_of(pipe)):
                for preset in presets:
                    pictures.append(self._picture(pipe, prompt, number, preset))
                    titles.append(f"{preset}: {prompt}")
        finally:
            pipe.close()
        picture_grid(pictures, titles, columns=len(presets), side=256).save(self.out / "sheet.png", optimize=True)
        blank = [title for title, one in zip(titles, pictures, strict=True) if np.asarray(one.convert("L")).std() < 2]
        if blank:
            raise ValueError(f"{len(blank)} pictures are of one colour, such as '{blank[0]}': see sheet.png.")
        told = [f"{name} {np.median(taken):.1f} s" for name, taken in self.seconds.items()]
        return f"sheet.png, {len(pictures)} pictures; a picture takes {', '.join(told)} (medians)", None

    def _picture(self, pipe: OVStableDiffusionPipeline, prompt: str, number: int, preset: str) -> Image.Image:
        """One picture of the sheet; drawn unless it was drawn before."""
        name = f"{number}-{preset}"
        file, known = self.out / "pictures" / f"{name}.png", self.kept.setdefault("pictures", {})
        if name not in known or not file.is_file():
            file.parent.mkdir(exist_ok=True)
            begun = time.perf_counter()
            pipe(prompt, seed=number, preset=preset).images[0].save(file)
            known[name] = round(time.perf_counter() - begun, 2)
            self._keep()
        if number:  # the first picture of each preset includes loading its models
            self.seconds.setdefault(preset, []).append(known[name])
        with Image.open(file) as opened:
            return opened.convert("RGB")

    def _keep(self) -> None:
        write_json(self.out / "kept.json", self.kept)

    def line(self) -> str:
        """The whole report in one line, to be pasted into an issue."""
        right = sum(check.verdict == OK for check in self.checks)
        wrong = [check.name for check in self.checks if check.verdict == WRONG]
        parts = [f"doctor {__version__}: {self.name}" + (f"@{self.revision}" if self.revision else "")]
        parts.append(f"{right} of {len(self.checks)} right" + (f", wrong: {', '.join(wrong)}" if wrong else ""))
        parts += [f"{preset} {np.median(taken):.1f} s" for preset, taken in self.seconds.items()]
        parts += [f"peak {peak_memory() / 1e9:.1f} GB", *machine().values()]
        return " · ".join(parts)

    def _write(self) -> None:
        content = {
            "checkpoint": self.name,
            "revision": self.revision,
            "is_right": self.is_right,
            "checks": [asdict(check) for check in self.checks],
            "seconds": self.seconds,
            "peak_memory_gb": round(peak_memory() / 1e9, 2),
            "machine": machine(),
            "line": self.line(),
        }
        write_json(self.out / "report.json", content)
        rows = [f"| {MARKS[one.verdict]} {one.name} | {one.told} | {one.seconds:.0f} s |" for one in self.checks]
        sheet = ["", "![Every prompt by every preset](sheet.png)"] if (self.out / "sheet.png").is_file() else []
        text = [
            f"# {self.name}",
            "",
            self.line(),
            "",
            "| looked at | found | took |",
            "| --- | --- | --- |",
        ]
        (self.out / "report.md").write_text("\n".join([*text, *rows, *sheet]) + "\n", encoding="utf-8")


def prompts_of(pipe: OVStableDiffusionPipeline) -> list[str]:
    """Eight prompts that suit a checkpoint."""
    examples = [prompt for prompt, _ in pipe.defaults["example_prompts"]]
    first = [] if pipe.defaults.get("understands") else [FIRST_PROMPT]
    return [*first, *examples, *pipe.defaults["calibration_prompts"]][:8]


def _parameters(file: Path) -> int:
    if file.suffix != ".safetensors":
        return 0
    with safe_open(file, "numpy") as opened:
        return sum(int(np.prod(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118


@torch.no_grad()
def _difference(folder: Path, model_dir: Path) -> float:
    """The largest difference of any pixel, in 255ths."""
    from diffusers import StableDiffusionPipeline

    defaults = read_defaults(model_dir)
    asked = {name: defaults[name] for name in ("guidance_scale", "guidance_rescale")}
    asked |= {"num_inference_steps": STEPS, "output_type": "np"}
    prompt = defaults["example_prompts"][0][0]
    theirs = StableDiffusionPipeline(
        vae=_rounded(load_vae(folder)),
        text_encoder=_rounded(load_text_encoder(folder)),
        tokenizer=load_tokenizer(folder),
        unet=_rounded(load_unet(folder)),  # type: ignore[arg-type]  # of the same interface
        scheduler=make_scheduler(read_scheduler(model_dir)),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    wanted: Any = theirs(prompt, generator=torch.Generator().manual_seed(0), **asked)
    del theirs
    gc.collect()
    release_freed_memory()
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(prompt, generator=torch.Generator().manual_seed(0), **asked)
    pipe.close()
    return round(float(np.abs(made.images - wanted.images).max()) * 255, 2)


def _rounded(module: Any) -> Any:
    """A module with its weights rounded to 16 bits, as the model folder has them: only the computation is compared."""
    return module.half().float()


def machine() -> dict[str, str]:
    """What the figures depend on: processor, system and packages; nothing personal."""
    processor = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    memory = psutil.virtual_memory().total / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("openvino", "torch", "diffusers"))
    return {
        "processor": f"{processor}, {os.cpu_count()} cores, {memory:.0f} GB",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "packages": packages,
    }


def examine(
    checkpoint: str | Path,
    revision: str | None = None,
    out: str | Path = "doctor",
    quick: bool = False,
    tell: Callable[[str], None] = print,
) -> bool:
    """Check a checkpoint, and write ``report.md``, ``report.json`` and ``sheet.png``; a repeated call resumes.

    Args:
        checkpoint, revision: see ``find_checkpoint``.
        out: the report's folder.
        quick: skip the INT8 models and the drawing.
        tell: is called with each line as soon as it is known.

    Returns:
        whether no check found anything wrong.

    Raises:
        ValueError: ``out`` is not a path, or is a file.
    """
    folder = check_path("out", out)
    if folder.is_file():
        raise ValueError(f"`out` {folder} is a file: give a folder.")
    doctor = Doctor(checkpoint, revision, folder, quick, tell)
    doctor.run()
    tell(f"The report is {folder / 'report.md'}. To tell others, paste this line:\n{doctor.line()}")
    return doctor.is_right
