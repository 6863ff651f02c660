"""Which word acts where, measured in two ways: by attention, and by leaving the word out.

At every position of its level, each cross-attention layer weights the text's hidden states by a softmax over the tokens
(Hertz et al. 2022, arXiv 2208.01626, section 3; Tang et al. 2022, arXiv 2210.04885, average it over layers, heads and
steps, as is done here). But attention to a word need not mean that the word has an effect. Leaving a word out shows
its effect, at the cost of one U-Net run for each word and step.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from ov_decidiffusion.arguments import check_prompts
from ov_decidiffusion.generation.denoise import DenoisingStep
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline


def word_maps(
    pipe: OVStableDiffusionPipeline, prompt: str, **arguments: Any
) -> tuple[Image.Image, list[str], np.ndarray]:
    """Make a picture, and measure where each word got attention.

    Args:
        pipe: the pipeline.
        prompt: one prompt of at most 75 tokens, without weights.
        arguments: further arguments of ``pipe.denoise``, for one picture.

    Returns:
        the picture; its words; and float32 [words, h, w], the share of attention that each word got at each position
        of the finest level with cross-attention, averaged over steps, layers and heads.

    Raises:
        ValueError: see ``pipe.denoise``; or several pictures are requested.
    """
    total, step = np.zeros((), np.float32), None
    for step in _steps_of_one(pipe, prompt, arguments):
        total = total + _maps(pipe.unet.attention(step.sample, step.timestep, step.prompt_embeds[-1:]), step.sample)
    assert step is not None  # a run has at least one step
    words, columns = _words(pipe, prompt)
    maps = np.stack([total[..., column].sum(axis=-1) for column in columns]) / step.total
    return pipe.finish(step)[0], words, maps


def word_effects(
    pipe: OVStableDiffusionPipeline, prompt: str, **arguments: Any
) -> tuple[Image.Image, list[str], np.ndarray]:
    """Make a picture, and measure what would change without each word.

    Args:
        pipe, prompt, arguments: see ``word_maps``.

    Returns:
        the picture; its words; and float32 [words, h, w], how much the U-Net's prediction at each latent position
        changes when the word is left out of the prompt: the absolute difference, averaged over channels and steps.

    Raises:
        ValueError: see ``word_maps``.
    """
    words, _ = _words(pipe, prompt)
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    texts = pipe.encode_text([prompt, *without], prompt_syntax=False)
    total, step = np.zeros((), np.float32), None
    for step in _steps_of_one(pipe, prompt, arguments):
        quantized = "unet" in step.quantized
        each = [pipe.unet.full(step.sample, step.timestep, one[None], quantized=quantized)[0] for one in texts]
        predictions = torch.cat(each)
        total = total + (predictions[1:] - predictions[:1]).abs().mean(dim=1).numpy()
    assert step is not None  # a run has at least one step
    return pipe.finish(step)[0], words, total / step.total


def _steps_of_one(pipe: OVStableDiffusionPipeline, prompt: str, arguments: dict[str, Any]) -> Iterator[DenoisingStep]:
    taken: dict[str, Any] = {**arguments, "prompt_syntax": False}
    for step in pipe.denoise(prompt, **taken):
        if len(step.latents) > 1:
            raise ValueError("Maps are made for one picture at a time.")
        with pipe.models.at_work():  # while the caller looks inside
            yield step


def _maps(layers: list[torch.Tensor], sample: torch.Tensor) -> np.ndarray:
    """The mean over layers [h, w, tokens], at the size of the finest layer."""
    shape = sample.shape[-1] / sample.shape[-2]
    heights = [round(math.sqrt(layer.shape[1] / shape)) for layer in layers]
    finest = max(range(len(layers)), key=lambda i: heights[i])
    size = heights[finest], layers[finest].shape[1] // heights[finest]
    maps = [
        torch.nn.functional.interpolate(layer.transpose(1, 2).unflatten(2, (height, -1)), size=size, mode="bilinear")
        for layer, height in zip(layers, heights, strict=True)
    ]
    return torch.stack(maps).mean(dim=0)[0].permute(1, 2, 0).numpy()


def _words(pipe: OVStableDiffusionPipeline, prompt: str) -> tuple[list[str], list[list[int]]]:
    """The words of a prompt, and for each the positions of its tokens."""
    check_prompts([prompt])
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.token_ids([prompt])[0].tolist())
    words, columns = [""], [[]]
    for position, token in enumerate(tokens[1 : tokens.index(str(pipe.tokenizer.eos_token), 1)], start=1):
        words[-1] += token.removesuffix("</w>")
        columns[-1].append(position)
        if token.endswith("</w>"):
            words.append("")
            columns.append([])
    if len(words) == 1:
        raise ValueError("`prompt` must have a word in it, for a map of each.")
    return words[:-1], columns[:-1]
