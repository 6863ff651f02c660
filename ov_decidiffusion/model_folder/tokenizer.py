"""The tokenizer of a model folder, for the tokenizers library, which loads it much faster than transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import config_file, prompt_tokenizer_file, tokenizer_dir

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; loaded with transformers, which is slow, if another tool made the folder.

    Raises:
        ValueError: the file holds no tokenizer, or one without tokens that begin, end and pad a prompt.
    """
    file = prompt_tokenizer_file(folder)
    if not file.is_file():
        from transformers import CLIPTokenizer

        return prompt_tokenizer(CLIPTokenizer.from_pretrained(tokenizer_dir(folder), local_files_only=True))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file} holds no tokenizer ({error}): make the folder again.") from error
    check_token_ids(tokenizer.get_vocab(), folder)
    if tokenizer.padding is None or len(tokenizer.encode("").ids) != 2:
        raise ValueError(f"{file} lacks the tokens that begin, end and pad a prompt: make the folder again.")
    return tokenizer


def prompt_tokenizer(tokenizer: CLIPTokenizer) -> Tokenizer:
    """The backend of a tokenizer, set to pad, which the tokenizers library can load in a fraction of the time.

    Raises:
        CheckpointError: its settings lack a token that begins, ends or pads a prompt.
    """
    known = tokenizer.get_vocab().values()
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") not in known:
            token = getattr(tokenizer, name)
            raise CheckpointError(f"`tokenizer_config.json: {name}` must be a token of vocab.json, got {token!r}.")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    if backend.encode("").ids != [tokenizer.bos_token_id, tokenizer.eos_token_id]:
        raise CheckpointError("The tokenizer must begin and end a prompt with a token each, as CLIP's does.")
    return backend


def check_token_ids(vocabulary: dict[str, int], folder: Path) -> None:
    """Refuse a tokenizer with tokens beyond the text encoder's embedding table: they would be read as other tokens.

    Args:
        vocabulary: all tokens with their ids.
        folder: a checkpoint or a model folder.

    Raises:
        ValueError: the message names the token.
    """
    config = config_file(folder, "text_encoder")
    rows = read_json(config).get("vocab_size") if config.is_file() else None
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if isinstance(rows, int) and token is not None and vocabulary[token] >= rows:
        raise ValueError(
            f"The tokenizer of {folder} has {token!r} as number {vocabulary[token]}, and the text encoder knows those "
            f"below {rows} only: make the folder again, of files that belong together."
        )
