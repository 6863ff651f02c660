"""What the tests share: the embedded checkpoint, converted once, and diffusers' own pipelines on the same weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.components import load_text_encoder, load_tokenizer, load_unet, load_vae
from ov_decidiffusion.convert import convert_checkpoint
from ov_decidiffusion.demo import DemoBlocks, make_demo
from ov_decidiffusion.folder import read_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import QuantizationReport, quantize_models
from ov_decidiffusion.reports import ConversionReport
from ov_decidiffusion.schedulers import make_scheduler


def cpu_flags() -> set[str]:
    """What the processor has, where Linux says it."""
    file = Path("/proc/cpuinfo")
    return set(file.read_text().split()) if file.is_file() else set()


@pytest.fixture(scope="session")
def conversion(tmp_path_factory) -> ConversionReport:
    """The embedded checkpoint, converted with fp16 weights, which are the checkpoint's own; once for all processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return convert_checkpoint(EMBEDDED_CHECKPOINT, folder / "models" / "tiny")


@pytest.fixture(scope="session")
def model_dir(conversion) -> Path:
    return conversion.model_dir


@pytest.fixture(scope="session")
def loaded_pipe(model_dir) -> OVStableDiffusionPipeline:
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded_pipe) -> OVStableDiffusionPipeline:
    """The pipeline at f32, with the checkpoint's own scheduler whatever the test before assigned."""
    loaded_pipe.scheduler = make_scheduler(read_json(EMBEDDED_CHECKPOINT / "scheduler" / "scheduler_config.json"))
    return loaded_pipe


@pytest.fixture(scope="session")
def quantization(model_dir) -> QuantizationReport:
    """The embedded checkpoint's models in INT8, made once."""
    return quantize_models(model_dir)


@pytest.fixture(scope="session")
def int8_pipe(quantization, model_dir) -> OVStableDiffusionPipeline:
    """A pipeline at f32 that has INT8 models too."""
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def demo(int8_pipe) -> Iterator[DemoBlocks]:
    """The demo, served on this machine."""
    demo = make_demo(int8_pipe)
    demo.launch(prevent_thread_lock=True, quiet=True)
    yield demo
    demo.close(verbose=False)


@pytest.fixture(scope="session")
def diffusers_components() -> dict:
    """The same weights as torch modules."""
    return {
        "text_encoder": load_text_encoder(EMBEDDED_CHECKPOINT),
        "tokenizer": load_tokenizer(EMBEDDED_CHECKPOINT),
        "unet": load_unet(EMBEDDED_CHECKPOINT),
        "vae": load_vae(EMBEDDED_CHECKPOINT),
        "scheduler": make_scheduler(read_json(EMBEDDED_CHECKPOINT / "scheduler" / "scheduler_config.json")),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture(scope="session")
def diffusers_text2img(diffusers_components) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(**diffusers_components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def diffusers_img2img(diffusers_components) -> StableDiffusionImg2ImgPipeline:
    pipe = StableDiffusionImg2ImgPipeline(**diffusers_components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
