"""Prompts -> hidden states of the text encoder, the latest of them remembered."""

import logging

import numpy as np
import torch
from transformers import CLIPTokenizer

from ov_decidiffusion.models import Models

logger = logging.getLogger(__name__)

MAX_TOKENS = 77
MAX_PROMPTS = 64


class TextEncoder:
    """The tokenizer and the text encoder of a model folder.

    Args:
        models: the compiled models.
        tokenizer: CLIP's, with the checkpoint's vocabulary.
    """

    def __init__(self, models: Models, tokenizer: CLIPTokenizer):
        self._models = models
        self.tokenizer = tokenizer
        self._encoded: dict[str, torch.Tensor] = {}  # prompt -> hidden states, the latest MAX_PROMPTS

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Hidden states [prompts, 77, d]; what does not fit into 77 tokens is left out, and said."""
        length = self._prompt_length
        for text, full in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(full) > length:
                lost = self.tokenizer.decode(full[length - 1 : -1])
                logger.warning("A prompt holds at most %d tokens; this is left out of %r: %s", length - 2, text, lost)
        known, wanted = dict(self._encoded), dict.fromkeys(prompts)
        new = [text for text in wanted if text not in known]
        if new:
            states = self._models.run("text_encoder", {"input_ids": self.token_ids(new)})[0]
            known |= dict(zip(new, states, strict=True))
        latest = [*(text for text in known if text not in wanted), *wanted][-MAX_PROMPTS:]
        self._encoded = {text: known[text] for text in latest}  # in one go: other threads read it
        return torch.stack([known[text] for text in prompts])

    def token_ids(self, prompts: list[str]) -> np.ndarray:
        """What the text encoder takes: whole numbers [prompts, 77], padded, and cut off where a prompt is longer."""
        length = self._prompt_length
        padded = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return padded.input_ids.astype(np.int64)

    @property
    def _prompt_length(self) -> int:
        return min(self.tokenizer.model_max_length, MAX_TOKENS)
