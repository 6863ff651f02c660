"""The squeezed scheduler of DeciDiffusion 2.0, against its makers' numbers and diffusers' own solver."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.schedulers.registry import (
    SOLVERS,
    SQUEEZED,
    SUPPORTED_SCHEDULERS,
    make_scheduler,
    scheduler_class,
    up_to_date,
)
from ov_decidiffusion.schedulers.squeezed import SqueezedDPMSolverMultistepScheduler, squeeze_timesteps

LINEAR_16 = [967, 907, 846, 786, 725, 665, 604, 544, 484, 423, 363, 302, 242, 181, 121, 60]


def test_timesteps_are_those_of_decidiffusion_2():
    assert squeeze_timesteps(LINEAR_16, "10,6") == [967, 907, 846, 786, 725, 665, 532, 399, 266, 133]
    scheduler = SqueezedDPMSolverMultistepScheduler()
    scheduler.set_timesteps(16)
    assert scheduler.timesteps.tolist() == [998, 936, 873, 811, 748, 686, 548, 411, 274, 137]
    scheduler = SqueezedDPMSolverMultistepScheduler(squeeze_mode="11,7")
    scheduler.set_timesteps(16)
    assert scheduler.timesteps.tolist() == [998, 936, 873, 811, 748, 686, 624, 496, 372, 248, 124]


def test_sigmas_are_those_at_the_timesteps_and_end_at_timestep_0():
    scheduler = SqueezedDPMSolverMultistepScheduler()
    scheduler.set_timesteps(16)
    abar = scheduler.alphas_cumprod.double().numpy()[[*scheduler.timesteps.tolist(), 0]]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), np.sqrt((1 - abar) / abar), rtol=1e-4)


def test_wrong_modes_are_refused():
    with pytest.raises(ValueError, match=r"`squeeze_mode` must be one of .*'10,6'.*, got '9,5'"):
        SqueezedDPMSolverMultistepScheduler(squeeze_mode="9,5")
    with pytest.raises(ValueError, match="`use_karras_sigmas` must be false"):
        SqueezedDPMSolverMultistepScheduler.from_config({"use_karras_sigmas": True})
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 6 .* got 5"):
        SqueezedDPMSolverMultistepScheduler().set_timesteps(5)


def test_pipeline_matches_diffusers_solver_at_the_squeezed_timesteps(pipe, diffusers_components):
    pipe.scheduler = SqueezedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    steps = list(pipe.denoise("a penguin in the snow", num_inference_steps=16, seed=2))
    timesteps = [int(step.timestep) for step in steps]
    assert len(timesteps) == 10 and steps[0].total == 10
    solver = DPMSolverMultistepScheduler.from_config(
        diffusers_components["scheduler"].config, solver_type="heun", final_sigmas_type="sigma_min"
    )
    reference = StableDiffusionPipeline(**diffusers_components | {"scheduler": solver})
    reference.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 4.0, "output_type": "np"}
    expected = reference(
        "a penguin in the snow",
        timesteps=timesteps,
        generator=torch.Generator().manual_seed(2),
        **settings,
    )
    ours = pipe("a penguin in the snow", num_inference_steps=16, seed=2, **settings)
    assert np.abs(ours.images - expected.images).max() < 2 / 255
    picture = Image.fromarray((ours.images[0] * 255).astype(np.uint8))
    redone = list(pipe.denoise("a whale", image=picture, strength=0.5, num_inference_steps=16, seed=0))
    assert [int(step.timestep) for step in redone] == timesteps[5:]


def test_a_checkpoint_that_names_it_gets_it_and_peers_get_ddim_on_its_betas(small_checkpoint, tmp_path):
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "tiny-2")
    (checkpoint / "pipeline_defaults.json").unlink()
    config = {
        "_class_name": "SqueezedDPMSolverMultistepScheduler",
        "squeeze_mode": "11,7",
        "beta_schedule": "squaredcos_cap_v2",
        "steps_offset": 1,
    }
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    folder = convert_checkpoint(checkpoint, tmp_path / "models", verify=False).model_dir
    pipe = OVStableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, SqueezedDPMSolverMultistepScheduler)
    assert pipe.scheduler.config.squeeze_mode == "11,7"
    assert pipe.defaults["num_inference_steps"] == 16 and pipe.defaults["guidance_rescale"] == 0.8
    assert len(list(pipe.denoise("a whale", seed=0))) == 11
    peers = read_json(folder / "scheduler" / "scheduler_config.json")
    assert peers["_class_name"] == "DDIMScheduler" and peers["prediction_type"] == "v_prediction"
    np.testing.assert_allclose(make_scheduler(peers).betas, pipe.scheduler.betas)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("name", sorted(set(SUPPORTED_SCHEDULERS) - {SQUEEZED}))
def test_every_promised_scheduler_makes_diffusers_pictures(pipe, diffusers_text2img, diffusers_img2img, name, steps):
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    if (name, steps) == ("PNDMScheduler", 1):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="`num_inference_steps` 1 is too few for PNDMScheduler"):
            pipe.denoise("a fox", num_inference_steps=steps)
        return
    noise = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    source, size = Image.fromarray(noise).resize((64, 64)), {"width": 64, "height": 64}
    tasks = ((diffusers_text2img, size, {}), (diffusers_img2img, {}, {"image": source, "strength": 1.0}))
    for theirs, their_size, task in tasks:
        settings = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"} | task
        theirs.scheduler = getattr(diffusers, name).from_config(scheduler.config)
        pipe.scheduler = scheduler
        prompt = "a fox in the snow"
        expected = theirs(prompt, generator=torch.Generator().manual_seed(5), **settings, **their_size).images
        made = pipe(prompt, seed=5, guidance_rescale=0.0, **settings, **size).images
        assert np.abs(made - expected).max() <= 2 / 255


def test_schedulers_that_cannot_work_are_not_promised(pipe):
    assert not {"EDMEulerScheduler", "DPMSolverSDEScheduler"} & set(SUPPORTED_SCHEDULERS)
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`guidance_interval` cannot be used with PNDMScheduler"):
        pipe.denoise("a fox", guidance_interval=(1, 5))
    for wrong in (
        {"beta_schedule": "magic"},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": "x"},
        {"beta_end": []},
    ):
        with pytest.raises(ValueError, match="scheduler DDIMScheduler do not work|`num_train_timesteps`"):
            make_scheduler({"_class_name": "DDIMScheduler"} | wrong)


SOLVER_SETTINGS = {
    # Of AUTOMATIC1111's names, the schedulers and settings that diffusers' documentation gives for them.
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2m sde karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "dpm++ 2s karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True, "lower_order_final": True}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm2 a karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "heun karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "unipc karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {"timestep_spacing": "trailing"}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}


def test_every_solver_is_listed_here():
    listed = {name.lower() for name in SOLVER_SETTINGS}
    assert listed == set(SOLVERS) - {"squeezed"}  # which has tests of its own


@pytest.mark.parametrize("name", SOLVER_SETTINGS)
def test_solvers_by_the_names_that_people_know_are_diffusers(pipe, diffusers_text2img, name):
    kind, settings = SOLVER_SETTINGS[name]
    spacing = {} if kind == "PNDMScheduler" else {"timestep_spacing": "linspace"}
    own = {key: value for key, value in pipe.scheduler.config.items() if key != "_class_name"}
    diffusers_text2img.scheduler = getattr(diffusers, kind).from_config(own, **(spacing | settings))
    arguments = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np", "width": 64, "height": 64}
    prompt = "a fox in the snow"
    expected = diffusers_text2img(prompt, generator=torch.Generator().manual_seed(5), **arguments).images
    made = pipe(prompt, seed=5, solver=name, **arguments).images
    assert np.abs(made - expected).max() <= 2 / 255


def test_unknown_solvers_are_answered_with_the_nearest(pipe):
    with pytest.raises(ValueError, match=r"`solver` must be one of ddim, .*, got 'dpm\+\+ 2m karas'. Did you mean"):
        pipe("a fox", solver="dpm++ 2m karas")
    with pytest.raises(ValueError, match=r"got 7\.$"):
        pipe("a fox", solver=7)


@pytest.mark.parametrize("name", SUPPORTED_SCHEDULERS)
def test_settings_are_those_that_from_config_keeps(name):
    """Those of other classes too, and without what was another class's default."""

    def settings(scheduler) -> dict:
        config = dict(scheduler.config)
        return config | {"_use_default_values": sorted(config.get("_use_default_values", ()))}

    own = read_json(EMBEDDED_CHECKPOINT / "scheduler" / "scheduler_config.json")
    for config in (own | {"solver_order": 3}, diffusers.EulerDiscreteScheduler.from_config(own).config):
        made = make_scheduler(dict(config) | {"_class_name": name})
        assert settings(made) == settings(scheduler_class(name).from_config(config))


@pytest.mark.parametrize(
    "outdated", [{"steps_offset": 0}, {"clip_sample": True}, {"steps_offset": 0, "clip_sample": True}]
)
def test_outdated_settings_are_corrected_as_diffusers_pipelines_do(diffusers_components, outdated):
    config = read_json(EMBEDDED_CHECKPOINT / "scheduler" / "scheduler_config.json") | outdated
    theirs = StableDiffusionPipeline(
        **diffusers_components | {"scheduler": DDIMScheduler.from_config(config)}
    ).scheduler
    ours = make_scheduler(config)
    for name in ("steps_offset", "clip_sample"):
        assert ours.config[name] == theirs.config[name] != {"steps_offset": 0, "clip_sample": True}[name]
    without = {key: value for key, value in config.items() if key not in outdated}  # the class's own are old too
    assert all(make_scheduler(without).config[name] == theirs.config[name] for name in outdated)
    assert up_to_date(config) == up_to_date(config) | {name: theirs.config[name] for name in outdated}


def test_a_noise_schedule_without_numbers_is_refused_by_name():
    config = read_json(EMBEDDED_CHECKPOINT / "scheduler" / "scheduler_config.json") | {"beta_start": float("nan")}
    with pytest.raises(ValueError, match="settings of the scheduler DDIMScheduler do not work: .*NaN"):
        make_scheduler(config)
