"""Prompts of any length -> hidden states of the text encoder, with weighted words and a cache."""

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

MAX_CHUNKS = 20  # of 77 tokens each, per prompt
MAX_TOGETHER = 60  # chunks, after prompts of different lengths are repeated up to their least common multiple
MAX_PROMPTS = 64
Text = list[str] | torch.Tensor  # prompts, or their hidden states [prompts, n, d]


def check_text(config: GenerationConfig, width: int) -> tuple[Text, Text]:
    """Check the prompts and the negative prompts; returns as many of one as of the other.

    Args:
        config: the call's configuration.
        width: size of a hidden state.

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
        tokenizer: from ``load_tokenizer``.

    Attributes:
        config: the settings in the model's ``config.json``.
    """

    def __init__(self, models: Models, tokenizer: Tokenizer):
        self._models = models
        self.config = FrozenDict(read_json(config_file(models.folder, "text_encoder")))
        self._bos, self._eos = tokenizer.encode("").ids
        assert tokenizer.padding is not None  # ``load_tokenizer`` has checked it
        self._pad = tokenizer.padding["pad_id"]
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._length = MAX_TOKENS
        self._most_chunks = 1 if models.static_shapes else MAX_CHUNKS
        self._encoded: dict[tuple[str, bool], torch.Tensor] = {}  # the latest MAX_PROMPTS, with and without syntax

    def __call__(self, input_ids: torch.Tensor, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        """Encode tokens, like ``CLIPTextModel`` of transformers.

        Args:
            input_ids: token ids [b, n] from the tokenizer; n must be 77 if shapes are static.
            attention_mask: must be None: CLIP attends to the padding too.
            output_hidden_states: must be False: the converted encoder outputs its last layer only.

        Returns:
            an output with ``last_hidden_state`` [b, n, d], which is also its ``[0]``.

        Raises:
            ValueError: an attention mask is given, or all layers are requested.
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
        """Hidden states for the loop, each repeated ``times`` times.

        Args:
            texts: the prompts, and in a guided run after them the negative prompts, whose states come first in the
                result.
            times: number of pictures for each prompt.
            syntax: whether brackets weight words.
        """
        states = [list(one) if isinstance(one, torch.Tensor) else self._encode(one, syntax) for one in texts]
        together = same_length([state for one in reversed(states) for state in one])
        return together.repeat_interleave(times, dim=0)

    def encode(self, prompts: list[str], syntax: bool = True) -> torch.Tensor:
        """Hidden states [prompts, 77 or a multiple of it, d]; those of shorter prompts are repeated."""
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
        known = self._encoded | known  # weighting caches the empty prompt
        latest = [*(key for key in known if key not in wanted), *wanted][-MAX_PROMPTS:]
        self._encoded = {key: known[key] for key in latest}  # in one assignment: other threads read it
        return [known[prompt, syntax] for prompt in prompts]

    def _chunks(self, prompt: str, syntax: bool) -> list[list[tuple[int, float]]]:
        """Token ids with their weights, in chunks that the text encoder can take."""
        room = self._length - 2  # without the tokens that begin and end a chunk
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
        """Scale the difference between each token's state and the empty prompt's at that place, by its weight.

        This is ComfyUI's method. AUTOMATIC1111 multiplies states and restores their mean, which may be about zero for
        text encoders other than CLIP's.
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
        """Token ids [prompts, 77] of each prompt's first chunk, with brackets taken literally."""
        return np.stack([self._row(self._tokens(prompt)[: self._length - 2]) for prompt in prompts])


def same_length(states: list[torch.Tensor]) -> torch.Tensor:
    """Stack hidden states [n, d] of prompts of any lengths.

    Shorter ones are repeated as a whole, which changes nothing: attention over the same keys and values twice equals
    attention over them once. (Empty chunks after them would draw attention away from the words.)

    Raises:
        ValueError: the least common multiple of the lengths is too large.
    """
    length = math.lcm(*(len(one) for one in states))
    if length > max(MAX_TOKENS * MAX_TOGETHER, *(len(one) for one in states)):
        found = sorted({len(one) for one in states})
        raise ValueError(
            f"`prompt`, `negative_prompt` and their embeddings are of {found} tokens, which cannot be run together: "
            "make them shorter, or of one length."
        )
    return torch.stack([one.repeat(length // len(one), 1) for one in states])
