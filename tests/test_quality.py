"""What the figures of quality and of the waterfall rest on."""

import statistics

import numpy as np
import pytest
from PIL import Image

from benchmarks import parts, quality, waterfall
from benchmarks.run_one import measure
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.torch_modules import load_vae
from training.evaluate import SINGLE, choose_cases
from training.scenes import example_picture


def test_paired_change_is_the_mean_difference_with_its_interval():
    rng = np.random.default_rng(0)
    base = rng.random(960) < 0.9
    rights = base & (rng.random(960) < 0.97)
    change, margin = quality.paired_change(list(rights), list(base))
    assert change == pytest.approx(100 * (rights.mean() - base.mean()))
    resampled = [rng.integers(0, 960, 960) for _ in range(2000)]
    spread = np.percentile([100 * (rights[i].mean() - base[i].mean()) for i in resampled], [2.5, 97.5])
    assert 2 * margin == pytest.approx(spread[1] - spread[0], rel=0.15)
    assert quality.paired_change(list(base), list(base)) == (0, 0)


def test_perceptual_distance_tells_another_object_from_a_little_noise():
    rng = np.random.default_rng(0)

    fox, owl = (np.asarray(example_picture(name, "in the snow")) for name in ("fox", "owl"))
    noisy = np.clip(fox + rng.normal(0, 3, fox.shape), 0, 255).astype(np.uint8)
    distance = quality.PerceptualDistance(load_vae(EMBEDDED_CHECKPOINT).encoder)
    same, little, other = distance([fox] * 3, [fox, noisy, owl])
    print(f"equal {same:.4f}, a little noise {little:.4f}, another object {other:.4f}")
    assert same == 0 and 0 < little < 0.5 * other


@pytest.mark.at_length
def test_a_setting_is_measured_against_the_exact_pictures(int8_pipe):
    cases = choose_cases(4)["trained on"]
    figures, exact = quality.measure(int8_pipe, cases, {}, None)
    assert exact.shape == (4, 128, 128, 3) and len(figures["rights"]) == 4 and figures["seconds"] > 0
    again, _ = quality.measure(int8_pipe, cases, {}, exact)
    assert again["psnr"] > 60 and again["distance"] < 1e-3
    fast, _ = quality.measure(int8_pipe, cases, quality.SETTINGS["preset fast"], exact)
    assert fast["psnr"] < again["psnr"] and fast["distance"] > again["distance"]
    assert len(fast["rights_of_hard"]) == sum(case.scene.size not in SINGLE for case in cases)
    found = {"exact": figures, "preset fast": fast}
    text = quality.quality_table(found)
    assert len(quality.draw(found).axes) == 2
    assert f"{fast['psnr']:.1f} dB" in text and "| exact |" in text


def test_parts_agree_with_the_whole_models_as_the_waterfall_needs(int8_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "STEPS", 5)
    steps, latents = parts.compare_steps(int8_pipe, 128)
    assert min(steps["top level on this step's own features"]) >= 60
    assert min(steps["the same in INT8, against the INT8 U-Net"]) >= 40
    age = [statistics.median(steps[f"caching, features {name} old"]) for name in ("1 step", "2 steps", "3 steps")]
    assert age[0] > age[1] > age[2] > 10 and len(steps["INT8"]) == parts.STEPS
    pictures = parts.compare_pictures(int8_pipe, latents)
    assert all(value > 25 for value in pictures.values())
    assert "| INT8 decoder |" in parts.write(steps, pictures, 128, tmp_path)


FAST = "and the tiny decoder: preset fast"


def test_every_row_of_the_waterfall_is_a_call_that_the_pipeline_takes(int8_pipe):
    ours = [run for run in waterfall.all_runs().values() if run["tool"] == "ours"]
    totals = []
    for run in ours:
        steps = int8_pipe.denoise("a fox", num_inference_steps=run["steps"], seed=0, **run["arguments"])
        totals.append(next(steps).total)
    fewer = [10, 10, 10, 6, 6, 1]
    assert totals in ([30, 30, 30, *fewer], [30, 30, *fewer])  # one row less where auto is f32


def test_the_waterfall_shows_where_a_pictures_seconds_went(quantization, model_dir, tmp_path):
    rows, pictures = {}, {}
    for name in ("exact, f32", FAST):
        options = waterfall.all_runs()[name] | {"side": 128, "precision": "f32", "model_dir": str(model_dir)}
        pictures[name] = tmp_path / f"{name}.png"
        rows[name] = measure(options | {"picture": str(pictures[name])})
        assert 0.3 * rows[name]["end_to_end_s"] < sum(rows[name]["models_s"].values()) < rows[name]["end_to_end_s"]
    assert {"unet_top_level", "tiny_decoder"} <= set(rows[FAST]["models_s"])
    peer = {"OpenVINO GenAI, its defaults": {"end_to_end_s": 99.0, "models_s": {}, "peak_memory_gb": 5.0}}
    text = waterfall.waterfall_table(peer | rows, pictures)
    assert f"{99 / rows['exact, f32']['end_to_end_s']:.1f}x" in text
    assert np.asarray(Image.open(pictures["exact, f32"])).shape == (128, 128, 3)
