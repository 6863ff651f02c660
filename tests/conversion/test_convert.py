"""The model folder: complete or absent, in agreement with PyTorch, and what other tools expect to find."""

import json
import math
import re
import shutil

import numpy as np
import openvino as ov
import pytest
import torch

from ov_decidiffusion.conversion import export as making
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.torch_modules import load_text_encoder, load_tokenizer, load_unet, load_vae
from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.errors import ConversionError
from training.models import TEXT_WIDTH

PORTS = {
    "text_encoder": ({"input_ids": "i64"}, ["last_hidden_state", "pooler_output"]),
    "unet": ({"sample": "f32", "timestep": "i64", "encoder_hidden_states": "f32"}, ["out_sample"]),
    "vae_encoder": ({"sample": "f32"}, ["latent_parameters"]),
    "vae_decoder": ({"latent_sample": "f32"}, ["sample"]),
    "tiny_decoder": ({"latent_sample": "f32"}, ["sample"]),
}


def test_agreement_is_infinite_for_equal_values_and_none_at_all_for_broken_ones():
    values = np.array([1.0, -2.0])
    assert psnr(values, values) == math.inf
    assert psnr(values + 0.02, values) == pytest.approx(40)
    for broken in (math.nan, math.inf):
        assert psnr(np.array([1.0, broken]), values) == -math.inf
    assert psnr(values, np.zeros_like(values)) == -math.inf


def test_every_part_agrees_with_pytorch_and_the_report_says_so(conversion):
    assert [part.name for part in conversion.parts] == list(PORTS)
    assert all(part.psnr > 60 and part.megabytes > 0.1 for part in conversion.parts)
    assert len(re.findall(r"\d+\.\d dB", str(conversion))) == 5


def test_ports_are_those_that_other_tools_feed(model_dir):
    for name, (inputs, outputs) in PORTS.items():
        model = ov.Core().read_model(model_dir / name / "openvino_model.xml")
        assert {port.any_name: port.element_type.get_type_name() for port in model.inputs} == inputs
        assert [port.get_names() for port in model.outputs] == [{name} for name in outputs]
        assert all(port.partial_shape[0].is_dynamic for port in model.inputs + model.outputs)
    unet = ov.Core().read_model(model_dir / "unet" / "openvino_model.xml")
    assert all(side.is_dynamic for side in list(unet.input("sample").partial_shape)[2:])
    config = json.loads((model_dir / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] is None and config["configurations"] and config["sample_size"] == 16


def test_models_agree_with_pytorch_at_other_sizes_and_batches(model_dir):
    """Independent of the conversion's own check: shapes that were not traced."""
    generator = torch.Generator().manual_seed(1)
    ids = load_tokenizer(EMBEDDED_CHECKPOINT)(["a whale"] * 3, padding="max_length", return_tensors="pt").input_ids
    text = torch.randn((3, 77, TEXT_WIDTH), generator=generator)
    latents = torch.randn((3, 4, 8, 24), generator=generator)
    pixels = torch.rand((2, 3, 64, 192), generator=generator) * 2 - 1
    vae = load_vae(EMBEDDED_CHECKPOINT)
    with torch.no_grad():
        expected = {
            "text_encoder": load_text_encoder(EMBEDDED_CHECKPOINT)(ids).last_hidden_state,
            "unet": load_unet(EMBEDDED_CHECKPOINT)(latents, torch.tensor([7]), text).sample,
            "vae_encoder": vae.encode(pixels).latent_dist.parameters,
            "vae_decoder": vae.decode(latents).sample,
        }
    inputs = {
        "text_encoder": {"input_ids": ids},
        "unet": {"sample": latents, "timestep": torch.tensor([7]), "encoder_hidden_states": text},
        "vae_encoder": {"sample": pixels},
        "vae_decoder": {"latent_sample": latents},
    }
    for name, reference in expected.items():
        file = model_dir / name / "openvino_model.xml"
        model = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = model({key: value.numpy() for key, value in inputs[name].items()})[0]
        assert psnr(result, reference.numpy()) > 60, name


def test_fp32_weights_are_twice_as_large_and_can_be_verified_later(conversion, tmp_path):
    report = convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "fp32", weight_format="fp32", verify=False)
    assert report.converted
    for wide, narrow in zip(report.parts, conversion.parts, strict=True):
        assert wide.psnr is None and wide.megabytes > 1.4 * narrow.megabytes
    verified = convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "fp32", weight_format="fp32", verify=True)
    assert not verified.converted and all(part.psnr > 80 for part in verified.parts)
    assert convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "fp32", weight_format="fp32").parts == verified.parts


def test_a_second_call_returns_at_once_and_other_folders_are_left_alone(conversion, model_dir, tmp_path):
    again = convert_checkpoint(EMBEDDED_CHECKPOINT, model_dir)
    assert not again.converted and again.parts == conversion.parts
    with pytest.raises(ValueError, match="fp16 weights.*weight_format differs.*other folder"):
        convert_checkpoint(EMBEDDED_CHECKPOINT, model_dir, weight_format="fp32")
    with pytest.raises(ValueError, match="`weight_format` must be one of fp16, fp32, got 'int7'"):
        convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "new", weight_format="int7")
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("words")
    with pytest.raises(ValueError, match="no complete conversion"):
        convert_checkpoint(EMBEDDED_CHECKPOINT, precious)
    assert (precious / "chapter1.txt").read_text() == "words"


@pytest.mark.parametrize("broken", ["trace.load_vae", "export.write_tokenizer", "export.write_checkpoint_settings"])
def test_an_interrupted_conversion_leaves_nothing_behind(small_checkpoint, monkeypatch, tmp_path, broken):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ov_decidiffusion.conversion.{broken}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(small_checkpoint, tmp_path / "models" / "tiny", verify=False)
    assert not list((tmp_path / "models").iterdir())


def test_a_model_that_disagrees_with_pytorch_fails_the_conversion(monkeypatch, tmp_path):
    original = making.measure_agreement

    def on_other_numbers(file, example, reference):
        noise = np.random.default_rng(0)
        return original(
            file,
            example,
            [value + 0.05 * np.abs(value).max() * noise.standard_normal(value.shape) for value in reference],
        )

    monkeypatch.setattr(making, "measure_agreement", on_other_numbers)
    with pytest.raises(ConversionError, match="text_encoder agrees with PyTorch to 2.* dB only"):
        convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_changed_or_another_one_is_not_taken_for_the_converted_one(
    small_checkpoint, small_model_dir, tmp_path, monkeypatch, caplog
):
    checkpoint = tmp_path / "small-decidiffusion"
    shutil.copytree(small_checkpoint, checkpoint)
    assert not convert_checkpoint(checkpoint, small_model_dir).converted
    defaults = checkpoint / "pipeline_defaults.json"
    defaults.write_text(defaults.read_text() + "\n")
    with pytest.raises(ValueError, match="fingerprint differs"):
        convert_checkpoint(checkpoint, small_model_dir)
    monkeypatch.chdir(tmp_path)
    first = convert_checkpoint(checkpoint)
    assert first.converted and not convert_checkpoint(checkpoint).converted
    derived = first.model_dir.with_name(first.model_dir.name.replace("fp16", "int8"))
    derived.mkdir()
    shutil.copyfile(first.model_dir / "conversion_report.json", derived / "conversion_report.json")
    defaults.write_text(defaults.read_text() + "\n")
    assert convert_checkpoint(checkpoint).converted, "in the default place it is made again"
    assert "as it was before it changed" in caplog.text and not derived.exists()
    with pytest.raises(ValueError, match="checkpoint and revision differs"):
        convert_checkpoint("Deci/small-decidiffusion", small_model_dir, revision="v2")


def test_a_scheduler_that_other_tools_lack_is_kept_beside_one_that_they_know(small_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint, checkpoint)
    file = checkpoint / "scheduler" / "scheduler_config.json"
    own = json.loads(file.read_text()) | {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
    }
    file.write_text(json.dumps(own))
    convert_checkpoint(checkpoint, tmp_path / "model", verify=False)
    for_peers = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert for_peers["_class_name"] == "DDIMScheduler" and for_peers["prediction_type"] == "v_prediction"
    assert len(for_peers["trained_betas"]) == 1000
    assert json.loads((tmp_path / "model" / "ov_scheduler" / "scheduler_config.json").read_text()) == own

    file.write_text(json.dumps(own | {"_class_name": "MagicScheduler"}))
    with pytest.raises(ValueError, match="DDIMScheduler.*got 'MagicScheduler'"):
        convert_checkpoint(checkpoint, tmp_path / "other", verify=False)
