"""The arguments of a call stand in one place, are shown, and wrong names are answered."""

import dataclasses
import inspect

import pytest

from ov_decidiffusion.generation.config import FIELDS, GenerationConfig
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.server.schemas import ImageRequest

OF_THE_CALL_ALONE = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
OPENAIS = {
    "stream",
    "partial_images",
    "model",
    "n",
    "size",
    "response_format",
    "output_format",
    "rng_seed",
    "quality",
    "style",
    "background",
}
OPENAIS |= {"stream", "partial_images", "moderation", "output_compression", "input_fidelity", "user"}


def shown(function) -> dict[str, object]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    assert all(one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) for one in parameters)
    return {one.name: one.default for one in parameters}


def test_the_call_and_the_loop_show_every_argument_with_its_default():
    fields = {one.name: one.default for one in dataclasses.fields(GenerationConfig)}
    assert shown(OVStableDiffusionPipeline.denoise) == fields
    call = shown(OVStableDiffusionPipeline.__call__)
    assert [*call] == [*fields, *OF_THE_CALL_ALONE]
    assert {name: call[name] for name in fields} == fields
    documentation = inspect.getdoc(OVStableDiffusionPipeline.__call__)
    for name in call:
        assert f"{name}:" in documentation or f"{name}, " in documentation or f", {name}" in documentation, name


def test_a_wrong_name_is_answered_with_the_nearest_right_one(pipe):
    with pytest.raises(TypeError, match=r"Pipeline.__call__\(\) has no argument `prompts`; .*`prompt`"):
        pipe(prompts="a fox")
    with pytest.raises(TypeError, match=r"denoise\(\) has no argument `guidance`; did you mean `guidance_"):
        pipe.denoise("a fox", guidance=7)
    with pytest.raises(TypeError, match="has no argument `xyz`; it has prompt, negative_prompt, image"):
        pipe("a fox", xyz=1)


def test_a_configuration_cannot_be_changed_and_the_one_that_runs_has_all_choices_made():
    config = GenerationConfig("a fox", preset="fast", cache_interval=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    defaults = {"num_inference_steps": 20, "guidance_scale": 4.0, "guidance_rescale": 0.5}
    resolved = config.resolved(defaults, 1000)
    assert (resolved.num_inference_steps, resolved.cache_interval, resolved.decoder) == (6, 2, "tiny")
    assert (resolved.guidance_scale, resolved.guidance_rescale, resolved.cache_power) == (4.0, 0.5, 1.0)
    assert config.num_inference_steps is None


def test_the_server_takes_no_argument_that_a_call_does_not_have():
    assert set(ImageRequest.model_fields) - OPENAIS <= set(FIELDS)


def test_former_names_work_for_a_release_and_say_what_is_new(pipe):
    step = next(iter(pipe.denoise("a fox", seed=1, num_inference_steps=2)))
    with pytest.deprecated_call(match="`denoiser` is now `unet`"):
        unet = pipe.denoiser
    with pytest.deprecated_call(match="`whole` is now `full`"):
        prediction, _ = unet.whole(step.sample, step.timestep, step.prompt_embeds[-1:])
    assert prediction.equal(unet.full(step.sample, step.timestep, step.prompt_embeds[-1:])[0])
    with pytest.deprecated_call(match="`number_format` is now `precision`"):
        assert pipe.number_format == pipe.precision == "f32"
    with pytest.deprecated_call(match="`quick_look` is now `latent_preview`"):
        assert pipe.quick_look(step.latents)[0].size == (128, 128)
