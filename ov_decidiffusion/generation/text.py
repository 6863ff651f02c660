"""Prompts of any length -> hidden states of the text encoder, words weighed, the latest remembered."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from tokenizers import Tokenizer

from ov_decidiffusion.arguments import check_negative_prompts, check_prompts, shown
from ov_decidiffusion.generation.config import GenerationConfig
from ov_decidiffusion.generation.prompt_weights import Piece, parse_weights
from ov_decidiffusion.generation.tensors import check_embeds
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import MAX_TOKENS, config_file
from ov_decidiffusion.runtime.models import Models

logger = logging.getLogger(__name__)

MAX_CHUNKS = 20  # of a prompt, in 77 tokens each
MAX_TOGETHER = 60  # chunks of prompts of different lengths, each repeated up to the least common multiple
MAX_PROMPTS = 64
Text = list[str] | torch.Tensor  # prompts, or their hidden states [prompts, n, d]


def check_text(config: GenerationConfig, width: int) -> tuple[Text, Text]:
    """The prompts and the negative prompts, of the same number.

    Args:
        width: of the hidden states.

    Raises:
        ValueError: one of them is wrong, or given both in words and as hidden states.
    """
    prompt, prompt_embeds = config.prompt, config.prompt_embeds
    negative_prompt, negative_prompt_embeds = config.negative_prompt, config.negative_prompt_embeds
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
        unconditional = check_negative_prompts(negative_prompt, len(conditional))
    else:
        unconditional = check_embeds("negative_prompt_embeds", negative_prompt_embeds, width, len(conditional))
    for name, text in (("prompt", conditional), ("negative_prompt", unconditional)):
        if config.prompt_syntax and not isinstance(text, torch.Tensor):
            for one in set(text):
                parse_weights(one, name)
    return conditional, unconditional


class TextEncoder:
    """The tokenizer and the text encoder of a model folder.

    Args:
        models: the compiled models.
        tokenizer: as ``load_tokenizer`` gives it.

    Attributes:
        config: the settings beside the model.
    """

    def __init__(self, models: Models, tokenizer: Tokenizer):
        self._models = models
        self.config = FrozenDict(read_json(config_file(models.folder, "text_encoder")))
        self._bos, self._eos = tokenizer.encode("").ids
        assert tokenizer.padding is not None  # ``load_tokenizer`` sees to it
        self._pad = tokenizer.padding["pad_id"]
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._length = MAX_TOKENS
        self._most_chunks = 1 if models.static_shapes else MAX_CHUNKS
        self._encoded: dict[tuple[str, bool], torch.Tensor] = {}  # the latest MAX_PROMPTS, with and without syntax

    def __call__(self, input_ids: torch.Tensor, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        """As ``CLIPTextModel`` of transformers, for prompts that are tokens already.

        Args:
            input_ids: [b, n] whole numbers, as the tokenizer gives them; n is 77 where shapes are static.
            attention_mask: None; CLIP attends to the padding too.
            output_hidden_states: False: of the converted encoder's layers the last one alone comes out.

        Returns:
            an output with ``last_hidden_state`` [b, n, d], which is ``[0]`` of it too.

        Raises:
            ValueError: an attention mask, or all layers, are asked for.
        """
        from transformers.modeling_outputs import BaseModelOutput

        if attention_mask is not None or output_hidden_states:
            raise ValueError(
                "The converted text encoder takes `input_ids` alone, and gives its last layer: leave "
                "`attention_mask` and `output_hidden_states` out."
            )
        return BaseModelOutput(last_hidden_state=self._run(np.asarray(input_ids)))  # type: ignore[arg-type]

    def _run(self, input_ids: np.ndarray) -> torch.Tensor:
        """Hidden states [b, n, d] of tokens [b, n]."""
        return torch.from_numpy(self._models.run("text_encoder", {"input_ids": input_ids})[0])

    def prepare(self, texts: Sequence[Text], times: int, syntax: bool = True) -> torch.Tensor:
        """Hidden states for the loop, each ``times`` over.

        Args:
            texts: what is asked for, and in a guided run behind it what is not, which comes first in the loop.
            syntax: whether brackets weigh words.
        """
        states = [list(one) if isinstance(one, torch.Tensor) else self._encode(one, syntax) for one in texts]
        together = same_length([state for one in reversed(states) for state in one])
        return together.repeat_interleave(times, dim=0)

    def encode(self, prompts: list[str], syntax: bool = True) -> torch.Tensor:
        """Hidden states [prompts, 77 or a multiple of it, d]; those of shorter prompts repeat themselves."""
        return same_length(self._encode(prompts, syntax))

    def _encode(self, prompts: list[str], syntax: bool) -> list[torch.Tensor]:
        """Hidden states [77 or a multiple of it, d] of each prompt."""
        known, wanted = dict(self._encoded), dict.fromkeys((prompt, syntax) for prompt in prompts)
        new = [key for key in wanted if key not in known]
        if new:
            chunked = [self._chunks(prompt, syntax) for prompt, _ in new]
            rows = [self._row([token for token, _ in chunk]) for chunks in chunked for chunk in chunks]
            states = self._run(np.stack(rows))
            each = states.split([len(chunks) for chunks in chunked])
            for key, chunks, own in zip(new, chunked, each, strict=True):
                known[key] = self._weighed(own, chunks).flatten(0, 1)
        known = self._encoded | known  # weighing remembers the empty prompt
        latest = [*(key for key in known if key not in wanted), *wanted][-MAX_PROMPTS:]
        self._encoded = {key: known[key] for key in latest}  # in one go: other threads read it
        return [known[prompt, syntax] for prompt in prompts]

    def _chunks(self, prompt: str, syntax: bool) -> list[list[tuple[int, float]]]:
        """Token ids with their weights, as many at a time as the text encoder takes."""
        room = self._length - 2  # beside the tokens that begin and end a chunk
        chunks: list[list[tuple[int, float]]] = [[]]
        for piece in parse_weights(prompt) if syntax else [Piece(prompt)]:
            if piece.starts_chunk:
                chunks.append([])
                continue
            for token in self._tokens(piece.text):
                if len(chunks[-1]) == room:
                    chunks.append([])
                chunks[-1].append((token, piece.weight))
        chunks = [chunk for chunk in chunks if chunk] or [[]]
        self._tell_what_is_left_out(prompt, chunks)
        return chunks[: self._most_chunks]

    def _weighed(self, states: torch.Tensor, chunks: list[list[tuple[int, float]]]) -> torch.Tensor:
        """Move each token's state away from what the empty prompt has in its place, by its weight.

        ComfyUI's way of weighing. AUTOMATIC1111 multiplies states and restores their mean, which for text encoders
        other than CLIP's may be about zero.
        """
        if all(weight == 1 for chunk in chunks for _, weight in chunk):
            return states
        weights = torch.ones((*states.shape[:2], 1))
        for row, chunk in zip(weights, chunks, strict=True):
            row[1 : 1 + len(chunk), 0] = torch.tensor([weight for _, weight in chunk])
        empty = self._encode([""], False)[0][None]
        return torch.where(weights == 1, states, empty + weights * (states - empty))

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _row(self, tokens: list[int]) -> np.ndarray:
        row = np.full(self._length, self._pad, np.int64)
        row[: len(tokens) + 2] = [self._bos, *tokens, self._eos]
        return row

    def _tell_what_is_left_out(self, prompt: str, chunks: list[list[tuple[int, float]]]) -> None:
        if len(chunks) > self._most_chunks:
            counts = [len(chunk) for chunk in chunks]
            logger.warning(
                "A prompt holds at most %d tokens here; the last %d of %d are left out of %s.",
                self._most_chunks * (self._length - 2),
                sum(counts[self._most_chunks :]),
                sum(counts),
                shown(prompt),
            )

    def token_ids(self, prompts: list[str]) -> np.ndarray:
        """What the text encoder takes: whole numbers [prompts, 77], of each prompt's first chunk, brackets as read."""
        return np.stack([self._row(self._tokens(prompt)[: self._length - 2]) for prompt in prompts])


def same_length(states: list[torch.Tensor]) -> torch.Tensor:
    """Stack hidden states [n, d] of prompts of any lengths.

    Shorter ones repeat themselves whole, which changes nothing: attention over twice the same keys and values is
    attention over one of each. (Empty chunks behind them would draw attention away from the words.)

    Raises:
        ValueError: lengths whose least common multiple is too long.
    """
    length = math.lcm(*(len(one) for one in states))
    if length > max(MAX_TOKENS * MAX_TOGETHER, *(len(one) for one in states)):
        found = sorted({len(one) for one in states})
        raise ValueError(
            f"`prompt`, `negative_prompt` and their embeddings are of {found} tokens, which cannot be run together: "
            "make them shorter, or of one length."
        )
    return torch.stack([one.repeat(length // len(one), 1) for one in states])
