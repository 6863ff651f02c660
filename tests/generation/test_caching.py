"""Feature caching and the guidance interval: what they leave alone, what they save, and what they cost."""

import math

import numpy as np
import openvino as ov
import pytest
import torch

from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.generation.plan import full_steps
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.runtime.transformations import merge_upsampling
from training.models import TEXT_WIDTH
from training.oracle import read_picture
from training.scenes import example_picture

PROMPTS = ["a dog in the mountains", "a robot on a beach at sunset"]


@pytest.fixture
def runs(pipe, monkeypatch):
    """(model, batch) of every run of a model."""
    seen, run = [], pipe.models.run

    def watched(name, inputs, **arguments):
        seen.append((name, len(next(iter(inputs.values())))))
        return run(name, inputs, **arguments)

    monkeypatch.setattr(pipe.models, "run", watched)
    return seen


def some_inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, 4, 16, 16), generator=generator), torch.randn((2, 77, TEXT_WIDTH), generator=generator)


def test_without_caching_the_prediction_is_that_of_the_folders_model_as_rewritten_to_the_bit(model_dir):
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")  # saw no long prompt yet
    sample, text = some_inputs()
    core = ov.Core()
    model = core.read_model(model_dir / "unet" / "openvino_model.xml")
    merge_upsampling(model)  # as the pipeline does, with or without caching
    plain = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = plain({"sample": sample, "timestep": np.array([420]), "encoder_hidden_states": text})[0]
    np.testing.assert_array_equal(pipe.unet.full(sample, torch.tensor(420), text)[0], expected)


def test_top_level_on_this_steps_own_features_is_the_whole_unet(pipe):
    sample, text = some_inputs()
    for side in (16, 24):
        latents = torch.nn.functional.interpolate(sample, side)
        pipe.unet.prepare_caching()
        whole, deep = pipe.unet.full(latents, torch.tensor(420), text, keep_features=True)
        top = pipe.unet.shallow(latents, torch.tensor(420), deep)
        agreement = psnr(top.numpy(), whole.numpy())
        print(f"top level on its own features, {side}x{side}: {agreement:.0f} dB")
        assert agreement >= 60
        assert psnr(pipe.unet.shallow(latents, torch.tensor(420), 0 * deep).numpy(), whole.numpy()) < 40


def test_a_failed_run_beside_it_does_no_harm_to_a_run_that_caches(pipe):
    """The U-Net is compiled again then, and still gives its deep features."""
    settings = {"num_inference_steps": 6, "cache_interval": 3, "seed": 1}
    steps = pipe.denoise("a fox", **settings)
    next(steps)
    with pytest.raises(ValueError, match="running unet failed"):
        pipe.unet.full(torch.zeros(1, 3, 16, 16), torch.tensor(1), torch.zeros(1, 77, 128))
    *_, last = steps
    expected = pipe("a fox", **settings).images[0]
    np.testing.assert_array_equal(np.asarray(pipe.finish(last)[0]), np.asarray(expected))


@pytest.mark.parametrize("pictures", ["text to image", "image to image"])
def test_caching_runs_the_whole_unet_on_few_steps_and_keeps_the_picture(pipe, runs, pictures):
    settings = {"seed": [3, 4], "num_inference_steps": 20}
    if pictures == "image to image":
        settings |= {"image": example_picture("house", "in a meadow"), "strength": 0.9}
    exact = pipe(PROMPTS, **settings).images
    steps = [name for name, _ in runs].count("unet")
    runs.clear()
    cached = pipe(PROMPTS, cache_interval=3, **settings).images
    names = [name for name, _ in runs]
    assert names.count("unet") == math.ceil((steps - 1) / 3) + 1
    assert names.count("unet") + names.count("unet_top_level") == steps
    for ours, theirs in zip(cached, exact, strict=True):
        a, b = read_picture(ours), read_picture(theirs)
        assert (a.objects, a.place, a.size) == (b.objects, b.place, b.size)
        assert not np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_guidance_goes_on_in_its_last_direction_and_keeps_the_picture(pipe, runs):
    settings = {"seed": [3, 4], "num_inference_steps": 12}
    exact = pipe(PROMPTS, **settings).images
    assert [rows for name, rows in runs if name == "unet"] == [4] * 12
    runs.clear()
    kept = pipe(PROMPTS, guidance_cache_interval=3, **settings).images
    assert [rows for name, rows in runs if name == "unet"] == [4, 2, 2] * 4
    for ours, theirs in zip(kept, exact, strict=True):
        a, b = read_picture(ours), read_picture(theirs)
        assert (a.objects, a.place) == (b.objects, b.place)
        assert not np.array_equal(np.asarray(ours), np.asarray(theirs))
    always = pipe(PROMPTS, guidance_cache_interval=1, **settings).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(always, exact, strict=True))
    runs.clear()
    pipe(PROMPTS, guidance_cache_interval=2, cache_interval=3, **settings)
    assert {rows for name, rows in runs if name == "unet_top_level"} <= {2, 4}


def test_whole_steps_lie_evenly_or_closer_together_at_the_start():
    for total in range(1, 31):
        for interval in range(1, 8):
            even = full_steps(total, interval)
            places = np.flatnonzero(even)
            gaps = np.diff(places)
            assert len(even) == total and even[0] and even[-1]
            assert len(places) == 1 + math.ceil((total - 1) / interval)  # no fewer could do
            assert total == 1 or (gaps.max() <= interval and gaps.max() - gaps.min() <= 1)
            for power in (1.5, 3.0):
                denser = full_steps(total, interval, power)
                assert len(denser) == total and denser[0] and denser[-1]
                assert len(np.flatnonzero(denser)) == len(places) and (np.flatnonzero(denser) <= places).all()
    assert np.flatnonzero(full_steps(7, 3)).tolist() == [0, 3, 6]
    assert np.flatnonzero(full_steps(30, 5, 2.0)).tolist() == [0, 1, 3, 7, 13, 20, 29]


def test_the_denser_interval_runs_its_whole_steps_where_it_says(pipe, runs):
    pipe(PROMPTS, cache_interval=4, cache_power=1.5, seed=[3, 4], num_inference_steps=12)
    names = [name for name, _ in runs if name.startswith("unet")]
    assert [name == "unet" for name in names] == full_steps(12, 4, 1.5) != full_steps(12, 4)


def test_guidance_acts_between_the_noise_levels_and_costs_half_outside(pipe, runs):
    settings = {"seed": [3, 4], "num_inference_steps": 10, "output_type": "np"}
    always = pipe(PROMPTS, **settings).images
    assert {batch for name, batch in runs if name == "unet"} == {4}
    np.testing.assert_array_equal(pipe(PROMPTS, guidance_interval=(0, 1e9), **settings).images, always)
    runs.clear()
    never = pipe(PROMPTS, guidance_interval=(0, 0), **settings).images
    assert {batch for name, batch in runs if name == "unet"} == {2}
    np.testing.assert_array_equal(never, pipe(PROMPTS, guidance_scale=1.0, **settings).images)
    runs.clear()
    steps = pipe.denoise(PROMPTS, guidance_interval=(0.5, 5), cache_interval=2, seed=[3, 4], num_inference_steps=10)
    timesteps = [step.timestep for step in steps]
    abar = pipe.scheduler.alphas_cumprod.numpy()
    expected = [0.5 <= math.sqrt((1 - abar[t]) / abar[t]) <= 5 for t in timesteps]
    batches = [batch for name, batch in runs if name.startswith("unet")]
    assert batches == [4 if guided else 2 for guided in expected] and len(set(batches)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_interval": 0}, "`cache_interval` must be a whole number of at least 1, got 0"),
        ({"cache_power": 0.5}, "`cache_power` must be a number from 1 to 3, got 0.5"),
        ({"guidance_interval": 3}, r"`guidance_interval` must be \(low, high\)"),
        ({"guidance_interval": (2, 1)}, r"`guidance_interval\[1\]` must be a number of at least 2, got 1"),
    ],
)
def test_wrong_settings_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.denoise("a fox", **arguments)
