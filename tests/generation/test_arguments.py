"""Whatever a call is given: pictures of the promised size and number, or a refusal that names the argument."""

import locale
import math
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.model_folder.integrity import verify_model_dir
from ov_decidiffusion.quantize import quantize_models
from ov_decidiffusion.runtime import models
from ov_decidiffusion.runtime.devices import devices_of, find_device
from ov_decidiffusion.runtime.precision import runs_on_cpu
from ov_decidiffusion.runtime.processes import KeptLocale
from training.models import TEXT_WIDTH

PROMPT = "a fox in the snow"
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [object(), np.float32(3), np.int64(7), np.zeros(3), torch.zeros(2), torch.Generator(), {1, 2}, math, math.nan]
    ),
)
NAMES = (
    ("negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "height", "width", "generator")
    + ("num_images_per_prompt", "seed", "latents", "preset", "solver", "quantized", "cache_interval", "cache_power")
    + ("guidance_interval", "guidance_cache_interval", "decoder", "image", "strength")
)
ARGUMENTS = st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3)


def spoil_in_place(pipe, index, timestep, tensors) -> None:
    tensors["latents"].fill_(math.nan)


LENGTH = int(os.environ.get("FUZZ_LENGTH", "1"))  # `make soak` draws ten times the examples


@settings(max_examples=1000 * LENGTH, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arguments=st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3), prompt=st.one_of(st.just("a"), ANYTHING)
)
def test_any_arguments_are_taken_or_refused_by_name(loaded_pipe, arguments, prompt):
    try:
        loaded_pipe.denoise(prompt, **arguments)  # never iterated: nothing runs
    except ValueError as error:
        words = str(error)
        assert any(f"`{name}" in words for name in ("prompt", *NAMES)) or "INT8" in words, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 42}, "`generator` must be a torch.Generator.*got 42; whole numbers are `seed`s"),
        ({"generator": [1]}, "`generator` must be"),
        ({"generator": [None]}, "`generator` must be"),
        ({"sigmas": np.linspace(100, 0.1, 10**6)}, "`sigmas` must be a list of at most 1000 falling numbers"),
        ({"sigmas": [5.0], "solver": "euler"}, "`sigmas` of .* no step to run: give more"),
        ({"prompt": "fox " * 10**5}, "`prompt` must have at most 100000 characters, got 400000"),
        ({"generator": np.random.default_rng(0)}, "`generator` must be"),
        ({"latents": [[1.0]]}, "`latents` must be a tensor or an array"),
        ({"latents": np.zeros((2, 4, 16, 16))}, r"`latents` must have the shape \(1, 4, 16, 16\)"),
        ({"latents": torch.full((1, 4, 16, 16), math.nan)}, "`latents` must hold numbers only"),
        ({"preset": []}, r"`preset` must be one of exact, balanced, fast, got \[\]"),
        ({"solver": []}, "`solver` must be one of"),
        ({"quantized": 1}, "`quantized` must be True, False or some of"),
        ({"seed": 2**64}, "`seed` must be a whole number from 0 to 18446744073709551615"),
        ({"guidance_scale": math.inf}, "`guidance_scale` must be a number from 0 to 1000, got inf"),
        ({"guidance_scale": 1e38}, "`guidance_scale`"),
        ({"guidance_interval": (0, 10**400)}, r"`guidance_interval\[1\]` must be a number"),
        ({"num_images_per_prompt": 10**400}, "`num_images_per_prompt` must be a whole number from 1 to 1000000000"),
        ({"height": 64 * 10**400}, "`height` must be a whole number"),
        ({"height": 10**400, "image": Image.new("RGB", (8, 8))}, "`height` must be a whole number"),
        ({"cache_interval": 10**5000}, "`cache_interval` must be a whole number.*got a int"),
        ({"prompt": "a \ud800 b"}, "`prompt` must be text.*position 2"),
        ({"num_inference_steps": 10**6}, "`num_inference_steps` must be a whole number from 1 to 1000"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be a function"),
        ({"callback_on_step_end": lambda *_: 7}, "`callback_on_step_end` must return a dictionary or None, got 7"),
        (
            {"callback_on_step_end": lambda *_: {"latents": torch.zeros(2, 4, 16, 16)}},
            r"`latents` must have the shape \(1, 4, 16, 16\), got \(2, 4, 16, 16\)",
        ),
        ({"callback_on_step_end": spoil_in_place}, "`latents` must hold numbers only"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": torch.zeros(3, 77, TEXT_WIDTH)}}, "of 1 or 2 prompts"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": None}}, "`prompt_embeds` must be a tensor"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.full((1, 4, 16, 16), math.nan)}}, "`latents` must hold"),
    ],
)  # fmt: skip
def test_what_used_to_end_in_other_errors_is_refused_and_harms_no_later_call(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, "num_inference_steps": 2} | arguments)
    assert pipe(PROMPT, num_inference_steps=1, seed=0).images[0].size == (128, 128)


def test_more_than_the_prompt_without_a_name_is_refused_in_a_sentence(pipe):
    for others in ((64, 64), (Image.new("RGB", (8, 8)),)):
        with pytest.raises(TypeError, match="Only `prompt` may be given without its name"):
            pipe(PROMPT, *others)


def test_numpy_numbers_and_arrays_are_as_good_as_pythons_and_torchs(pipe):
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    plain = pipe(PROMPT, latents=noise, guidance_scale=7, num_inference_steps=3, output_type="np").images
    numpys = pipe(
        PROMPT, latents=noise.numpy(), guidance_scale=np.int64(7), num_inference_steps=np.int32(3), output_type="np"
    ).images
    np.testing.assert_array_equal(plain, numpys)


def test_public_methods_refuse_by_name_too(pipe):
    latents = pipe(PROMPT, num_inference_steps=1, seed=np.array(3), output_type="latent").images
    assert pipe(PROMPT, num_inference_steps=1, seed=3, quantized=np.False_, output_type="latent").images.equal(latents)
    assert np.array_equal(pipe.decode_latents(latents.numpy(), "np"), pipe.decode_latents(latents, "np"))
    assert pipe.token_ids(PROMPT).shape == (1, 77)
    picture = torch.zeros(1, 3, 128, 128)
    for call, name in (
        (lambda: pipe.decode_latents(None), "latents"),
        (lambda: pipe.decode_latents(latents[:, :3]), "latents"),
        (lambda: pipe.decode_latents(latents.fill_(math.nan)), "latents"),
        (lambda: pipe.latent_preview(latents[0]), "latents"),
        (lambda: pipe.encode_image(Image.new("RGB", (128, 128))), "pixels"),
        (lambda: pipe.encode_image(picture[..., :127]), "pixels"),
        (lambda: pipe.encode_image(picture, generator=42), "generator"),
        (lambda: pipe.token_ids([1]), "prompts"),
        (lambda: pipe.finish(42), "step"),
        (lambda: pipe.set_progress_bar_config(foo=1), "foo"),
        (lambda: pipe.encode_text("a", prompt_syntax=[]), "prompt_syntax"),
        (lambda: convert_checkpoint(None), "checkpoint"),
        (lambda: convert_checkpoint("~nobody-at-all/x"), "checkpoint"),
        (lambda: convert_checkpoint(EMBEDDED_CHECKPOINT, 5), "model_dir"),
        (lambda: convert_checkpoint(EMBEDDED_CHECKPOINT, allow_pickles="no"), "allow_pickles"),
        (lambda: convert_checkpoint(EMBEDDED_CHECKPOINT, verify="no"), "verify"),
        (lambda: find_checkpoint(42), "checkpoint"),
        (lambda: verify_model_dir(None), "folder"),
        (lambda: quantize_models(None), "model_dir"),
    ):
        with pytest.raises(ValueError, match=f"[`']{name}"):
            call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "TOASTER"}, "`device` must be AUTO or one of CPU"),
        ({"inference_precision": "fp16"}, "`inference_precision` must be one of auto, f32"),
        ({"threads": 0}, "`threads` must be a whole number from 1"),
        ({"ov_cache_dir": 5}, "`ov_cache_dir` must be a folder, got 5"),
        ({"ov_cache_dir": ""}, "`ov_cache_dir` must be a folder, got ''"),
        ({"ov_cache_dir": __file__}, "`ov_cache_dir` .*test_arguments.py cannot be made a folder"),
        ({"ov_config": 3}, "`ov_config` must be a dictionary"),
        ({"ov_config": {"INFERENCE_NUM_THREAD": 4}}, "`ov_config` .* is not what CPU takes: .*INFERENCE_NUM_THREAD"),
    ],
)
def test_what_models_cannot_be_loaded_with_is_refused_before_a_checkpoint_is_converted(
    pipe, small_checkpoint, tmp_path, monkeypatch, wrong, message
):
    monkeypatch.chdir(tmp_path)
    for model in (small_checkpoint, pipe.models.folder):
        with pytest.raises(ValueError, match=message):
            type(pipe).from_pretrained(model, **wrong)
    assert not list(tmp_path.iterdir())


def own_locale() -> str:
    return locale.setlocale(locale.LC_ALL)


def test_the_locale_is_put_back_by_the_last_of_those_that_compile():
    kept, before = KeptLocale(), own_locale()
    try:
        with kept.kept():
            with kept.kept():
                locale.setlocale(locale.LC_ALL, "C")
            assert own_locale() == "C"
        assert own_locale() == before
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_a_checkpoints_folder_is_converted_once_and_found_again(pipe, small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, before = (
        {"inference_precision": "f32", "ov_cache_dir": "cache", "ov_config": {"NUM_STREAMS": 1}},
        own_locale(),
    )
    first, again = (type(pipe).from_pretrained(small_checkpoint, **options) for _ in range(2))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.models.folder.name]
    assert list((tmp_path / "cache").glob("*.blob")) and own_locale() == before
    made = [one(PROMPT, num_inference_steps=2, seed=1, output_type="np").images for one in (first, again)]
    np.testing.assert_array_equal(*made)


def test_what_needs_too_much_memory_is_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", "0.1")
    for call in (
        lambda: pipe.denoise(PROMPT, width=2048, height=2048),
        lambda: pipe.decode_latents(torch.zeros(1, 4, 256, 256)),
        lambda: pipe.encode_image(torch.zeros(1, 3, 2048, 2048)),
    ):
        with pytest.raises(ValueError, match=r"need about \d+\.\d GB of memory, and 0\.1 GB are free"):
            call()
    for odd in ("nan", "much"):
        monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", odd)
        with pytest.raises(ValueError, match=f"must be a number of gigabytes, got '{odd}'"):
            pipe.denoise(PROMPT)
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", "inf")
    pipe.denoise(PROMPT)


def test_a_batch_that_memory_has_no_room_for_is_computed_in_parts(pipe, monkeypatch):
    rows_run, run = [], models._run

    def counting_rows(model, inputs, outputs):
        if "sample" in inputs:
            rows_run.append(len(inputs["sample"]))
        return run(model, inputs, outputs)

    monkeypatch.setattr(models, "_run", counting_rows)
    asked = {"prompt": [PROMPT, "a red ball"], "num_images_per_prompt": 3, "seed": list(range(6)), "cache_interval": 2}
    asked |= {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 2.0}
    whole = pipe(**asked).images
    assert set(rows_run) == {12}
    rows_run.clear()
    size = pipe.default_size
    decoder = pipe.models.estimated_memory(1, size, size)
    assert decoder < pipe.models.estimated_memory(12, size, size)
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", str(1.01 * decoder / 1e9))
    np.testing.assert_allclose(pipe(**asked).images, whole, atol=1 / 255)
    assert set(rows_run) == {6}
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", str(0.99 * decoder / 1e9))
    with pytest.raises(ValueError, match="make smaller ones"):
        pipe(**asked)


def test_tiles_need_the_memory_of_one(pipe, monkeypatch):
    whole = pipe.models.estimated_memory(2, (1280, 1280), (1280, 1280))
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", str(0.9 * whole / 1e9))
    with pytest.raises(ValueError, match="GB of memory"):
        pipe.denoise(PROMPT, width=1280, height=1280)
    pipe.enable_vae_tiling()
    try:
        pipe.denoise(PROMPT, width=1280, height=1280)
    finally:
        pipe.disable_vae_tiling()


def test_a_failed_run_leaves_models_that_work(pipe):
    with pytest.raises(ValueError, match="running unet failed"):
        pipe.unet.full(torch.zeros(1, 3, 16, 16), torch.tensor(1), torch.zeros(1, 77, TEXT_WIDTH))
    assert np.asarray(pipe(PROMPT, num_inference_steps=4, seed=0).images[0]).std() > 5


def test_devices_by_any_name_that_people_use(pipe):
    import openvino as ov

    core = ov.Core()
    assert {find_device(core, name) for name in ("cpu", "CPU", "CPU.0", torch.device("cpu"))} == {"CPU"}
    assert find_device(core, "auto:cpu") == "AUTO:CPU"
    for several in ("AUTO", "MULTI:CPU", "HETERO:CPU"):
        assert devices_of(core, find_device(core, several)) == ["CPU"] and runs_on_cpu(core, several)
    assert devices_of(SimpleNamespace(available_devices=["CPU", "GPU"]), "AUTO:-GPU") == ["CPU"]
    for wrong in ("MULTI", "AUTO:TOASTER,CPU", "AUTO:-CPU", "MULTI:-CPU", None, "", "GPU.7", 3):
        with pytest.raises(ValueError, match="`device` must be AUTO or one of CPU"):
            find_device(core, wrong)


def test_prompts_of_all_lengths_from_many_threads_are_encoded_as_alone(pipe):
    prompts = [" ".join(["a red fox"] * (1 + i % 40)) for i in range(160)]
    expected = pipe.token_ids(prompts)
    assert expected.shape == (160, 77)
    wrong = []

    def encode(thread: int) -> None:
        for i in range(thread, 1600, 8):
            found = pipe.token_ids([prompts[i % 160]])
            if not np.array_equal(found[0], expected[i % 160]):
                wrong.append(i)

    threads = [threading.Thread(target=encode, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_token_ids_are_the_tokenizers_own(pipe):
    prompts = ["", "a fox", "red " * 200]
    own = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(pipe.token_ids(prompts), own)
