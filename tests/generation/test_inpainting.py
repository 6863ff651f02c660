"""Inpainting against diffusers' own pipeline on the same modules, and what a mask may look like."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
)
from PIL import Image, ImageDraw, ImageFilter

PROMPT = "a fox in the snow"
SETTINGS = {"num_inference_steps": 6, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def source(loaded_pipe) -> Image.Image:
    return loaded_pipe("a house in a meadow", seed=1, num_inference_steps=10).images[0]


@pytest.fixture(scope="module")
def mask(source) -> Image.Image:
    side = source.width
    drawn = Image.new("L", source.size, 0)
    ImageDraw.Draw(drawn).ellipse([side // 3, side // 4, side - 10, side - side // 4], fill=255)
    return drawn


@pytest.fixture(scope="module")
def theirs(diffusers_components) -> StableDiffusionInpaintPipeline:
    pipe = StableDiffusionInpaintPipeline(**diffusers_components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(one, other) -> float:
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max())


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_it_is_diffusers_own(pipe, theirs, source, mask, scheduler, strength):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    theirs.scheduler = scheduler.from_config(pipe.scheduler.config)
    given = SETTINGS | {"image": source, "mask_image": mask, "strength": strength}
    expected = theirs(
        PROMPT, generator=torch.Generator().manual_seed(3), height=source.height, width=source.width, **given
    )
    made = pipe(PROMPT, seed=3, **given).images[0]
    assert difference(made, expected.images[0]) <= 2
    inside = np.asarray(mask) > 0
    assert np.abs(np.asarray(made, int) - np.asarray(source, int))[inside].mean() > 20, "something was made again"


def test_several_pictures_and_a_part_cut_out_are_diffusers_too(pipe, theirs, source, mask):
    theirs.scheduler = pipe.scheduler
    given = SETTINGS | {"image": source, "mask_image": mask, "num_images_per_prompt": 2}
    size = {"height": source.height, "width": source.width}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(3), **size, **given).images
    for one, other in zip(pipe(PROMPT, seed=3, **given).images, expected, strict=True):
        assert difference(one, other) <= 2
    large = source.resize((3 * source.width, 2 * source.height))
    given = SETTINGS | {"image": large, "mask_image": mask.resize(large.size), "padding_mask_crop": 8}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(4), **size, **given).images[0]
    made = pipe(PROMPT, seed=4, **given).images[0]
    assert made.size == large.size and difference(made, expected) <= 2


def test_what_is_outside_the_mask_stays(pipe, source, mask):
    given = SETTINGS | {"image": source, "mask_image": mask, "seed": 3}
    outside = np.asarray(mask.filter(ImageFilter.MaxFilter(41))) == 0  # the decoder looks as far as its neighbours
    plain = np.asarray(pipe(PROMPT, **given).images[0], int)
    pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 127.5 - 1
    rebuilt = pipe.decode_latents(pipe.encode_image(pixels, torch.Generator().manual_seed(3)))[0]
    assert np.abs(plain - np.asarray(rebuilt, int))[outside].mean() < 1.5
    laid = np.asarray(pipe(PROMPT, overlay=True, **given).images[0])
    assert (laid == np.asarray(source))[np.asarray(mask) == 0].all(), "with the source laid over, to the pixel"
    assert (pipe(PROMPT, overlay=True, output_type="np", **given).images[0] * 255).round().astype(
        int
    ).tolist() == laid.tolist()


def test_masks_of_any_form_and_size_do_the_same(pipe, source, mask):
    array = np.asarray(mask)
    painted = Image.merge("RGBA", [Image.new("L", mask.size, 255)] * 3 + [mask])  # white strokes on nothing
    forms = [
        mask.convert("1"),
        mask.convert("P"),
        mask.convert("RGB"),
        painted,
        Image.fromarray(array.astype(np.uint16) * 257),
        array,
        array > 0,
        array / 255,
        torch.from_numpy(array / 255.0),
        torch.from_numpy(array / 255.0)[None],
        torch.from_numpy(array / 255.0)[None, None],
        [mask],
    ]
    given = SETTINGS | {"image": source, "seed": 3, "num_inference_steps": 2}
    expected = pipe(PROMPT, mask_image=mask, **given).images[0]
    for form in forms:
        assert difference(pipe(PROMPT, mask_image=form, **given).images[0], expected) == 0, form
    larger = mask.resize((mask.width * 3, mask.height * 3), Image.Resampling.NEAREST)
    far = np.asarray(mask.filter(ImageFilter.MaxFilter(61))) == 0
    scaled = np.asarray(pipe(PROMPT, mask_image=larger, **given).images[0], int)
    assert np.abs(scaled - np.asarray(expected, int))[far].max() <= 6


def test_a_soft_mask_blends_the_source_in(pipe, source, mask):
    soft = mask.filter(ImageFilter.GaussianBlur(6))
    given = SETTINGS | {"image": source, "mask_image": soft, "seed": 3}
    made, laid = (np.asarray(pipe(PROMPT, overlay=overlay, **given).images[0], float) for overlay in (False, True))
    share = np.asarray(soft, float)[..., None] / 255
    expected = share * made + (1 - share) * np.asarray(source, float)
    assert np.abs(laid - expected).max() <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": "mask"}, "`mask_image` says what of a picture to repaint: give the picture as `image`"),
        ({"strength": 0.5}, "`strength` says how much of a source picture to redo: give the picture as `image`"),
        ({"image": "source", "overlay": True}, "`overlay` goes with a mask"),
        ({"image": "source", "padding_mask_crop": 4}, "`padding_mask_crop` goes with a mask"),
        (
            {"image": "source", "mask_image": "mask", "padding_mask_crop": -1},
            "`padding_mask_crop` must be a whole number",
        ),
        ({"image": "source", "mask_image": "mask", "overlay": 1}, "`overlay` must be True or False, got 1"),
        ({"image": "source", "mask_image": ["mask", "mask"]}, "`mask_image` must be one mask or one for each of the 1"),
        (
            {"image": "source", "mask_image": "black", "padding_mask_crop": 4},
            "`padding_mask_crop` works around the white of `mask_image`, which is black all over",
        ),
        ({"image": "source", "mask_image": 3}, "`mask_image` must be a PIL picture, an array or a tensor, got int"),
    ],
)
def test_what_does_not_go_is_refused_by_name(pipe, source, mask, arguments, message):
    known = {"source": source, "mask": mask, "black": Image.new("L", source.size, 0)}

    def real(value):
        return [real(one) for one in value] if isinstance(value, list) else known.get(value, value)

    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{name: real(value) for name, value in arguments.items()})
