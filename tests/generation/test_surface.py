"""Whoever knows diffusers is at home: its attributes, its methods, its arguments, and the lines of the model card."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.model_folder.integrity import verify_model_dir
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.schedulers.registry import make_solver

PROMPT = "a fox in the snow"
FEW = {"num_inference_steps": 2, "seed": 5}


def test_the_model_cards_own_lines(tmp_path, monkeypatch, small_checkpoint):
    """As the card of Deci/DeciDiffusion-v1-0 has them, with the folder in place of the hub's id."""
    monkeypatch.chdir(tmp_path)
    checkpoint = str(small_checkpoint)
    with pytest.warns(UserWarning, match="`custom_pipeline` changes nothing: no code of a checkpoint is run here"):
        pipeline = OVStableDiffusionPipeline.from_pretrained(
            checkpoint, custom_pipeline=checkpoint, torch_dtype=torch.float16
        )
    with pytest.raises(NotImplementedError, match="is loaded already: leave this line out"):
        pipeline.unet = pipeline.unet.from_pretrained(checkpoint, subfolder="flexible_unet", torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="`device` must be AUTO or one of CPU.* on this machine, got 'cuda'"):
        pipeline = pipeline.to("cuda")
    pipeline = pipeline.to("cpu")
    img = pipeline(prompt=["A photo of a fox"], negative_prompt=["rain"], num_inference_steps=2).images[0]
    assert img.size == pipeline.default_size
    pipeline.close()


def test_attributes_are_diffusers(pipe, diffusers_text2img):
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    assert pipe.vae_scale_factor == diffusers_text2img.vae_scale_factor
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).config, getattr(diffusers_text2img, part).config
        assert isinstance(ours, FrozenDict)
        for name in ("sample_size", "in_channels", "block_out_channels", "scaling_factor", "hidden_size", "vocab_size"):
            if name in ours:
                wanted = getattr(theirs, name)
                assert ours[name] == (list(wanted) if isinstance(wanted, tuple) else wanted), (part, name)
    assert pipe.unet.config.in_channels == 4
    assert set(pipe.components) == set(diffusers_text2img.components) - {"image_encoder"}
    assert pipe.config._class_name == "OVStableDiffusionPipeline"
    assert pipe._callback_tensor_inputs == diffusers_text2img._callback_tensor_inputs
    mask = np.linspace(0, 1, 128 * 128, dtype=np.float32).reshape(128, 128)
    assert set(np.unique(pipe.mask_processor.preprocess(torch.from_numpy(mask)))) == {0.0, 1.0}
    assert list(pipe.progress_bar([1, 2])) == [1, 2]


@pytest.mark.parametrize(
    "name", ["vae", "unet", "text_encoder", "tokenizer", "feature_extractor", "image_processor", "vae_scale_factor"]
)
def test_what_cannot_be_assigned_is_refused(pipe, name):
    with pytest.raises(AttributeError, match=f"`{name}` of an OpenVINO pipeline cannot be assigned: "):
        setattr(pipe, name, None)


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("cross_attention_kwargs", None, {"scale": 0.5}),
        ("ip_adapter_image", None, "picture.png"),
        ("ip_adapter_image_embeds", None, [torch.zeros(1)]),
        ("callback", None, print),
        ("callback_steps", 1, 5),
        ("clip_skip", 0, 2),
        ("clip_skip", None, 1),
        ("masked_image_latents", None, torch.zeros(1)),
    ],
)
def test_arguments_that_ask_for_nothing_are_taken_and_others_refused_by_name(pipe, name, neutral, asking):
    assert pipe(PROMPT, **FEW, **{name: neutral}).images
    with pytest.raises(ValueError, match=f"`{name}` is not offered here, got .*: "):
        pipe(PROMPT, **FEW, **{name: asking})


def test_after_a_call_its_values_are_still_there(pipe, diffusers_text2img):
    def stronger(pipe, index, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    found = []
    for one in (pipe, diffusers_text2img):
        made = one(PROMPT, num_inference_steps=3, guidance_scale=2.0, callback_on_step_end=stronger)
        found.append((one.guidance_scale, one.num_timesteps, made.nsfw_content_detected))
    assert found[0] == found[1] == (5.0, 3, None)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_safety_checker_is_asked_for_every_picture(pipe, output_type):
    seen = []

    def checker(images, clip_input):
        seen.append(images.shape)
        images[0] = 0
        return images, [True, False]

    pipe.safety_checker = checker
    try:
        made = pipe([PROMPT] * 2, output_type=output_type, **FEW)
        tuple_made, flags = pipe([PROMPT] * 2, output_type=output_type, return_dict=False, **FEW)
    finally:
        pipe.safety_checker = None
    assert seen == [(2, 128, 128, 3)] * 2 and made.nsfw_content_detected == flags == [True, False]
    assert np.asarray(made.images[0]).max() == 0 and np.asarray(made.images[1]).max() > 0
    with pytest.raises(ValueError, match="`safety_checker` must be None or a callable, got 5"):
        pipe.safety_checker = 5


def test_encode_prompt_gives_diffusers_pair(pipe, diffusers_text2img):
    with torch.no_grad():
        theirs = diffusers_text2img.encode_prompt(PROMPT, "cpu", 2, True, negative_prompt="rain")
    ours = pipe.encode_prompt(PROMPT, "cpu", 2, True, negative_prompt="rain")
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    wanted, against = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    assert against is None and wanted.shape == (1, 77, ours[0].shape[2])
    with pytest.warns(DeprecationWarning, match="is now `encode_text`"):
        np.testing.assert_array_equal(pipe.encode_prompt(PROMPT), pipe.encode_text(PROMPT))
    given = pipe(prompt_embeds=ours[0][:1], negative_prompt_embeds=ours[1][:1], output_type="np", **FEW).images
    words = pipe(PROMPT, negative_prompt="rain", output_type="np", **FEW).images
    assert np.abs(given - words).max() <= 1 / 255


def test_the_models_take_and_give_what_diffusers_own_do(pipe, diffusers_text2img):
    vae, ids = (
        diffusers_text2img.vae,
        torch.tensor(pipe.tokenizer(PROMPT, padding="max_length", max_length=77).input_ids),
    )
    pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 96).reshape(2, 3, 64, 96)
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
        ours = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
        np.testing.assert_allclose(
            pipe.vae.encode(pixels, return_dict=False)[0].mode(), vae.encode(pixels)[0].mode(), atol=1e-3
        )
        wanted = vae.decode(theirs, return_dict=False)[0]
        states = diffusers_text2img.text_encoder(ids[None])
    np.testing.assert_allclose(pipe.vae.decode(theirs).sample, wanted, atol=1e-3)
    np.testing.assert_allclose(pipe.text_encoder(ids[None])[0], states[0], atol=1e-3)
    with pytest.raises(ValueError, match="gives its last layer"):
        pipe.text_encoder(ids[None], output_hidden_states=True)
    try:
        pipe.vae.enable_tiling()
        large = torch.nn.functional.interpolate(theirs, scale_factor=4)
        tiled = pipe.vae.decode(large, return_dict=False)[0]
    finally:
        pipe.vae.disable_tiling()
    assert (tiled - pipe.vae.decode(large).sample).abs().max() > 0  # pieces are blended where they overlap


def test_latents_set_the_size(pipe):
    latents = torch.randn((1, 4, 24, 12), generator=torch.Generator().manual_seed(0))
    assert pipe(PROMPT, latents=latents, num_inference_steps=1).images[0].size == (96, 192)
    with pytest.raises(ValueError, match="`latents`"):
        pipe(PROMPT, latents=latents, height=128, width=128, num_inference_steps=1)


def test_another_default_size_holds_from_then_on(pipe):
    before = pipe.default_size
    try:
        pipe.default_size = (96, 64)
        assert pipe.default_size == pipe(PROMPT, num_inference_steps=1).images[0].size == (96, 64)
        wrongs = {(100, 64): "`width` must be a multiple of 8, got 100", 128: "must be .width, height., got 128"}
        for wrong, said in wrongs.items():
            with pytest.raises(ValueError, match=said):
                pipe.default_size = wrong
    finally:
        pipe.default_size = before


def test_saved_and_taken_over(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    verify_model_dir(tmp_path / "copy")
    with pytest.raises(ValueError, match="`save_directory` .*copy exists"):
        pipe.save_pretrained(tmp_path / "copy")
    assert OVStableDiffusionPipeline.from_pipe(pipe) is pipe
    with pytest.raises(TypeError, match="Load an OpenVINO pipeline with from_pretrained; int is none"):
        OVStableDiffusionPipeline.from_pipe(5)
    scheduler = make_solver("euler", pipe.scheduler)
    copy = OVStableDiffusionPipeline.from_pretrained(
        tmp_path / "copy", torch_dtype=torch.float32, scheduler=scheduler, safety_checker=None, variant="fp16"
    )
    assert isinstance(copy.scheduler, EulerDiscreteScheduler) and copy.precision == "f32"
    expected = pipe(PROMPT, solver="euler", output_type="np", **FEW).images
    moved = copy.to("AUTO")
    assert moved is copy and copy.models.device == "AUTO"
    assert isinstance(copy.scheduler, EulerDiscreteScheduler)
    copy.to(torch.device("cpu"))
    assert np.abs(copy(PROMPT, output_type="np", **FEW).images - expected).max() < 0.1
    copy.close()


@pytest.mark.parametrize("name", ["enable_attention_slicing", "enable_vae_slicing", "fuse_qkv_projections"])
def test_what_openvino_does_anyway_is_taken_with_one_warning(pipe, name, recwarn, monkeypatch):
    monkeypatch.setattr("ov_decidiffusion.generation.surface._said", set())
    getattr(pipe, name)()
    getattr(pipe, name)()
    assert [str(one.message).startswith(f"`{name}` changes nothing: ") for one in recwarn] == [True]
    pipe.maybe_free_model_hooks()


@pytest.mark.parametrize("name", ["load_lora_weights", "load_ip_adapter", "load_textual_inversion", "enable_freeu"])
def test_what_there_is_not_is_refused_with_the_reason(pipe, name):
    with pytest.raises(NotImplementedError, match="convert|layers"):
        getattr(pipe, name)("anything")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"variant": "ema"}, "`variant` must be None or 'fp16'"),
        ({"use_safetensors": False}, "allow_pickles=True"),
        ({"compile": False}, "models compile in the background"),
        ({"torch_dtype": torch.int8}, "`torch_dtype` must be torch.float32, float16 or bfloat16"),
    ],
)
def test_what_loading_cannot_do_is_refused_with_what_to_do(wrong, said):
    with pytest.raises(ValueError, match=said):
        OVStableDiffusionPipeline.from_pretrained(EMBEDDED_CHECKPOINT, **wrong)


def test_the_cache_alone_is_asked_where_that_was_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="`local_files_only` is set and it is not in the cache"):
        OVStableDiffusionPipeline.from_pretrained("somebody/something", local_files_only=True)


@pytest.mark.parametrize(("prompts", "times"), [(1, 1), (1, 2), (2, 1)])
def test_latents_are_a_source_as_in_diffusers(pipe, diffusers_img2img, prompts, times):
    latents = pipe([PROMPT] * prompts, output_type="latent", **FEW).images
    asked = {"image": latents, "strength": 0.5, "num_inference_steps": 4, "num_images_per_prompt": times}
    asked |= {"guidance_scale": 2.0}
    seeded = torch.Generator().manual_seed(3)
    diffusers_img2img.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    ours = pipe([PROMPT] * prompts, output_type="np", generator=seeded, guidance_rescale=0.0, **asked).images
    theirs = diffusers_img2img(
        [PROMPT] * prompts, output_type="np", generator=torch.Generator().manual_seed(3), **asked
    ).images
    assert np.abs(ours - theirs).max() <= 1 / 255
    with pytest.raises(ValueError, match="`image` holds latents, which set the size"):
        pipe([PROMPT] * prompts, width=64, height=64, **asked)
    with pytest.raises(ValueError, match="`image` must be pictures where a `mask_image` is given, got latents"):
        pipe([PROMPT] * prompts, mask_image=Image.new("L", (128, 128)), **asked)
    with pytest.raises(ValueError, match="`image` must hold latents of one picture or of each of 3, got 2"):
        pipe([PROMPT] * 3, **asked | {"image": torch.cat([latents, latents])[:2]})


def test_the_hubs_folder_is_no_longer_openvinos(model_dir, tmp_path):
    with pytest.warns(DeprecationWarning, match="`cache_dir` is now `ov_cache_dir`"):
        OVStableDiffusionPipeline.from_pretrained(model_dir, cache_dir=tmp_path / "cache").close()
    assert list((tmp_path / "cache").glob("*.blob"))
