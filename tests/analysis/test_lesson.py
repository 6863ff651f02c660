"""What the tutorial computes beside pictures: which word paints where, and where the time goes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ov_decidiffusion.analysis.profiling import level_times
from ov_decidiffusion.analysis.studies import closeness_by_steps, guidance_map, walk_down
from ov_decidiffusion.analysis.word_maps import word_effects, word_maps
from ov_decidiffusion.generation.presets import way_down
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.scenes import TOP, middle_left
from training.teach_a_word import draw_heart, prepare_lesson

NOTEBOOK = Path(__file__).parents[2] / "decidiffusion.ipynb"
PROMPT = "a fox in the snow"


def torch_attention(unet, sample, timestep, text) -> list[torch.Tensor]:
    """What PyTorch's layers look at, from the queries and keys that they compute."""
    heard, hooks = {}, []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: heard.update({name: output})))
    with torch.no_grad():
        unet(sample, timestep, text)
    for hook in hooks:
        hook.remove()
    found = []
    for name in [name for name in heard if name.endswith("to_q")]:
        layer = unet.get_submodule(name.removesuffix(".to_q"))
        query, key = (heard[name.replace("to_q", kind)].unflatten(2, (layer.heads, -1)) for kind in ("to_q", "to_k"))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        found.append(scores.softmax(dim=-1).mean(dim=1))
    return found


def test_attention_is_what_pytorchs_layers_look_at(pipe, diffusers_components):
    generator = torch.Generator().manual_seed(0)
    sample, timestep = torch.randn((1, 4, 16, 16), generator=generator), torch.tensor(600)
    text = pipe.encode_text(PROMPT)
    expected = torch_attention(diffusers_components["unet"], sample, timestep, text)
    found = pipe.unet.attention(sample, timestep, text)
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_maps_of_words_cover_the_picture_and_change_nothing(pipe):
    picture, words, maps = word_maps(pipe, PROMPT, seed=1, num_inference_steps=8)
    assert words == PROMPT.split() and maps.shape[0] == len(words)
    assert (maps > 0).all() and (maps.sum(axis=0) < 1).all()  # the tokens that begin and end it get the rest
    plain = pipe(PROMPT, seed=1, num_inference_steps=8).images[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(plain))


def test_a_word_left_out_is_missed_where_it_paints(pipe, diffusers_components):
    picture, words, maps = word_effects(pipe, PROMPT, seed=1)
    assert words == PROMPT.split() and maps.shape == (len(words), 16, 16)
    plain = pipe(PROMPT, seed=1).images[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(plain))
    strength = dict(zip(words, maps.mean(axis=(1, 2)), strict=True))
    assert max(strength["fox"], strength["snow"]) == max(strength.values()), strength
    fox = maps[words.index("fox")]
    assert fox[4:14, 2:14].mean() > 1.2 * np.concatenate([fox[:3].ravel(), fox[:, 14:].ravel()]).mean()
    step = next(iter(pipe.denoise(PROMPT, seed=1, num_inference_steps=1)))
    texts = pipe.encode_text([PROMPT, "a in the snow"])
    with torch.no_grad():
        with_it, without = (
            diffusers_components["unet"](step.sample, step.timestep, text[None]).sample for text in texts
        )
    _, _, first = word_effects(pipe, PROMPT, seed=1, num_inference_steps=1)
    np.testing.assert_allclose(first[1], (with_it - without).abs().mean(dim=1)[0].numpy(), atol=1e-3)


def test_every_level_takes_time_and_more_of_it_for_a_larger_picture(pipe):
    small, large = level_times(pipe, 64, 64), level_times(pipe, 384, 384)  # 36 times the positions
    assert list(small)[:4] == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    assert all(0 < small[name] < large[name] for name in small if name != "other"), (small, large)


def test_guidance_map_is_what_guidance_adds(pipe):
    step = next(iter(pipe.denoise(PROMPT, seed=2, num_inference_steps=6)))
    found = guidance_map(pipe, step)
    apart = [pipe.unet.full(step.sample, step.timestep, text[None])[0] for text in step.prompt_embeds]
    np.testing.assert_allclose(found, (apart[1] - apart[0]).abs().mean(dim=(0, 1)).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="guided"):
        guidance_map(pipe, next(iter(pipe.denoise(PROMPT, seed=2, num_inference_steps=6, guidance_scale=1.0))))


def test_more_steps_come_closer_and_the_pipeline_keeps_its_scheduler(pipe):
    before = pipe.scheduler
    found = list(closeness_by_steps(pipe, [PROMPT], (4, 16)))
    assert pipe.scheduler is before
    for name in ("DDIM", "Euler", "DPM-Solver++"):
        few, many = [decibels for other, _, decibels in found if other == name]
        assert many > few + 3, found
    assert [steps for name, steps, _ in found if name == "squeezed"] == [10, 11]


@pytest.mark.at_length
def test_the_way_down_is_the_presets_and_its_seconds_add_up(int8_pipe):
    rows = list(walk_down(int8_pipe, PROMPT, seed=1))
    for row, arguments in ((rows[0], {}), (rows[-1], {"preset": "fast"})):
        expected = int8_pipe(PROMPT, seed=1, **arguments).images[0]
        np.testing.assert_array_equal(np.asarray(row.picture), np.asarray(expected))
    assert all(0 < sum(row.models.values()) <= row.seconds for row in rows)
    assert "unet_top_level" in rows[-1].models and "unet_top_level" not in rows[0].models


def test_the_way_down_leaves_out_what_there_is_no_model_for(small_model_dir):
    pipe = OVStableDiffusionPipeline.from_pretrained(small_model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    names = [row.name for row in walk_down(pipe, PROMPT)]
    assert names == [name for name in ("exact", *way_down()) if name != "INT8" and "tiny" not in name]


@pytest.mark.at_length
def test_a_taught_word_is_drawn_where_it_was_not_before():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    [cell] = [text for text in ("".join(one["source"]) for one in cells) if "def teach(" in text]
    names = {"torch": torch}
    exec(cell[cell.index("def teach(") : cell.index("\n\n\n", cell.index("def teach("))], names)  # the tutorial's loop
    lesson = prepare_lesson("heart")
    before, after = (picture for _, picture in names["teach"](lesson, 60, "a heart on a white background", every=60))
    wanted = draw_heart(80)
    red = np.asarray(wanted)[..., 3] > 128

    def share(picture):
        pixels = np.asarray(picture, int)
        hot = (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 130)
        left, top = middle_left(""), TOP[""][0]
        return (hot[top : top + 80, left : left + 80] == red).mean()

    print(f"like a heart: {share(before):.2f} before, {share(after):.2f} after")
    assert share(after) > share(before)
