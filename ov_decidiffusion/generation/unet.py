"""The U-Net of a model folder, in full or its top level alone, and DeepCache over the steps of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict

from ov_decidiffusion.arguments import warn_renamed
from ov_decidiffusion.model_folder.layout import MAX_TOKENS
from ov_decidiffusion.runtime.models import ATTENTION, TOP_LEVEL, Models
from ov_decidiffusion.runtime.transformations import DEEP_FEATURES


class UNet:
    """The U-Net's compiled models, with tensors in and out.

    Args:
        models: the compiled models.

    Attributes:
        config: the settings in the model's ``config.json``.
    """

    def __init__(self, models: Models):
        self._models = models
        self.config = FrozenDict(models.unet_config)

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> NoReturn:
        """Refused: DeciDiffusion's model card replaces the U-Net with this method, which is not needed here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The U-Net of flexible_unet/ is loaded already: leave this line out.")

    def prepare_caching(self, quantized: bool = False) -> None:
        """Compile the models that ``full`` with ``keep_features`` and ``shallow`` run.

        Raises:
            ValueError: the U-Net cannot be split below its top level.
        """
        self._models.prepare_caching(quantized)

    def full(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        keep_features: bool = False,
        quantized: bool = False,
        rows_at_once: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One run of the full U-Net.

        Args:
            sample: latents [b, 4, h, w], as the scheduler scales them.
            timestep: one number.
            encoder_hidden_states: hidden states of the prompts [b, 77, d], or a multiple of 77.
            keep_features: return the deeper levels' features too; needs ``prepare_caching`` first.
            quantized: run in INT8.
            rows_at_once: compute at most this many rows at a time, where memory is short; None for all.

        Returns:
            the prediction [b, 4, h, w], and the deeper levels' features [b, channels, h, w] or None.
        """
        if encoder_hidden_states.shape[1] != MAX_TOKENS:
            self._models.allow_long_prompts()
        inputs = _inputs(sample, timestep) | {"encoder_hidden_states": encoder_hidden_states.numpy()}
        count = 2 if keep_features else 1
        outputs = self._models.run("unet", inputs, outputs=count, quantized=quantized, rows_at_once=rows_at_once)
        return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1]) if keep_features else None

    def shallow(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        features: torch.Tensor,
        quantized: bool = False,
        rows_at_once: int | None = None,
    ) -> torch.Tensor:
        """The prediction of the top level alone, from the deeper levels' features of an earlier step."""
        inputs = _inputs(sample, timestep) | {DEEP_FEATURES: features.numpy()}
        outputs = self._models.run(TOP_LEVEL, inputs, quantized=quantized, rows_at_once=rows_at_once)
        return torch.from_numpy(outputs[0])

    def attention(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> list[torch.Tensor]:
        """The attention weights [b, h * w, n] of each cross-attention layer, for the same inputs as ``full``."""
        inputs = _inputs(sample, timestep) | {"encoder_hidden_states": encoder_hidden_states.numpy()}
        return [torch.from_numpy(layer) for layer in self._models.run(ATTENTION, inputs, outputs=None)]

    def whole(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        keep_deep: bool = False,
        quantized: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The former name of ``full``."""
        warn_renamed("whole", "full")
        return self.full(sample, timestep, text, keep_deep, quantized)

    def top_level(
        self, sample: torch.Tensor, timestep: torch.Tensor, deep: torch.Tensor, quantized: bool = False
    ) -> torch.Tensor:
        """The former name of ``shallow``."""
        warn_renamed("top_level", "shallow")
        return self.shallow(sample, timestep, deep, quantized)


class DeepCache:
    """Runs the full U-Net on some steps, and on the others its top level with the last full step's deep features.

    Ma et al. 2023, arXiv 2312.00858.

    Args:
        unet: the U-Net; call its ``prepare_caching`` first unless all steps are full ones.
        full_steps: for each step, whether it is a full one; the first one is.
        quantized: run in INT8.
        rows_at_once: see ``UNet.full``.
    """

    def __init__(self, unet: UNet, full_steps: Sequence[bool], quantized: bool, rows_at_once: int | None = None):
        self._unet, self._full_steps, self._quantized = unet, full_steps, quantized
        self._rows_at_once = rows_at_once
        self._keeps_features = not all(full_steps)
        self._features: torch.Tensor | None = None

    def predict(
        self, index: int, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of a step, from the inputs of ``UNet.full``.

        A step with more rows than the cached features runs the full U-Net. One with fewer rows uses the last rows'
        features, which belong to the prompts rather than the negative prompts.
        """
        features = self._features
        if self._full_steps[index] or features is None or len(features) < len(sample):
            prediction, self._features = self._unet.full(
                sample, timestep, encoder_hidden_states, self._keeps_features, self._quantized, self._rows_at_once
            )
            return prediction
        return self._unet.shallow(sample, timestep, features[-len(sample) :], self._quantized, self._rows_at_once)


def _inputs(sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, np.ndarray]:
    return {"sample": sample.numpy(), "timestep": timestep.reshape(1).float().numpy()}
