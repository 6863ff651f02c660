"""What the U-Net believes at each step, and quick looks at latents."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

PROMPT = "a fox in the snow"


def small(picture: Image.Image) -> np.ndarray:
    side = picture.width // 8
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), float)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_predicted_end_is_the_schedulers_own(pipe, scheduler, monkeypatch):
    found = []
    plain = scheduler.step

    def listening(self, *arguments, **options):
        result = plain(self, *arguments, **options | {"return_dict": True})
        found.append(result.pred_original_sample)
        return (result.prev_sample,)

    monkeypatch.setattr(scheduler, "step", listening)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for step in pipe.denoise(PROMPT, seed=1, num_inference_steps=6):
        torch.testing.assert_close(step.predicted, found[-1], atol=5e-3, rtol=5e-3)
    assert len(found) == 6


def test_the_last_prediction_is_the_picture_and_the_first_is_like_it(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    steps = [(step.predicted, step.latents) for step in pipe.denoise(PROMPT, seed=1, num_inference_steps=20)]
    end = steps[-1][1]
    errors = [float((predicted - end).pow(2).mean().sqrt()) for predicted, _ in steps]
    noise = [float((latents - end).pow(2).mean().sqrt()) for _, latents in steps]
    assert errors[-1] < 0.1 and errors[10] < 0.7 * noise[10]
    assert errors[8] < noise[8] and errors[15] < errors[8], "nearer than the latents, and nearer from step to step"


def test_a_preview_has_the_pictures_colours(pipe):
    pairs = []
    for seed, prompt in enumerate((PROMPT, "a whale under water", "a yellow umbrella")):
        *_, step = pipe.denoise(prompt, seed=seed)
        look, picture = pipe.latent_preview(step.latents)[0], pipe.decode_latents(step.latents)[0]
        assert look.size == picture.size
        pairs.append((small(look), small(picture)))
    looks, pictures = (np.concatenate([pair[i].reshape(-1, 3) for pair in pairs]) for i in (0, 1))
    for colour in range(3):
        assert np.corrcoef(looks[:, colour], pictures[:, colour])[0, 1] > 0.9


def test_previews_do_not_flicker_and_run_no_model(pipe):
    looks = [small(pipe.latent_preview(step.predicted)[0]) for step in pipe.denoise(PROMPT, seed=1)]
    changes = [np.abs(one - other).mean() for one, other in zip(looks, looks[1:], strict=False)]
    assert max(changes[len(changes) // 2 :]) < 12, changes  # of 255, once the picture is settled
    before = pipe.seconds
    pipe.latent_preview(torch.randn(1, 4, 64, 64))
    assert pipe.seconds == before, "no model runs for a preview"


def test_wrong_colours_in_a_folder_are_told(pipe):
    kept = pipe.defaults
    for wrong in (None, [[1, 2, 3]], "red"):
        pipe.defaults = kept | {"latent_preview": wrong}
        with pytest.raises(ValueError, match="latent_preview` must be 5 rows of 3 numbers"):
            pipe.latent_preview(torch.zeros(1, 4, 8, 8))
    pipe.defaults = kept
