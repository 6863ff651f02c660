"""Prompts -> hidden states of the text encoder, the latest of them remembered."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from ov_decidiffusion.arguments import check_embeds, check_negative_prompts, check_prompts
from ov_decidiffusion.models import Models

logger = logging.getLogger(__name__)

MAX_TOKENS = 77
MAX_PROMPTS = 64
SHOWN = 80  # characters of a prompt in the log
Text = list[str] | torch.Tensor  # prompts, or their hidden states [prompts, n, d]


def check_text(
    prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_prompt_embeds: Any, width: int
) -> tuple[Text, Text]:
    """What is asked for and what is not, of the same number.

    Args:
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds: as a call of the pipeline is given them.
        width: of the hidden states.

    Raises:
        ValueError: one of them is wrong, or given both in words and as hidden states.
    """
    for name, words, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if words is not None and embeds is not None:
            raise ValueError(f"Give `{name}` or `{name}_embeds`, not both.")
    if prompt_embeds is None:
        conditional = check_prompts(prompt)
    else:
        conditional = check_embeds("prompt_embeds", prompt_embeds, width)
    if negative_prompt_embeds is None:
        return conditional, check_negative_prompts(negative_prompt, len(conditional))
    return conditional, check_embeds("negative_prompt_embeds", negative_prompt_embeds, width, len(conditional))


def check_tokenizer(tokenizer: CLIPTokenizer) -> None:
    """Refuse one whose settings lead nowhere.

    Raises:
        ValueError: names the setting.
    """
    settings = "`tokenizer_config.json:"
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 3:
        raise ValueError(f"{settings} model_max_length` must be a whole number of at least 3, got {length!r}.")
    known = tokenizer.get_vocab().values()
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") not in known:
            raise ValueError(f"{settings} {name}` must be a token of vocab.json, got {getattr(tokenizer, name)!r}.")


class TextEncoder:
    """The tokenizer and the text encoder of a model folder.

    Args:
        models: the compiled models.
        tokenizer: CLIP's, with the checkpoint's vocabulary.
    """

    def __init__(self, models: Models, tokenizer: CLIPTokenizer):
        check_tokenizer(tokenizer)
        self._models = models
        self.tokenizer = tokenizer
        self._tokenizing = threading.Lock()
        self._encoded: dict[str, torch.Tensor] = {}  # prompt -> hidden states, the latest MAX_PROMPTS

    def prepare(self, texts: Sequence[Text], times: int) -> torch.Tensor:
        """Hidden states for the loop, each ``times`` over.

        Args:
            texts: what is asked for, and in a guided run behind it what is not, which comes first in the loop.
        """
        states = [one if isinstance(one, torch.Tensor) else self.encode(one) for one in texts]
        return torch.cat([one.repeat_interleave(times, dim=0) for one in reversed(states)])

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Hidden states [prompts, 77, d]; what does not fit into 77 tokens is left out, and said."""
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
        length, end = min(self.tokenizer.model_max_length, MAX_TOKENS), self.tokenizer.eos_token_id
        # Padding and cutting off are settings of the tokenizer that all threads share, so they are not its work.
        with self._tokenizing:
            found = self.tokenizer(prompts, verbose=False).input_ids
        rows = np.full((len(prompts), length), self.tokenizer.pad_token_id, np.int64)
        for row, text, ids in zip(rows, prompts, found, strict=True):
            if len(ids) > length:
                start = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
                logger.warning(
                    "A prompt holds at most %d tokens; the last %d of %d are left out of %r.",
                    length - 2,
                    len(ids) - length,
                    len(ids) - 2,
                    start,
                )
                ids = [*ids[: length - 1], end]
            row[: len(ids)] = ids
        return rows
