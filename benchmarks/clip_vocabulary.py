"""CLIP's vocabulary, which the real checkpoints use: ``python -m benchmarks.clip_vocabulary`` writes its file again.

The merges are OpenAI's, published with CLIP under the MIT license, which lies beside them. They come from the package
clip-anytorch on PyPI, which contains OpenAI's files. The same command records the tokens that OpenAI's own tokenizer
gives for a list of texts, for the tests; without ftfy's repairs, which transformers leaves out too.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "clip-anytorch==2.6.0"
NEEDED = ("ftfy==6.3.1", "wcwidth==0.2.13", "regex")  # what OpenAI's tokenizer imports
MERGES = Path(__file__).with_name("clip_merges.txt.gz")
LICENSE = Path(__file__).with_name("clip_merges.LICENSE")
TOKENS = Path(__file__).parents[1] / "tests" / "golden" / "clip_tokens.json"
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 49408
COUNT = VOCABULARY - 2 * 256 - 2  # number of merges: all tokens but the bytes, alone and word-final, and two marks
TOKENIZE = """
import json, sys, unicodedata
from clip import simple_tokenizer
simple_tokenizer.basic_clean = lambda text: unicodedata.normalize("NFC", text).strip()
own = simple_tokenizer.SimpleTokenizer()
print(json.dumps([own.encode(text) for text in json.load(sys.stdin)]))
"""


def read_merges() -> list[str]:
    """The pairs of tokens that CLIP merges, in the order of merging."""
    return gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()


def byte_characters() -> list[str]:
    """The 256 characters that each stand for a byte: printable ones for themselves, others shifted past U+0100.

    CLIP uses the mapping of GPT-2 (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer of CLIP ViT-L/14, with the files and settings that Stable Diffusion's checkpoints have."""
    characters, merges = byte_characters(), read_merges()
    tokens = [*characters, *(f"{one}</w>" for one in characters), *("".join(pair.split()) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    settings |= marks | {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch]
        subprocess.run([*install, PACKAGE, *NEEDED], check=True)
        merges = gzip.decompress((Path(scratch) / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
        kept = "\n".join(merges.decode("utf-8").split("\n")[1 : 1 + COUNT])
        MERGES.write_bytes(gzip.compress(kept.encode("utf-8"), 9, mtime=0))
        [text] = Path(scratch).glob("clip_anytorch-*/LICENSE")
        LICENSE.write_text(text.read_text())
        texts = list(json.loads(TOKENS.read_text(encoding="utf-8")))
        (Path(scratch) / "clip" / "__init__.py").write_text("")  # only the package's tokenizer is needed
        command = [sys.executable, "-c", TOKENIZE]
        told = subprocess.run(
            command, cwd=scratch, input=json.dumps(texts), capture_output=True, text=True, check=True
        ).stdout
    tokens = dict(zip(texts, json.loads(told), strict=True))
    lines = (f"{json.dumps(text, ensure_ascii=False)}: {json.dumps(found)}" for text, found in tokens.items())
    TOKENS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{COUNT:,} merges in {MERGES}, tokens of {len(tokens)} texts in {TOKENS}")


if __name__ == "__main__":
    main()
