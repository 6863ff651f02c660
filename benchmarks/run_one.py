"""One measured run, in a process of its own: ``python -m benchmarks.run_one '{"tool": "ours", …}'``.

Prints one line of JSON. For Optimum Intel and OpenVINO GenAI this project's library is not imported, so that their
memory and start time are their own. diffusers needs the library's U-Net, for which it has no class.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

START, START_OF_DAY = time.perf_counter(), time.time()
PROMPT = "a fox in the snow"
WARMUP_PROMPT = "a whale under water"  # another prompt, since the pipelines may cache prompts
SEED = 42
PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "torch", "diffusers", "transformers")

Generate = Callable[[Callable[[], None]], "object"]  # takes a function to call after each step, returns a picture


def ours(options: dict) -> Generate:
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

    options["imported"] = time.perf_counter()
    pipe = OVStableDiffusionPipeline.from_pretrained(options["model_dir"], inference_precision=options["precision"])
    pipe.set_progress_bar_config(disable=True)
    options["effective_precision"] = pipe.inference_precision

    def generate(on_step: Callable[[], None]) -> object:
        import torch

        return pipe(
            [options["prompt"]] * options["pictures"],
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance_scale"],
            guidance_rescale=0.0,  # GenAI does not have it
            height=options["side"],
            width=options["side"],
            generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=lambda *_: on_step(),
            **options.get("arguments", {}),
        ).images[0]

    options["seconds"] = lambda: pipe.seconds
    return generate


def diffusers(options: dict) -> Generate:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    from ov_decidiffusion.conversion.torch_modules import load_unet  # diffusers has no class for U-Net-NAS

    folder = Path(options["checkpoint"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=load_unet(folder),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _diffusers_like(pipe, options)


def optimum(options: dict) -> Generate:
    from optimum.intel import OVStableDiffusionPipeline

    options["imported"] = time.perf_counter()
    pipe = OVStableDiffusionPipeline.from_pretrained(options["model_dir"], ov_config=_ov_config(options))
    return _diffusers_like(pipe, options)


def _diffusers_like(pipe: object, options: dict) -> Generate:
    import torch

    pipe.set_progress_bar_config(disable=True)

    def after_step(_pipe: object, _step: int, _timestep: object, arguments: dict) -> dict:
        generate.on_step()
        return arguments

    def generate(on_step: Callable[[], None]) -> object:
        generate.on_step = on_step
        return pipe(
            [options["prompt"]] * options["pictures"],
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance_scale"],
            height=options["side"],
            width=options["side"],
            generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=after_step,
        ).images[0]

    return generate


def genai(options: dict) -> Generate:
    import openvino_genai
    from PIL import Image

    options["imported"] = time.perf_counter()
    pipe = openvino_genai.Text2ImagePipeline(options["model_dir"], "CPU", **_ov_config(options))

    def generate(on_step: Callable[[], None]) -> object:
        def callback(*_: object) -> bool:
            on_step()
            return False

        made = pipe.generate(
            options["prompt"],
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance_scale"],
            height=options["side"],
            width=options["side"],
            num_images_per_prompt=options["pictures"],
            generator=openvino_genai.TorchGenerator(SEED),
            callback=callback,
        )
        return Image.fromarray(made.data[0])

    return generate


def _ov_config(options: dict) -> dict[str, str | int]:
    """Another tool's defaults, or its best settings: the requested precision, and all cores."""
    if options["precision"] == "default":
        return {}
    import os

    cores = os.cpu_count() or 1
    return {"INFERENCE_PRECISION_HINT": options["precision"], "INFERENCE_NUM_THREADS": cores}


TOOLS = {"ours": ours, "diffusers": diffusers, "optimum": optimum, "genai": genai}


def measure(options: dict) -> dict:
    """Load, make a first picture, and unless ``cold_only`` is set a second one with its steps timed.

    ``warmup_steps`` is the number of steps of the first picture, if fewer are enough. Times from the start count from
    the start of the process if ``started`` gives it as a time of day. For this project's pipeline, the result also has
    the seconds in each model, and when the U-Net began.
    """
    start = START - max(0.0, START_OF_DAY - options.get("started", START_OF_DAY))
    generate = TOOLS[options["tool"]](options)
    seconds = options.get("seconds", dict)
    steps, options["steps"] = options["steps"], options.get("warmup_steps", options["steps"])
    options["prompt"] = PROMPT if options.get("cold_only") else WARMUP_PROMPT
    begin = loaded = time.perf_counter()
    ticks: list[float] = []
    in_unet: list[float] = []

    def on_first_picture() -> None:
        ticks.append(time.perf_counter())
        in_unet.append(seconds().get("unet", math.nan))

    picture = generate(on_first_picture)
    first = time.perf_counter()
    result = {"load_s": loaded - start, "first_picture_s": first - start, "first_step_s": ticks[0] - loaded}
    if "imported" in options:
        result["import_s"] = options["imported"] - start
    if not math.isnan(in_unet[0]):
        result["unet_begins_s"] = ticks[0] - in_unet[0] - start
    if not options.get("cold_only"):
        options |= {"steps": steps, "prompt": PROMPT}
        before = seconds()
        ticks.clear()
        begin = time.perf_counter()
        picture = generate(lambda: ticks.append(time.perf_counter()))
        result["end_to_end_s"] = time.perf_counter() - begin
        result["models_s"] = {name: value - before.get(name, 0.0) for name, value in seconds().items()}
    result["decode_s"] = result.get("end_to_end_s", first - begin) - (ticks[-1] - begin)
    gaps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    result |= {"step_s": statistics.median(gaps or [ticks[0] - begin]), "steps_s": gaps}
    if options.get("picture"):
        picture.save(options["picture"])
    result["peak_memory_gb"] = peak_memory_gb()
    return result | {"effective_precision": options.get("effective_precision", options["precision"])}


def time_loading(options: dict) -> dict:
    """Seconds of ``from_pretrained`` without imports, with or without OpenVINO's model cache, and the cache's size."""
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

    cache_dir, mode = options["cache_dir"], options["cache_mode"]
    start = time.perf_counter()
    OVStableDiffusionPipeline.from_pretrained(
        options["model_dir"], ov_cache_dir=cache_dir, ov_config={"CACHE_MODE": mode} if cache_dir else None
    )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in Path(cache_dir).iterdir()) if cache_dir else 0
    return {"load_s": seconds, "cache_gb": size / 1e9}


def measure_conversion(options: dict) -> dict:
    """Seconds, peak memory and agreement of a conversion; with ``verify``, every model is compared with PyTorch."""
    from ov_decidiffusion.conversion.convert import convert_checkpoint

    start = time.perf_counter()
    report = convert_checkpoint(options["checkpoint"], options["model_dir"], verify=options["verify"])
    return {
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": peak_memory_gb(),
        "converted": report.converted,
        "parts": [dataclasses.asdict(part) for part in report.parts],
    }


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 1e9 bytes."""
    from ov_decidiffusion.runtime.memory import peak_memory  # imported after the run, so that it does not count

    return peak_memory() / 1e9


def versions() -> dict[str, str]:
    """The versions of the packages that this process runs with."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    options = json.loads(sys.argv[1])
    if options["tool"] == "unet":
        from benchmarks.workload import time_unet

        result = time_unet(options)
    elif options["tool"] == "loading":
        result = time_loading(options)
    elif options["tool"] == "conversion":
        result = measure_conversion(options)
    else:
        result = measure(options)
    print(json.dumps(result | {"versions": versions()}))


if __name__ == "__main__":
    main()
