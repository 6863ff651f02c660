"""What the tests share: the embedded checkpoint, converted once, and diffusers' own pipelines on the same weights."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.reports import ConversionReport
from ov_decidiffusion.conversion.torch_modules import load_text_encoder, load_tokenizer, load_unet, load_vae
from ov_decidiffusion.conversion.unet_nas import FlexibleUNet2DConditionModel
from ov_decidiffusion.demo.app import DemoBlocks, make_demo
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import TINY_DECODER
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import QuantizationReport, quantize_models
from ov_decidiffusion.schedulers.registry import make_scheduler

SMALL_BLOCKS = {
    **{f"{side}_blocks_num_attentions": [0, 1, 0] for side in ("down", "up")},
    **{f"down_blocks_{side}_channels": [32] * 3 for side in ("in", "out")},
    "prev_output_channels": [32] * 3,
    "temb_dim": 128,
    "down_blocks_num_resnets": [1] * 3,
    "up_blocks_num_resnets": [2] * 3,
    "mid_num_resnets": 0,
    "mid_num_attentions": 0,
}


UNIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="uses links, modes, signals or processes of Unix")


def cpu_flags() -> set[str]:
    """What the processor has, where Linux says it."""
    file = Path("/proc/cpuinfo")
    return set(file.read_text().split()) if file.is_file() else set()


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests want told though they pass, such as the notebook's slowest cells."""
    for report in terminalreporter.getreports("passed"):
        for name, told in report.user_properties:
            if name == "told" and report.when == "call":
                terminalreporter.write_sep("=", report.nodeid)
                terminalreporter.write_line(told)


def pytest_collection_modifyitems(items: list) -> None:
    """The tutorial first, which takes longest: begun last, one process would run it while the other has nothing."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


@pytest.fixture(autouse=True)
def all_of_pils_readers() -> Iterator[None]:
    """Back after a test that ran a command which takes some out of its process."""
    kept, order = dict(Image.OPEN), list(Image.ID)
    yield
    Image.OPEN.update(kept)
    Image.ID[:] = order + [name for name in Image.ID if name not in order]


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
def small_checkpoint(tmp_path_factory) -> Path:
    """The embedded checkpoint's form with hardly a layer in it: quickly converted, for all that is not its pictures."""
    folder = shutil.copytree(
        EMBEDDED_CHECKPOINT,
        tmp_path_factory.mktemp("checkpoints") / "small-decidiffusion",
        ignore=shutil.ignore_patterns("*.safetensors", TINY_DECODER),
    )
    unet, vae = (read_json(folder / part / "config.json") for part in ("flexible_unet", "vae"))
    unet["block_out_channels"] = [32] * 4
    unet["configurations"] |= SMALL_BLOCKS
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder", num_hidden_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FlexibleUNet2DConditionModel.from_config(unet).save_pretrained(folder / "flexible_unet")
        AutoencoderKL.from_config(vae | {"block_out_channels": [8] * 4}).save_pretrained(folder / "vae")
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def small_model_dir(small_checkpoint, tmp_path_factory) -> Path:
    return convert_checkpoint(small_checkpoint, tmp_path_factory.mktemp("models") / "tiny").model_dir


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
