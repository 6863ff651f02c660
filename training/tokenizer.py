"""A CLIP tokenizer with a vocabulary of its own, in the usual files of CLIP tokenizers."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.models import MAX_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def _learn_merges(captions: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, as many as make every word of the captions one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix=WORD_END, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def make_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn a vocabulary from captions, and write ``vocab.json``, ``merges.txt`` and the tokenizer's settings.

    The vocabulary has the order of CLIP's: the 256 bytes, the 256 bytes that end a word, the merges, and the two
    special tokens. So any text can be spelled, and the last id is the end of text.
    """
    merges = _learn_merges(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
