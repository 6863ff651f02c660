"""Our pictures are diffusers' and OpenVINO GenAI's pictures; wrong arguments are refused by name."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ov_decidiffusion.generation.images import fit_size, resize
from training.scenes import example_picture

PROMPTS = ["a fox on a blue background", "a robot in space"]
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


SMALL = {"width": 64, "height": 64}


def source_picture() -> Image.Image:
    return example_picture("house", "in a meadow")


def make(pipe, name):
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(pipe.scheduler.config, **options)


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.size == other.size
        assert np.asarray(other).std() > 10, "a flat picture proves nothing"
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int)).max()
        print(f"largest difference of a pixel: {difference}/255")
        assert difference <= 2


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image_is_diffusers(pipe, diffusers_text2img, name, guidance_scale):
    arguments = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "guidance_rescale": 0.0, **SMALL}
    if guidance_scale > 1:
        arguments |= {"negative_prompt": ["in the snow"] * 2, "guidance_rescale": 0.7}
    diffusers_text2img.scheduler = make(pipe, name)
    theirs = diffusers_text2img(PROMPTS, generator=torch.Generator().manual_seed(5), **arguments).images
    pipe.scheduler = make(pipe, name)
    assert_same(pipe(PROMPTS, seed=5, **arguments).images, theirs)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_is_diffusers(pipe, diffusers_img2img, name, guidance_scale):
    diffusers_img2img.scheduler = make(pipe, name)
    arguments = {"strength": 0.7, "num_inference_steps": 8, "guidance_scale": guidance_scale}
    sources = [source_picture().resize((64, 64))] * 2
    theirs = diffusers_img2img(PROMPTS, image=sources, generator=torch.Generator().manual_seed(5), **arguments).images
    pipe.scheduler = make(pipe, name)
    ours = pipe(PROMPTS, image=sources, seed=5, guidance_rescale=0.0, **SMALL, **arguments).images
    assert_same(ours, theirs)


def test_sizes_several_pictures_and_given_latents_are_diffusers(pipe, diffusers_text2img):
    diffusers_text2img.scheduler = make(pipe, "ddim")
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 192}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    theirs = diffusers_text2img(PROMPTS, num_images_per_prompt=2, generator=generators, **arguments).images
    ours = pipe(PROMPTS, num_images_per_prompt=2, seed=[1, 2, 3, 4], guidance_rescale=0.0, **arguments).images
    assert_same(ours, theirs)
    alone = pipe(PROMPTS[1], seed=[3], guidance_rescale=0.0, **arguments).images
    assert_same(alone, ours[2:3])

    noise = torch.randn((1, 4, 8, 24), generator=torch.Generator().manual_seed(9))
    theirs = diffusers_text2img(PROMPTS[0], latents=noise, **arguments).images
    assert_same(pipe(PROMPTS[0], latents=noise, guidance_rescale=0.0, **arguments).images, theirs)


def test_the_loop_can_be_watched_stopped_and_changed(pipe):
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.0, "seed": 0}
    steps = list(pipe.denoise(PROMPTS[0], **arguments))
    assert [step.index for step in steps] == list(range(5)) and steps[0].total == 5
    drained = pipe(PROMPTS[0], output_type="latent", **arguments).images
    assert torch.equal(steps[-1].latents, drained)

    stopped = pipe.denoise(PROMPTS[0], **arguments)
    next(stopped)
    stopped.close()
    together = [pipe.denoise(PROMPTS[0], **arguments), pipe.denoise(PROMPTS[1], **arguments)]
    *_, last = zip(*together, strict=True)
    assert torch.equal(last[0].latents, drained)
    seen = []

    def restart(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else None

    zeroed = pipe(PROMPTS[0], output_type="latent", callback_on_step_end=restart, **arguments).images
    assert [step for step, _ in seen] == list(range(5)) and not zeroed.any()
    assert torch.equal(pipe(PROMPTS[0], output_type="latent", **arguments).images, drained)


def test_output_types_hold_the_same_picture(pipe):
    arguments = {"num_inference_steps": 3, "seed": 0}
    picture = np.asarray(pipe(PROMPTS[0], **arguments).images[0]) / 255
    array = pipe(PROMPTS[0], output_type="np", **arguments).images
    tensor = pipe(PROMPTS[0], output_type="pt", **arguments).images
    assert array.shape == (1, 128, 128, 3) and tensor.shape == (1, 3, 128, 128)
    np.testing.assert_allclose(array[0], picture, atol=1 / 255)
    np.testing.assert_allclose(tensor[0].permute(1, 2, 0), array[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_a_source_picture_may_have_any_mode_and_shape(pipe, mode):
    picture = source_picture().resize((90, 151))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    else:
        picture = picture.convert("L").convert(mode) if mode in ("LA", "F") else picture.convert(mode)
    out = pipe("a red balloon", image=picture, strength=0.01, num_inference_steps=100, seed=0).images[0]
    assert out.size == fit_size(90, 151, 128 * 128, 8) == (96, 160)
    expected = np.asarray(resize(source_picture().resize((90, 151)), out.size, "crop").convert("L"), float)
    assert np.corrcoef(np.asarray(out.convert("L"), float).ravel(), expected.ravel())[0, 1] > 0.5


def test_exif_rotation_is_applied_and_large_pictures_are_scaled_down(pipe):
    picture = example_picture("balloon", "on a white background", side=512)
    picture.paste((0, 0, 0), (0, 0, 512, 128))  # the top is black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = picture.rotate(180)
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 3
    arguments = {"strength": 0.01, "num_inference_steps": 100, "seed": 0}
    upright = pipe("a red balloon", image=picture, **arguments).images[0]
    assert upright.size == (128, 128)
    assert_same(pipe("a red balloon", image=turned, **arguments).images, [upright])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"prompt": []}, "`prompt` must be a string"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` has 2 entries"),
        ({"height": 100}, "`height` must be a multiple of 8, got 100; the nearest are 96 and 104"),
        ({"width": -64}, "`width` must be a whole number of at least 1, got -64"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"guidance_rescale": 1.5}, "`guidance_rescale` must be a number from 0 to 1, got 1.5"),
        ({"guidance_scale": float("nan")}, "`guidance_scale`"),
        ({"seed": -1}, "`seed`"),
        ({"seed": [1, 2]}, "one for each of the 1 pictures, got 2"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"`latents` must have the shape \(1, 4, 16, 16\)"),
        ({"output_type": "gif"}, "`output_type` must be one of pil, np, pt, latent, got 'gif'"),
        ({"image": "cat.png"}, "`image` must be a PIL picture, an array or a tensor, got str"),
        ({"image": [source_picture()] * 3}, "got 3"),
        ({"image": source_picture(), "strength": 1.2}, "`strength` must be a number from 0 to 1, got 1.2"),
        ({"image": source_picture(), "strength": 0.01, "num_inference_steps": 30}, "use at least 0.034"),
        ({"image": [source_picture(), source_picture().resize((64, 64))], "prompt": ["a", "b"]}, "different sizes"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_runs(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        if "output_type" in arguments:
            pipe("a red balloon", **arguments)
        pipe.denoise(**{"prompt": "a red balloon", **arguments})  # never iterated


def test_a_foreign_scheduler_and_wrong_settings_are_refused(pipe, model_dir, tmp_path):
    with pytest.raises(ValueError, match="DDIMScheduler.*got DDIMParallelScheduler"):
        pipe.scheduler = diffusers.DDIMParallelScheduler()
    with pytest.raises(ValueError, match="`device` must be AUTO or one of CPU.*got 'TOASTER'"):
        type(pipe).from_pretrained(model_dir, device="TOASTER")
    with pytest.raises(ValueError, match="`inference_precision` must be one of auto, f32, bf16, f16, got 'f64'"):
        type(pipe).from_pretrained(model_dir, inference_precision="f64")
    with pytest.raises(ValueError, match="does not exist"):
        type(pipe).from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_lower_precisions_give_nearly_the_same_picture(pipe, model_dir, precision):
    other = type(pipe).from_pretrained(model_dir, device="AUTO", inference_precision=precision)
    other.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "seed": 0, "output_type": "np"}
    difference = np.abs(other(PROMPTS[0], **arguments).images - pipe(PROMPTS[0], **arguments).images)
    assert difference.mean() < 0.05
