"""What the tutorial computes beside pictures: which word paints where, and where the time goes."""

import time

import numpy as np
import torch

from ov_decidiffusion.profiling import level_times
from ov_decidiffusion.word_maps import word_maps

PROMPT = "a large red star on a blue background"


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
    text = pipe.encode_prompt(PROMPT)
    expected = torch_attention(diffusers_components["unet"], sample, timestep, text)
    found = pipe.denoiser.attention(sample, timestep, text)
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_maps_of_words_cover_the_picture_and_change_nothing(pipe):
    picture, words, maps = word_maps(pipe, PROMPT, seed=1, num_inference_steps=8)
    assert words == PROMPT.split() and maps.shape[0] == len(words)
    assert (maps > 0).all() and (maps.sum(axis=0) < 1).all()  # the tokens that begin and end it get the rest
    plain = pipe(PROMPT, seed=1, num_inference_steps=8).images[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(plain))


def test_the_times_of_levels_add_up_to_a_run(pipe):
    times = level_times(pipe)
    assert list(times)[:4] == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    sample, text = torch.randn((1, 4, 16, 16)), pipe.encode_prompt(PROMPT)
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        pipe.denoiser.whole(sample, torch.tensor(500), text)
        runs.append(1000 * (time.perf_counter() - start))
    assert 0.3 * min(runs) < sum(times.values()) < 3 * max(runs)
