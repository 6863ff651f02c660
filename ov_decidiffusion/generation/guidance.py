"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) over the steps of one run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


class Guidance:
    """Decides which steps are guided, and combines their two predictions.

    Args:
        scale: the guidance scale; guidance is off at 1 or below.
        rescale: share in 0…1 by which the contrast that guidance adds is pulled back.
        acts: for each step, whether guidance may act on it.
        interval: guidance's direction is computed on the first guided step and then on every ``interval``-th one. The
            guided steps between reuse it, and run the U-Net on half of the rows (Lv et al. 2024, arXiv 2410.19355,
            section 3.3).

    Attributes:
        scale, rescale: callbacks may change them between steps.
    """

    def __init__(self, scale: float, rescale: float, acts: Sequence[bool], interval: int = 1):
        self.scale, self.rescale = scale, rescale
        self._acts, self._refreshes = acts, guidance_refresh(acts, interval)
        self._direction: torch.Tensor | None = None  # the latest: conditional minus unconditional
        self._is_guided = self._predicts_both = False  # at this step

    def inputs(
        self, index: int, latents: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and hidden states of a step's rows: two rows per picture if both predictions are needed.

        Args:
            latents: [b, 4, h, w].
            prompt_embeds: [b, n, d], or [2 b, n, d] with those of the negative prompts first.
        """
        self._is_guided = self._acts[index] and self.scale > 1 and len(prompt_embeds) == 2 * len(latents)
        self._predicts_both = self._is_guided and (self._refreshes[index] or self._direction is None)
        if self._predicts_both:
            return torch.cat([latents, latents]), prompt_embeds
        return latents, prompt_embeds[-len(latents) :]

    def apply(self, prediction: torch.Tensor) -> torch.Tensor:
        """The prediction [b, 4, h, w] for the scheduler, from the prediction for the rows that ``inputs`` returned."""
        if self._predicts_both:
            unconditional, conditional = prediction.chunk(2)
            self._direction = conditional - unconditional
            return rescaled(unconditional + self.scale * self._direction, conditional, self.rescale)
        if self._is_guided and self._direction is not None:
            return rescaled(prediction + (self.scale - 1) * self._direction, prediction, self.rescale)
        return prediction


def guidance_refresh(acts: Sequence[bool], interval: int) -> list[bool]:
    """Which steps compute guidance's direction: the first guided step, and then every ``interval``-th one."""
    counted = accumulate(acts, initial=0)
    return [is_guided and count % interval == 0 for is_guided, count in zip(acts, counted, strict=False)]


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """A guided prediction whose contrast is pulled back towards the conditional one's, by a share in 0…1.

    Lin et al. 2023, arXiv 2305.08891, section 3.4, equations 14 to 16.
    """
    if guidance_rescale > 0:
        dims = list(range(1, guided.ndim))
        contrast = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guidance_rescale * (guided * contrast) + (1 - guidance_rescale) * guided
    return guided
