"""CLIP's true vocabulary: the tokens of all kinds of texts, and the embeddings of long prompts.

The embedded checkpoint has a small vocabulary of its own; this one is what the real checkpoints have.
"""

import json
import shutil

import numpy as np
import openvino as ov
import openvino_tokenizers  # noqa: F401  its operations are what the tokenizer's model is made of
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.clip_vocabulary import TOKENS, VOCABULARY, write_tokenizer
from ov_decidiffusion import OVStableDiffusionPipeline
from ov_decidiffusion.conversion.convert import convert_checkpoint

BY_OPENAI = json.loads(TOKENS.read_text(encoding="utf-8"))
# What OpenVINO's tokenizer, which other tools use on the same folder, reads in its own way.
UNLIKE = ("Straße GRÜN İstanbul", "<|startoftext|>a cat<|endoftext|>")


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint, tmp_path_factory):
    """A small checkpoint that reads CLIP's own tokens."""
    folder = shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("clip") / "checkpoint")
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder", vocab_size=VOCABULARY, **ids)
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint, tmp_path_factory):
    folder = convert_checkpoint(checkpoint, tmp_path_factory.mktemp("clip-models") / "models").model_dir
    return OVStableDiffusionPipeline.from_pretrained(folder, device="CPU", inference_precision="f32")


def test_every_text_becomes_the_tokens_that_openais_own_tokenizer_makes(pipe, checkpoint):
    by_transformers = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    by_openvino = ov.Core().compile_model(pipe.models.folder / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    assert len(by_transformers) == VOCABULARY
    assert len(BY_OPENAI) > 60
    for text, tokens in BY_OPENAI.items():
        whole = [VOCABULARY - 2, *tokens, VOCABULARY - 1]
        assert pipe.tokenizer(text)["input_ids"] == by_transformers(text)["input_ids"] == whole, text
        assert (by_openvino([text])["input_ids"][0].tolist() == whole) == (text not in UNLIKE), text


def test_a_prompt_of_more_than_77_tokens_is_encoded_in_chunks_of_them(pipe, checkpoint):
    encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    text = "a very long walk through the forest at night, " * 12
    tokens = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")(text)["input_ids"][1:-1]
    assert len(tokens) > 75
    chunks = [tokens[start : start + 75] for start in range(0, len(tokens), 75)]
    rows = [[VOCABULARY - 2, *chunk, *[VOCABULARY - 1] * (76 - len(chunk))] for chunk in chunks]
    with torch.no_grad():
        wanted = encoder(torch.tensor(rows)).last_hidden_state.reshape(1, 77 * len(rows), -1)
    found, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=5e-3)
