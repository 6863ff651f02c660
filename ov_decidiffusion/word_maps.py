"""Which word paints where: cross-attention as maps over the picture.

Each layer of cross-attention asks, at every position of its level, which of the text's hidden states to take up: a
softmax over the tokens (Hertz et al. 2022, arXiv 2208.01626, section 3; Tang et al. 2022, arXiv 2210.04885, average it
over layers, heads and steps as is done here).
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from ov_decidiffusion.pipeline import OVStableDiffusionPipeline


def word_maps(
    pipe: OVStableDiffusionPipeline, prompt: str, **arguments: Any
) -> tuple[Image.Image, list[str], np.ndarray]:
    """Make a picture, and say which word was looked at where.

    Args:
        pipe: the pipeline.
        prompt: one, of at most 75 tokens, without weights.
        arguments: those of ``pipe.denoise``, for one picture.

    Returns:
        the picture; its words; and float32 [words, h, w], the share of attention that each word got at each position
        of the finest level that looks at the text, averaged over steps, layers and heads.

    Raises:
        ValueError: as ``pipe.denoise``, or several pictures are asked for.
    """
    total, step = 0.0, None
    for step in pipe.denoise(prompt, **arguments | {"prompt_syntax": False}):
        if len(step.latents) > 1:
            raise ValueError("Attention is shown for one picture at a time.")
        total = total + _maps(pipe.denoiser.attention(step.sample, step.timestep, step.prompt_embeds[-1:]), step.sample)
    words, columns = _words(pipe, prompt)
    maps = np.stack([total[..., column].sum(axis=-1) for column in columns]) / step.total
    return pipe.finish(step)[0], words, maps


def _maps(layers: list[torch.Tensor], sample: torch.Tensor) -> np.ndarray:
    """The mean over layers [h, w, tokens], at the size of the finest."""
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
    """The words of a prompt, and the positions of the tokens that each consists of."""
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.token_ids([prompt])[0].tolist())
    words, columns = [""], [[]]
    for position, token in enumerate(tokens[1 : tokens.index(pipe.tokenizer.eos_token, 1)], start=1):
        words[-1] += token.removesuffix("</w>")
        columns[-1].append(position)
        if token.endswith("</w>"):
            words.append("")
            columns.append([])
    return words[:-1], columns[:-1]
