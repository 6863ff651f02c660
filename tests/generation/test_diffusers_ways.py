"""What diffusers' users are used to does the same here, against diffusers on the same modules."""

import threading

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback

PROMPT = "a fox in the snow"
SETTINGS = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"}


def ours_and_theirs(pipe, theirs, ours_too=None, **arguments):
    settings = SETTINGS | arguments
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images
    return pipe(PROMPT, seed=5, guidance_rescale=0.0, **settings | (ours_too or {})).images, expected


def assert_same(ours, expected):
    assert expected.std() > 0.03, "a flat picture proves nothing"
    assert np.abs(ours - expected).max() <= 2 / 255


def interrupting(pipe, index, timestep, tensors):
    if index == 2:
        pipe._interrupt = True
    return tensors


def changing_guidance(pipe, index, timestep, tensors):
    pipe._guidance_scale = 1.5 + index
    return tensors


def drifting(pipe, index, timestep, tensors):
    return {"latents": tensors["latents"] * 0.97 + 0.01 * index}


@pytest.mark.parametrize("callback", [interrupting, changing_guidance, drifting])
def test_callbacks_change_the_run_as_in_diffusers(pipe, diffusers_text2img, callback):
    diffusers_text2img.scheduler = pipe.scheduler
    made, expected = ours_and_theirs(pipe, diffusers_text2img, callback_on_step_end=callback)
    assert_same(made, expected)
    plain, _ = ours_and_theirs(pipe, diffusers_text2img)
    assert np.abs(plain - made).max() > 10 / 255, "the callback did something, and only to its own run"


def test_diffusers_own_callback_works(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = pipe.scheduler
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    assert_same(*ours_and_theirs(pipe, diffusers_text2img, callback_on_step_end=callback))


def test_contrast_is_rescaled_as_a_callback_says(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = pipe.scheduler

    def off(pipe, index, timestep, tensors):
        assert pipe.do_classifier_free_guidance and pipe._num_timesteps == 6
        pipe._guidance_rescale = 0.0
        return tensors

    settings = SETTINGS | {"guidance_rescale": 0.7, "callback_on_step_end": off}
    expected = diffusers_text2img(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images
    assert_same(pipe(PROMPT, seed=5, **settings).images, expected)


def test_a_call_in_a_callback_leaves_the_one_around_it_as_it_is(pipe):
    steps = []

    def another(pipe, index, timestep, tensors):
        pipe("an owl", seed=1, num_inference_steps=1)
        steps.append(index)
        pipe._guidance_scale = 3.0
        if index == 2:
            pipe._interrupt = True

    pipe(PROMPT, seed=5, callback_on_step_end=another, **SETTINGS)
    assert steps == [0, 1, 2]


def test_callbacks_are_given_the_tensors_that_they_ask_for(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = pipe.scheduler
    shapes = []

    def look(pipe, index, timestep, tensors):
        shapes.append({name: tuple(value.shape) for name, value in tensors.items()} | {"total": pipe.num_timesteps})
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    ours_and_theirs(pipe, diffusers_text2img, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    theirs, ours = shapes[:6], shapes[6:]
    assert ours == theirs
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be a list of some of latents"):
        pipe(PROMPT, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["masks"])


def test_another_thread_can_end_a_run(pipe):
    started, seen = threading.Event(), []

    def count(pipe, index, timestep, tensors):
        seen.append(index)
        started.set()
        threading.Event().wait(0.05)

    run = threading.Thread(
        target=pipe, args=(PROMPT,), kwargs={"callback_on_step_end": count, "num_inference_steps": 100}
    )
    run.start()
    started.wait(20)
    pipe._interrupt = True
    run.join(20)
    assert not run.is_alive() and len(seen) < 100
    assert len(pipe(PROMPT, num_inference_steps=3, output_type="np").images) == 1


def test_embeddings_in_place_of_prompts(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = pipe.scheduler
    wanted, unwanted = diffusers_text2img.encode_prompt(PROMPT, "cpu", 1, True, "in the snow")
    embeds = {"prompt_embeds": wanted.detach(), "negative_prompt_embeds": unwanted.detach()}
    expected = diffusers_text2img(generator=torch.Generator().manual_seed(5), **SETTINGS, **embeds).images
    made = pipe(seed=5, guidance_rescale=0.0, **SETTINGS, **embeds).images
    assert_same(made, expected)
    in_words = pipe(PROMPT, negative_prompt="in the snow", seed=5, guidance_rescale=0.0, **SETTINGS).images
    assert np.abs(in_words - made).max() <= 2 / 255
    for wrong, message in (
        ({"prompt": PROMPT, "prompt_embeds": wanted}, "Give `prompt` or `prompt_embeds`, not both"),
        ({"prompt_embeds": wanted[0]}, "`prompt_embeds` must be"),
        ({"prompt_embeds": wanted.detach(), "negative_prompt_embeds": unwanted.repeat(2, 1, 1)}, "must have the shape"),
        ({}, "`prompt` must be a string"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.denoise(**wrong)


def test_eta_timesteps_and_sigmas(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = pipe.scheduler
    assert_same(*ours_and_theirs(pipe, diffusers_text2img, eta=0.8))
    with pytest.raises(ValueError, match="`timesteps` cannot be given to DDIMScheduler"):
        pipe.denoise(PROMPT, timesteps=[900, 500, 100])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    diffusers_text2img.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for schedule in ({"timesteps": [980, 800, 500, 300, 100]}, {"sigmas": [100.0, 14.0, 5.0, 2.0, 1.0, 0.3, 0.1]}):
        assert_same(*ours_and_theirs(pipe, diffusers_text2img, **schedule))
    with pytest.raises(ValueError, match="`timesteps` must be falling"):
        pipe.denoise(PROMPT, timesteps=[100, 500])


def test_a_tuple_where_no_dictionary_is_wanted(pipe):
    pictures, checks = pipe(PROMPT, seed=5, return_dict=False, num_inference_steps=2)
    assert len(pictures) == 1 and checks is None


def test_strength_is_diffusers_own(pipe, diffusers_img2img):
    diffusers_img2img.scheduler = pipe.scheduler
    source = pipe("a house in a meadow", seed=1).images[0]
    made, expected = ours_and_theirs(pipe, diffusers_img2img, image=source, num_inference_steps=10)
    assert_same(made, expected)


@pytest.mark.parametrize("form", ["array of bytes", "array of floats", "tensor", "tensor in -1...1", "a batch"])
def test_source_pictures_as_arrays_and_tensors(pipe, form):
    source = pipe("a house in a meadow", seed=1).images[0]
    array = np.asarray(source)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    given = {
        "array of bytes": array,
        "array of floats": (array / 255).astype(np.float32),
        "tensor": tensor,
        "tensor in -1...1": tensor[None] * 2 - 1,
        "a batch": [array],
    }[form]
    settings = SETTINGS | {"strength": 0.5, "seed": 2}
    plain = pipe(PROMPT, image=source, **settings).images
    np.testing.assert_array_equal(pipe(PROMPT, image=given, **settings).images, plain)
