"""INT8 models: above their floor on runs they never saw, really in 8 bits, and loadable by OpenVINO GenAI."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from conftest import UNIX_ONLY, cpu_flags
from openvino import opset13 as ops

from ov_decidiffusion import calibration, quantize
from ov_decidiffusion.calibration import Recorded, plain_run, quantize_within_budget
from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import CONVERSION_REPORT, quantized_sibling
from ov_decidiffusion.model_folder.writing import write_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import BUDGETS, CalibrationRuns, quantize_models

PROMPT = "a fox in the snow"


def recorded_rows(pipe, model_dir, prompts):
    """What the parts of a folder are calibrated with."""
    runs, rows = CalibrationRuns(pipe, prompts), {}
    for part in ("unet", "vae_decoder", "text_encoder"):
        file = model_dir / part / "openvino_model.xml"
        rows[part] = getattr(runs, part)(plain_run(ov.Core().read_model(file), file.with_suffix(".bin"))).rows
    return rows


def test_quantized_models_agree_on_runs_they_were_not_calibrated_with(int8_pipe, quantization, model_dir):
    print(quantization)
    rows = recorded_rows(int8_pipe, model_dir, ["a castle in the mountains", "a fox"])
    for part in quantization.parts:
        assert part.quantized and part.psnr >= BUDGETS[part.name]
        made = []
        for folder in (model_dir, quantization.model_dir):
            model = ov.Core().compile_model(
                folder / part.name / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
            made.append(np.concatenate([model(row)[0].ravel() for row in rows[part.name]]))
        agreement = psnr(made[1], made[0])
        print(f"{part.name} on another prompt: {agreement:.1f} dB")
        assert agreement >= BUDGETS[part.name] - 3


OUTPUTS = """
import pickle, sys, numpy as np, openvino as ov
folder, rows, exact, to = sys.argv[1:]
options = {"INFERENCE_PRECISION_HINT": "f32"} | ({"LP_TRANSFORMS_MODE": "NO"} if exact == "exact" else {})
for part, some in pickle.load(open(rows, "rb")).items():
    model = ov.Core().compile_model(f"{folder}/{part}/openvino_model.xml", "CPU", options)
    np.save(f"{to}-{part}.npy", np.stack([model(row)[0] for row in some]))
"""


def test_products_of_eight_bits_do_not_saturate_without_vnni(int8_pipe, model_dir, quantization, tmp_path):
    """The same graph with its rounding but its products in f32 is what a processor that adds in 32 bits computes."""
    recorded = recorded_rows(int8_pipe, model_dir, ["a castle in the mountains", "a fox in the snow"])
    rows = {part: recorded[part][:4] for part in ("unet", "vae_decoder")}
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    isa = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"} if "avx512bw" in cpu_flags() else {}  # AVX2 has no VNNI as it is
    environment = os.environ | isa
    for how in ("exact", "fast"):
        arguments = [str(quantization.model_dir), str(tmp_path / "rows"), how, str(tmp_path / how)]
        subprocess.run([sys.executable, "-c", OUTPUTS, *arguments], check=True, env=environment)
    for part in ("unet", "vae_decoder"):
        fast, exact = (np.load(tmp_path / f"{how}-{part}.npy") for how in ("fast", "exact"))
        agreement = psnr(fast, exact)
        print(f"{part}: products in 8 bits agree with products in f32 to {agreement:.1f} dB")
        assert agreement >= 38


def test_weights_are_stored_in_eight_bits_and_products_computed_in_them(quantization):
    for part in quantization.parts:
        assert part.megabytes < 0.75 * part.plain_megabytes
        file = quantization.model_dir / part.name / "openvino_model.xml"
        runtime = ov.Core().compile_model(file, "CPU").get_runtime_model()
        kinds = {"Convolution", "FullyConnected", "MatMul"}
        products = [op.get_rt_info() for op in runtime.get_ops() if op.get_rt_info()["layerType"].astype(str) in kinds]
        in_int8 = [info for info in products if info["runtimePrecision"].astype(str) in ("i8", "u8")]
        print(f"{part.name}: {len(in_int8)} of {len(products)} products in INT8")
        assert len(in_int8) > 0.6 * len(products)


def test_genai_makes_our_int8_picture_from_the_int8_folder(int8_pipe, quantization):
    theirs = openvino_genai.Text2ImagePipeline(quantization.model_dir, "CPU", INFERENCE_PRECISION_HINT="f32")
    settings = {"num_inference_steps": 12, "guidance_scale": 3.0}
    generator = openvino_genai.TorchGenerator(7)
    picture = theirs.generate(PROMPT, width=128, height=128, generator=generator, **settings).data[0]
    ours = int8_pipe(PROMPT, guidance_rescale=0.0, seed=7, quantized=True, **settings).images[0]
    exact = int8_pipe(PROMPT, guidance_rescale=0.0, seed=7, **settings).images[0]
    difference = np.abs(np.asarray(ours, float) - picture).mean()
    print(f"mean difference of a pixel: {difference:.2f}/255")
    assert difference < 1.5 and not np.array_equal(np.asarray(ours), np.asarray(exact))


def test_top_level_on_this_steps_own_features_is_the_whole_int8_unet(int8_pipe):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn((2, 4, 16, 16), generator=generator), int8_pipe.encode_text(["", PROMPT])
    int8_pipe.unet.prepare_caching(quantized=True)
    whole, deep = int8_pipe.unet.full(sample, torch.tensor(420), text, keep_features=True, quantized=True)
    top = int8_pipe.unet.shallow(sample, torch.tensor(420), deep, quantized=True)
    agreement = psnr(top.numpy(), whole.numpy())
    print(f"INT8 top level on its own features: {agreement:.0f} dB")
    assert agreement >= 40


def test_the_folder_is_found_again_and_works_on_its_own(quantization, model_dir, int8_pipe):
    stamp = (quantization.model_dir / "unet" / "openvino_model.bin").stat().st_mtime_ns
    assert quantize_models(model_dir) == quantization
    assert (quantization.model_dir / "unet" / "openvino_model.bin").stat().st_mtime_ns == stamp
    alone = OVStableDiffusionPipeline.from_pretrained(quantization.model_dir, inference_precision="f32")
    pictures = [pipe(PROMPT, seed=3, preset="fast", output_type="np").images for pipe in (alone, int8_pipe)]
    np.testing.assert_allclose(*pictures, atol=1 / 255)
    with pytest.raises(ValueError, match="holds quantized models; give the folder that they were made from"):
        quantize_models(quantization.model_dir)


@pytest.mark.at_length
@pytest.mark.parametrize(
    ("mode", "share", "floor"),
    [("int8-weights", 0.6, 35), ("int4-weights", 0.6, 15)],
)
def test_lighter_weights_are_smaller_and_agree(model_dir, mode, share, floor):
    report = quantize_models(model_dir, mode, prompts=2)
    print(report)
    for part in report.parts:
        assert part.megabytes < share * part.plain_megabytes and part.psnr > floor
    pipe = OVStableDiffusionPipeline.from_pretrained(report.model_dir, inference_precision="f32")
    assert np.asarray(pipe(PROMPT, seed=3, num_inference_steps=8).images[0]).std() > 10
    assert not pipe.quantized_parts
    with pytest.raises(ValueError, match="There is no INT8 model for this folder"):
        pipe.denoise(PROMPT, preset="fast")


def test_a_long_calibration_prompt_is_recorded_by_its_beginning(loaded_pipe, model_dir):
    recorded = recorded_rows(loaded_pipe, model_dir, ["a fox " * 60])
    assert {row["encoder_hidden_states"].shape[1] for row in recorded["unet"]} == {77}
    assert {row["input_ids"].shape for row in recorded["text_encoder"]} == {(1, 77)}


@pytest.mark.at_length
def test_a_part_that_int8_harms_too_much_is_kept_as_it_was(model_dir, tmp_path, monkeypatch):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")
    monkeypatch.setattr(calibration, "agreement_of", lambda *_: 29.0)
    monkeypatch.setattr(calibration, "_quantize_layer_by_layer", lambda model, *_: model)
    report = quantize_models(alone, prompts=2)
    assert not any(part.quantized for part in report.parts) and "too low: kept as it was" in str(report)
    files = [folder / "unet" / "openvino_model.bin" for folder in (alone, report.model_dir)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="A part that INT8 would harm too much is kept as it was"):
        OVStableDiffusionPipeline.from_pretrained(alone, inference_precision="f32").denoise(PROMPT, preset="fast")


def test_what_needs_too_much_memory_is_refused_and_leaves_nothing(model_dir, tmp_path, monkeypatch):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", "1.5")
    with pytest.raises(
        ValueError, match=r"INT8 models need about 1\.6 GB of memory, and 1\.5 GB are free: make them on"
    ):
        quantize_models(alone)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["alone-fp16"]


def test_the_sibling_lies_beside_the_folder_however_that_is_named(tmp_path, monkeypatch):
    inner = tmp_path / "alone-fp16" / "unet"
    inner.mkdir(parents=True)
    for where, folder in ((tmp_path, "alone-fp16"), (inner.parent, "."), (inner, "..")):
        monkeypatch.chdir(where)
        assert quantized_sibling(Path(folder)).absolute() == tmp_path / "alone-int8"


def test_an_interruption_leaves_nothing_behind(model_dir, tmp_path, monkeypatch):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize_within_budget", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_models(alone, prompts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["alone-fp16"]


def test_models_of_another_checkpoint_are_not_used(quantization, model_dir, tmp_path, caplog):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")
    shutil.copytree(quantization.model_dir, tmp_path / "alone-int8")
    pipe = OVStableDiffusionPipeline.from_pretrained(alone, inference_precision="f32")
    assert pipe.quantized_parts == {"unet", "vae_decoder"}
    conversion = alone / CONVERSION_REPORT
    write_json(conversion, read_json(conversion) | {"fingerprint": "another"})
    pipe = OVStableDiffusionPipeline.from_pretrained(alone, inference_precision="f32")
    assert not pipe.quantized_parts and "made from another checkpoint" in caplog.text
    with pytest.raises(ValueError, match="was made from another checkpoint than"):
        quantize_models(alone)


@UNIX_ONLY
def test_what_cannot_be_is_refused_and_leaves_nothing_behind(model_dir, tmp_path):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")
    with pytest.raises(ValueError, match="`mode` must be one of int8, int8-weights, int4-weights, got 'int2'"):
        quantize_models(alone, "int2")
    with pytest.raises(ValueError, match="`prompts` must be a whole number of at least 2, got 1"):
        quantize_models(alone, prompts=1)
    for place in ("tokenizer/more.txt", "unet/more.txt"):
        (alone / place).symlink_to("/dev/zero")
        with pytest.raises(ValueError, match="more.txt is a link, to /dev/zero"):
            quantize_models(alone, "int8-weights")
        (alone / place).unlink()
    (tmp_path / "alone-int8").mkdir()
    (tmp_path / "alone-int8" / "chapter1.txt").write_text("words")
    with pytest.raises(ValueError, match="alone-int8 exists and holds no quantized models of ours"):
        quantize_models(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone-fp16", "alone-int8"]


def a_model_that_int8_harms() -> ov.Model:
    """Five convolutions; the fourth ignores a channel a thousand times as large as the others."""
    rng = np.random.default_rng(0)

    def weights(scale_in=1.0, scale_out=1.0):
        drawn = rng.standard_normal((8, 8, 3, 3)).astype(np.float32) / 8
        drawn[:, 0] *= scale_in
        drawn[0] *= scale_out
        return ops.constant(drawn)

    sample = ops.parameter([1, 8, 16, 16], np.float32, "sample")
    sample.output(0).get_tensor().set_names({"sample"})
    hidden = sample
    for scales in ({}, {}, {"scale_out": 1000.0}, {"scale_in": 0.0}, {}):
        hidden = ops.convolution(hidden, weights(**scales), [1, 1], [1, 1], [1, 1], [1, 1])
        hidden = ops.relu(hidden)
    return ov.Model([hidden], [sample], "harmed")


def worst_agreement(model: ov.Model, checks, expected) -> float:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = [compiled(row)[0].copy() for row in checks]
    return min(psnr(one, other) for one, other in zip(made, expected, strict=True))


def quantized_layers(model: ov.Model) -> int:
    return sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def test_int8_that_misses_its_budget_is_mended_layer_by_layer(tmp_path, monkeypatch, caplog):
    rng = np.random.default_rng(1)
    rows = [{"sample": rng.standard_normal((1, 8, 16, 16)).astype(np.float32)} for _ in range(8)]
    rows, checks = rows[:6], rows[6:]
    plain = ov.Core().compile_model(a_model_that_int8_harms(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = [plain(row)[0].copy() for row in checks]

    def feed(run):
        for row in rows:
            run(row, True)
        fed.append(Recorded(rows, checks, [run(row, False) for row in checks]))
        return fed[-1]

    fed: list[Recorded] = []
    found, weights = {}, tmp_path / "none.bin"
    for budget in (5.0, 30.0, 90.0):
        model, agreement = quantize_within_budget(a_model_that_int8_harms(), weights, feed, budget)
        np.testing.assert_allclose(fed[-1].expected, expected, rtol=1e-4, atol=1e-3)
        assert agreement >= worst_agreement(model, checks, expected)
        found[budget] = worst_agreement(model, checks, expected), quantized_layers(model)
    print(found)
    assert found[5.0][0] < 30 and found[5.0][1] > found[30.0][1] > 0, "the first try misses the second budget"
    assert found[30.0][0] >= 30
    assert found[90.0] == (found[90.0][0], 0), "no mix reaches the third: nothing stays in INT8"
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", "0.5")
    model, _ = quantize_within_budget(a_model_that_int8_harms(), weights, feed, 30.0)
    assert worst_agreement(model, checks, expected) < 30 and "Ranking its layers" in caplog.text
