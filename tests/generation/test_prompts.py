"""Words weighed in brackets, and prompts of any length."""

import json
import logging
import shutil
import time

import numpy as np
import pytest
import torch

from ov_decidiffusion.generation.prompt_weights import parse_weights
from ov_decidiffusion.generation.text import same_length
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

LONG = ", ".join(["a fox in the snow"] * 15)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # The examples of AUTOMATIC1111's wiki, and what they are said to mean there.
        ("a (word)", [("a ", 1), ("word", 1.1)]),
        ("a ((word))", [("a ", 1), ("word", 1.21)]),
        ("a [word]", [("a ", 1), ("word", 1 / 1.1)]),
        ("a (word:1.5)", [("a ", 1), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1), ("word", 0.25)]),
        (r"a \(word\)", [("a (word)", 1)]),
        ("((a:1.2) b)", [("a", 1.32), (" b", 1.1)]),
        ("an (unclosed one", [("an ", 1), ("unclosed one", 1.1)]),
        ("a stray ) and ]", [("a stray ) and ]", 1)]),
        ("at 16:9 :)", [("at 16:9 :)", 1)]),
        ("one BREAK two", [("one ", 1), ("BREAK", 1), (" two", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("", [("", 1)]),
    ],
)
def test_brackets_are_read_as_people_write_them(prompt, expected):
    found = [(piece.text, pytest.approx(piece.weight)) for piece in parse_weights(prompt)]
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a (star:11)"}, "`prompt` weighs 'star' by 11, and 0 to 10 is allowed"),
        ({"prompt": "a fox", "negative_prompt": "(a:-1)"}, "`negative_prompt` weighs 'a' by -1"),
        ({"prompt": "(a " * 1000}, "`prompt` opens more than 100 brackets"),
        ({"prompt": "a fox", "prompt_syntax": "no"}, "`prompt_syntax` must be True or False, got 'no'"),
    ],
)
def test_wrong_weights_are_refused_by_name(pipe, arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pipe(**arguments)


def torch_states(diffusers_components, rows) -> torch.Tensor:
    with torch.no_grad():
        return diffusers_components["text_encoder"](torch.tensor(rows)).last_hidden_state


def rows_of(tokenizer, chunks: list[list[int]]) -> list[list[int]]:
    rows = [[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] for chunk in chunks]
    return [row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows]


@pytest.mark.parametrize("prompt", ["(a:" + "1" * 90_000, ":" * 90_000, "(a:" + " " * 90_000, "[" * 99 + "x " * 40_000])
def test_a_long_odd_prompt_takes_no_time(prompt):
    begin = time.thread_time()  # of the processor: others may have it meanwhile
    parse_weights(prompt)
    assert time.thread_time() - begin < 3


def test_a_folder_of_another_tool_has_its_tokens_by_way_of_transformers(pipe, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "theirs", ignore=shutil.ignore_patterns("*report.json"))
    prompts = ["a fox", "", "Crème <|endoftext|> brûlée! 'll 1234 日本 🦊", LONG]
    for name in ("as written", "theirs"):
        if name == "theirs":
            (folder / "tokenizer" / "prompt_tokenizer.json").unlink()
        other = OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")
        np.testing.assert_array_equal(other.token_ids(prompts), pipe.token_ids(prompts))
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "np"}
    np.testing.assert_array_equal(pipe.token_ids(prompts), pipe.tokenizer(prompts, **options).input_ids)


@pytest.mark.parametrize("content", ["{}", "[]", '{"version": "1.0"}', None])
def test_a_damaged_tokenizer_is_told_by_its_file(model_dir, tmp_path, content):
    folder = shutil.copytree(model_dir, tmp_path / "damaged", ignore=shutil.ignore_patterns("*report.json"))
    file = folder / "tokenizer" / "prompt_tokenizer.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"padding": None}) if content is None else content)
    with pytest.raises(ValueError, match="prompt_tokenizer.json (holds no tokenizer|lacks the tokens)"):
        OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")


def test_plain_prompts_are_what_they_were(pipe, diffusers_components):
    plain, tokenizer = "a fox in the snow", diffusers_components["tokenizer"]
    ids = tokenizer([plain], padding="max_length", max_length=77).input_ids
    np.testing.assert_array_equal(pipe.token_ids([plain]), ids)
    states = pipe.encode_text(plain)
    np.testing.assert_array_equal(states, pipe.models.run("text_encoder", {"input_ids": np.array(ids)})[0])
    np.testing.assert_array_equal(states, pipe.encode_text("a (fox:1) in the snow"))
    literal = pipe.encode_text(r"a \(red\) star")
    np.testing.assert_array_equal(literal, pipe.encode_text("a (red) star", prompt_syntax=False))


def test_weights_move_states_away_from_the_empty_prompts(pipe):
    plain, empty = pipe.encode_text("a star")[0], pipe.encode_text("")[0]
    weighed = pipe.encode_text("a (star:1.5)")[0]
    np.testing.assert_array_equal(weighed[:2], plain[:2])
    np.testing.assert_allclose(weighed[2], empty[2] + 1.5 * (plain[2] - empty[2]), atol=1e-5)
    np.testing.assert_array_equal(weighed[3:], plain[3:])
    np.testing.assert_allclose(pipe.encode_text("(a star:0)")[0][1:3], empty[1:3], atol=1e-6)


def test_long_prompts_are_chunks_of_75_tokens(pipe, diffusers_components, caplog):
    tokenizer = diffusers_components["tokenizer"]
    tokens = tokenizer([LONG], add_special_tokens=False).input_ids[0]
    assert len(tokens) > 75
    chunks = [tokens[i : i + 75] for i in range(0, len(tokens), 75)]
    expected = torch_states(diffusers_components, rows_of(tokenizer, chunks)).flatten(0, 1)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        states = pipe.encode_text(LONG)
    assert states.shape == (1, 77 * len(chunks), expected.shape[-1]) and not caplog.records
    np.testing.assert_allclose(states[0], expected, rtol=1e-4, atol=2e-4)
    first, second = (tokenizer([text], add_special_tokens=False).input_ids[0] for text in ("a fox", "a whale"))
    expected = torch_states(diffusers_components, rows_of(tokenizer, [first, second])).flatten(0, 1)
    np.testing.assert_allclose(pipe.encode_text("a fox BREAK a whale")[0], expected, atol=2e-4)


def test_what_is_too_long_even_so_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        states = pipe.encode_text(", ".join([LONG] * 40))
    assert states.shape[1] == 20 * 77
    assert "holds at most 1500 tokens here" in caplog.text and len(caplog.text) < 1000


def test_a_long_prompts_picture_is_diffusers(pipe, diffusers_text2img, diffusers_components):
    """diffusers runs prompt and negative prompt of different lengths only padded; repeated whole they mean the same."""
    tokenizer = diffusers_components["tokenizer"]
    tokens = tokenizer([LONG], add_special_tokens=False).input_ids[0]
    wanted = torch_states(
        diffusers_components, rows_of(tokenizer, [tokens[i : i + 75] for i in range(0, len(tokens), 75)])
    ).flatten(0, 1)
    unwanted = torch_states(diffusers_components, rows_of(tokenizer, [[]])).flatten(0, 1)
    settings = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"}
    diffusers_text2img.scheduler = pipe.scheduler
    expected = diffusers_text2img(
        prompt_embeds=wanted[None],
        negative_prompt_embeds=unwanted.repeat(len(wanted) // 77, 1)[None],
        generator=torch.Generator().manual_seed(5),
        **settings,
    ).images
    assert np.abs(pipe(LONG, seed=5, **settings).images - expected).max() <= 2 / 255


def test_a_prompt_beside_a_longer_one_makes_its_own_picture(pipe):
    settings = {"num_inference_steps": 6, "output_type": "np"}
    alone = pipe("a whale under water", seed=[7], **settings).images[0]
    beside = pipe(["a whale under water", LONG], seed=[7, 8], **settings).images[0]
    assert np.abs(alone - beside).max() <= 2 / 255


def test_lengths_that_cannot_go_together_are_refused():
    states = [torch.zeros(77 * 7, 4), torch.zeros(77 * 11, 4)]
    with pytest.raises(ValueError, match="cannot be run together"):
        same_length(states)
    assert same_length([torch.zeros(77, 4), torch.zeros(154, 4)]).shape == (2, 154, 4)


def test_a_long_prompt_goes_with_caching_and_short_ones_after_it_are_what_they_were(model_dir):
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    settings = {"seed": 3, "num_inference_steps": 6, "cache_interval": 2, "output_type": "np"}
    short = pipe("a fox", **settings).images
    long = pipe(LONG, **settings).images
    assert np.isfinite(long).all() and np.abs(long - short).max() > 10 / 255
    assert np.abs(pipe("a fox", **settings).images - short).max() <= 1 / 255
