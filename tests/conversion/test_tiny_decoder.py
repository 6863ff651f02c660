"""The tiny decoder: diffusers' own on the same latents, near the whole one, an optional part of a folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from test_checkpoint import COMMIT, Hub, run_code

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.generation.metadata import settings_of
from ov_decidiffusion.model_folder.layout import TINY_DECODER, graph_file
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.runtime import models

PROMPTS = ["a fox in the snow", "a pumpkin in a city at night"]


@pytest.fixture(scope="module")
def latents(loaded_pipe):
    return loaded_pipe(PROMPTS, seed=[1, 2], output_type="latent").images


def test_it_is_diffusers_own_and_near_the_whole_decoder(pipe, latents):
    theirs = AutoencoderTiny.from_pretrained(EMBEDDED_CHECKPOINT / TINY_DECODER, torch_dtype=torch.float32)
    with torch.no_grad():
        expected = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    tiny = pipe.decode_latents(latents, "np", decoder="tiny")
    assert np.abs(tiny - expected).max() < 1 / 255
    whole = pipe.decode_latents(latents, "np")
    for one, other in zip(tiny, whole, strict=True):
        decibels = -10 * np.log10(np.mean((one - other) ** 2))
        print(f"{decibels:.1f} dB from the whole decoder")
        assert decibels > 26  # 28.5 in the mean of scenes, mixtures and generated latents


def test_a_call_decodes_with_it_and_its_settings_say_so(int8_pipe):
    before = int8_pipe.seconds.get(TINY_DECODER, 0)
    picture = int8_pipe(PROMPTS[0], seed=3, preset="fast").images[0]
    assert int8_pipe.seconds[TINY_DECODER] > before
    settings = settings_of(picture)
    assert settings["decoder"] == "tiny"
    again = int8_pipe(**settings).images[0]
    assert np.abs(np.asarray(again, int) - np.asarray(picture, int)).max() <= 1
    before = int8_pipe.seconds[TINY_DECODER]
    int8_pipe(PROMPTS[0], seed=3, preset="fast", decoder="whole")
    assert int8_pipe.seconds[TINY_DECODER] == before


def test_a_folder_without_one_works_and_says_so(model_dir, tmp_path):
    # Without the reports too, which list the tiny decoder's files.
    shutil.copytree(model_dir, tmp_path / model_dir.name, ignore=shutil.ignore_patterns(TINY_DECODER, "*report.json"))
    pipe = OVStableDiffusionPipeline.from_pretrained(tmp_path / model_dir.name, inference_precision="f32")
    assert not pipe.has_tiny_decoder
    with pytest.raises(ValueError, match=r'`decoder` "tiny" is not in this folder'):
        pipe.denoise(PROMPTS[0], decoder="tiny")
    with pytest.raises(ValueError, match="`decoder` must be one of whole, tiny, got 'small'"):
        pipe.denoise(PROMPTS[0], decoder="small")
    assert pipe(PROMPTS[0], preset="fast", quantized=False, seed=0).images[0].size == (128, 128)


@pytest.mark.parametrize(
    "change",
    [{"latent_channels": 8}, {"num_decoder_blocks": [3, 3, 1]}, {"upsampling_scaling_factor": 4}, {"shift_factor": 1}],
)
def test_one_that_does_not_fit_the_latents_is_refused_before_anything_is_converted(tmp_path, change):
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "other")
    file = folder / TINY_DECODER / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="tiny_decoder/config.json must have"):
        convert_checkpoint(folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_large_pictures_are_decoded_in_tiles_with_it_too(pipe):
    latents = torch.randn((1, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    whole = pipe.decode_latents(latents, "np", decoder="tiny")
    pipe.enable_vae_tiling(128)
    try:
        tiled = pipe.decode_latents(latents, "np", decoder="tiny")
    finally:
        pipe.disable_vae_tiling()
    assert tiled.shape == whole.shape and np.abs(tiled - whole).mean() < 0.02


def test_a_folder_of_int8_models_and_a_device_of_one_shape_have_it_too(quantization, model_dir, monkeypatch, latents):
    pipe = OVStableDiffusionPipeline.from_pretrained(quantization.model_dir, inference_precision="f32")
    expected = pipe.decode_latents(latents, "np", decoder="tiny")
    monkeypatch.setattr(models, "needs_static_shapes", lambda device: True)
    static = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    assert np.abs(static.decode_latents(latents, "np", decoder="tiny") - expected).max() < 1e-3


def test_a_damaged_one_is_refused(tmp_path):
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "cut")
    weights = folder / TINY_DECODER / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="tiny_decoder.* is incomplete or damaged"):
        find_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"tiny decoder .* lacks diffusion_pytorch_model\.safetensors"):
        find_checkpoint(folder)


LOOK = (
    "import sys, logging; from pathlib import Path; from ov_decidiffusion.conversion.hub import *\n"
    "logging.basicConfig(format='%(message)s')\n"
    "print('FOUND', find_tiny_decoder(Path(sys.argv[1]), local=False))"
)


@pytest.fixture
def bare(tmp_path):
    """A checkpoint with Stable Diffusion's scale of latents and without a tiny decoder of its own."""
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "bare", ignore=shutil.ignore_patterns(TINY_DECODER))
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    return folder


def test_the_published_one_is_downloaded_where_the_latents_are_stable_diffusions(tmp_path, bare):
    published = tmp_path / "taesd"
    shutil.copytree(EMBEDDED_CHECKPOINT / TINY_DECODER, published)
    (published / "taesd.py").write_text("raise SystemExit('this must never run')")
    hub = Hub(published, "madebyollin/taesd")
    try:
        found = run_code(LOOK, tmp_path / "home", str(bare), HF_ENDPOINT=hub.endpoint)
        folder = found.stdout.split("FOUND ")[1].strip()
        assert COMMIT in folder
        assert {name for name, _ in hub.fetched} == {"config.json", "diffusion_pytorch_model.safetensors"}
        hub.status = 503
        found = run_code(LOOK, tmp_path / "other", str(bare), HF_ENDPOINT=hub.endpoint)
        assert "There is no tiny decoder in this folder: madebyollin/taesd cannot be downloaded" in found.stderr
        assert found.stdout.strip() == "FOUND None"
    finally:
        hub.server.shutdown()


def test_a_local_checkpoint_without_one_converts_and_asks_no_hub(tmp_path, small_checkpoint, monkeypatch):
    monkeypatch.setattr(
        "ov_decidiffusion.conversion.hub.snapshot_download", lambda *args, **options: pytest.fail("asked")
    )
    report = convert_checkpoint(small_checkpoint, tmp_path / "models", verify=False)
    assert TINY_DECODER not in [part.name for part in report.parts]
    assert not graph_file(report.model_dir, TINY_DECODER).exists()
