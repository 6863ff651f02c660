"""OpenVINO GenAI loads the very model folder, and makes the same picture from the same seed."""

import diffusers
import numpy as np
import openvino as ov
import openvino_genai

from training.scenes import example_picture

PROMPT, NEGATIVE = "a fox in the snow", "a pizza"


def test_text_to_image_is_the_same_picture(pipe, model_dir):
    theirs = openvino_genai.Text2ImagePipeline(model_dir, "CPU", INFERENCE_PRECISION_HINT="f32")
    picture = theirs.generate(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=12,
        guidance_scale=3.0,
        width=128,
        height=128,
        generator=openvino_genai.TorchGenerator(7),
    ).data[0]
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    ours = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=12, guidance_scale=3.0, guidance_rescale=0.0, seed=7
    ).images[0]
    assert np.asarray(ours).std() > 10
    difference = np.abs(np.asarray(ours, float) - picture).mean()
    print(f"mean difference of a pixel: {difference:.2f}/255")
    assert difference < 0.6  # it rounds down where we round to the nearest


def test_image_to_image_is_the_same_picture(pipe, model_dir):
    prompt = "a house in a meadow"
    source = example_picture("house", "in a meadow")
    settings = {"strength": 0.6, "num_inference_steps": 10, "guidance_scale": 3.0}
    theirs = openvino_genai.Image2ImagePipeline(model_dir, "CPU", INFERENCE_PRECISION_HINT="f32")
    picture = theirs.generate(
        prompt, ov.Tensor(np.asarray(source)[None]), generator=openvino_genai.TorchGenerator(7), **settings
    ).data[0]
    ours = pipe(prompt, image=source, guidance_rescale=0.0, seed=7, **settings).images[0]
    assert np.abs(np.asarray(ours, float) - np.asarray(source)).mean() > 1  # it did something
    difference = np.abs(np.asarray(ours, float) - picture).mean()
    print(f"mean difference of a pixel: {difference:.2f}/255")
    assert difference < 0.6


def test_inpainting_is_the_same_picture(pipe, model_dir):
    prompt = "a robot in a meadow"
    source = example_picture("house", "in a meadow")
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[24:104, 32:112] = 255
    settings = {"strength": 0.9, "num_inference_steps": 10, "guidance_scale": 3.0}
    theirs = openvino_genai.InpaintingPipeline(model_dir, "CPU", INFERENCE_PRECISION_HINT="f32")
    picture = theirs.generate(
        prompt,
        ov.Tensor(np.asarray(source)[None]),
        ov.Tensor(mask[None]),
        generator=openvino_genai.TorchGenerator(7),
        **settings,
    ).data[0]
    ours = pipe(prompt, image=source, mask_image=mask, guidance_rescale=0.0, seed=7, **settings).images[0]
    assert np.abs(np.asarray(ours, float) - np.asarray(source)).mean() > 5  # it did something
    difference = np.abs(np.asarray(ours, float) - picture).mean()
    print(f"mean difference of a pixel: {difference:.2f}/255")
    assert difference < 0.6
