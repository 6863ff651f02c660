"""Rows of a file -> pictures to make: their arguments, their seeds, and which of them run together."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ov_decidiffusion.arguments import check_choice, check_prompts, check_whole, shown
from ov_decidiffusion.generation.config import SAVED
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.web.limits import MAX_SEED

FILES = ("image", "mask_image")  # columns that name picture files
COLUMNS = (*(name for name in SAVED if name != "num_images_per_prompt"), "preset", "num_images", *FILES)
OWN = ("prompt", "negative_prompt", "seed", *FILES)  # pictures that run together may differ in these
MAX_IMAGES = 1000  # for one row
DRAWN_SEEDS = 2**31  # seeds for rows without one lie below it; changing it would change their pictures
READERS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = (",", ";", "\t")  # of CSV, by preference
INDEXES = ("", "Unnamed: 0", "__index_level_0__")  # pandas' names for a column of row numbers
WHOLE = (
    *("num_inference_steps", "height", "width", "seed", "padding_mask_crop", "num_images"),
    *("cache_interval", "guidance_cache_interval"),
)
FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class Sample:
    """One picture to make.

    Attributes:
        row: number of the row, from 0.
        image: number of the picture within its row.
        name: its file name without the extension.
        arguments: the arguments of the call, with ``prompt`` and ``seed``.
        error: why it cannot be made, or "".
    """

    row: int
    image: int
    name: str
    arguments: dict[str, Any]
    error: str = ""

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that must be equal for pictures to be made in one call."""
        return {key: value for key, value in self.arguments.items() if key not in OWN}


@dataclass(frozen=True)
class Chunk:
    """Pictures that are made in one call: the unit of work, which is done as a whole or not at all."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.samples[0].name

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that all its pictures have in common."""
        return self.samples[0].shared


def read_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a text file with a prompt per line, or of CSV, JSON lines or Parquet with columns named like arguments.

    Raises:
        ValueError: another file name extension, or a line that is not a JSON object; the message names it.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() not in READERS:
        raise ValueError(f"Prompts are read from files that end in {', '.join(READERS)}, got {shown(file.name)}.")
    from pyarrow import ArrowInvalid

    try:
        yield from _read_rows(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as that.") from error
    except (csv.Error, ArrowInvalid) as error:  # for example a quote that is never closed
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from map(_without_index, batch.to_pylist())
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if kind in (".csv", ".tsv"):
            yield from _table(lines)
        elif kind == ".txt":
            yield from ({"prompt": line.strip()} for line in lines if line.strip())
        else:
            yield from _json_lines(file, lines)


def _table(lines: TextIO) -> Iterator[dict[str, Any]]:
    """The rows of CSV as spreadsheets write it: commas, semicolons or tabs, spaces around names, empty rows."""
    header = lines.readline()
    found = [next(csv.reader([header], delimiter=delimiter), []) for delimiter in DELIMITERS]
    fitting = [i for i, names in enumerate(found) if "prompt" in [name.strip() for name in names]]
    chosen = fitting[0] if fitting else 0
    names = [name.strip() for name in found[chosen]]
    for row in csv.DictReader(lines, names, delimiter=DELIMITERS[chosen], strict=True):
        if any(value for value in row.values()):
            yield _without_index(row)


def _without_index(row: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in row.items() if name not in INDEXES}


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} is no JSON object: {shown(row)}")
        yield row


def check_table(file: str | Path) -> None:
    """Read a whole file of rows, and refuse one from which no picture can be made.

    Raises:
        ValueError: it cannot be read, has no rows, or has other columns than a table of prompts.
    """
    first = None
    for row in read_rows(file):
        first = row if first is None else first
    if first is None:
        raise ValueError(f"{file} holds no rows: write one prompt per line, or a table with a column `prompt`.")
    if Path(file).suffix.lower() in (".csv", ".tsv", ".parquet"):
        error = _refusal_of_columns({name: "" for name in first if name is not None})
        error = error or ("" if "prompt" in first else f"there is no column `prompt`; there are {', '.join(first)}")
        if error:
            how = "separated by commas, semicolons or tabs, and named like the arguments of a call"
            raise ValueError(f"{file}: {error}. Columns are {how}.")


def check_defaults(defaults: dict[str, Any]) -> None:
    """Refuse defaults that would be an error in every row.

    Raises:
        ValueError: an unknown name or a wrong value.
    """
    error = _refusal_of_columns(defaults)
    if error or (error := _refusal({"prompt": ""} | defaults, defaults.get("num_images", 1))):
        raise ValueError(error)
    check_choice("preset", defaults.get("preset", "exact"), PRESETS)


def make_samples(rows: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> Iterator[Sample]:
    """The pictures of rows. A row with something wrong becomes one sample with an error.

    A row without a seed gets one from its content and number, so that it is the same wherever and whenever it runs. The
    further pictures of a row count up from its seed.

    Args:
        rows: the rows, as dictionaries.
        defaults: arguments for what a row leaves out.
    """
    for number, row in enumerate(rows):
        error = _refusal_of_columns(row)
        given = {} if error else {key: _value(key, value) for key, value in row.items() if not _is_empty(value)}
        arguments = defaults | given
        images = arguments.pop("num_images", 1)
        error = error or _refusal(arguments, images)
        if error:
            yield Sample(number, 0, f"{number:08d}", {"prompt": _told(given.get("prompt", "")), "seed": -1}, error)
            continue
        content = json.dumps([number, given], sort_keys=True, default=str).encode()
        drawn = int.from_bytes(hashlib.sha256(content).digest()[:4], "big") % DRAWN_SEEDS
        first = arguments.pop("seed", drawn)
        for image in range(images):
            name = f"{number:08d}" if images == 1 else f"{number:08d}-{image:03d}"
            yield Sample(number, image, name, arguments | {"seed": (first + image) % (MAX_SEED + 1)})


def _value(key: str, value: Any) -> Any:
    """A row's value: numbers and flags given as text, as in CSV, are parsed, and 1.0, as from pandas, becomes 1."""
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        value = value.item()
    if isinstance(value, str) and key not in ("prompt", "negative_prompt", "preset", "solver", *FILES):
        text = value.strip()
        try:
            value = FLAGS[text.lower()] if text.lower() in FLAGS else json.loads(text)
        except (ValueError, RecursionError):
            return value
    if key in WHOLE and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _told(prompt: Any) -> str:
    """A refused row's prompt as text for the manifest, whatever it is."""
    try:
        return check_prompts(prompt)[0]
    except (ValueError, IndexError):
        return shown(prompt)


def _is_empty(value: Any) -> bool:
    """Whether it is None, an empty text, or pandas' NaN, which is not equal to itself."""
    return value is None or (isinstance(value, str) and value == "") or (isinstance(value, float) and value != value)


def _refusal_of_columns(row: Any) -> str:
    """What is wrong with a row's form, or ""."""
    if not isinstance(row, dict):
        return f"a row must be a dictionary, got {shown(row)}"
    if None in row:  # csv's key for surplus values
        return f"there are more values than columns, as {shown(row[None])}: put a text with commas in quotes"
    unknown = [key for key in row if key not in COLUMNS]
    return f"there is no column {shown(unknown[0])}; there are {', '.join(COLUMNS)}" if unknown else ""


def _refusal(arguments: dict[str, Any], images: Any) -> str:
    """What is wrong with a row's values, as far as that can be told without a model; or ""."""
    try:
        for name in ("prompt", "negative_prompt"):
            if name == "prompt" or name in arguments:
                if not isinstance(arguments.get(name), str):
                    return f"`{name}` must be a string, got {shown(arguments.get(name))}"
                check_prompts(arguments[name], name)
        check_whole("num_images", images, 1, MAX_IMAGES)
        check_whole("seed", arguments.get("seed", 0), 0, MAX_SEED)
    except ValueError as error:
        return str(error)
    return ""


def make_chunks(samples: Iterable[Sample], size: int) -> Iterator[Chunk]:
    """Chunks of at most ``size`` neighbouring samples with the same settings, in the order of the rows."""
    chunk: list[Sample] = []
    kind = None
    for sample in samples:
        own = _kind(sample)
        if chunk and (own != kind or len(chunk) == size or sample.error):
            yield Chunk(chunk)
            chunk = []
        chunk.append(sample)
        kind = own
        if sample.error:
            yield Chunk(chunk)
            chunk = []
    if chunk:
        yield Chunk(chunk)


def _kind(sample: Sample) -> str:
    return json.dumps([sample.shared, [name in sample.arguments for name in FILES]], sort_keys=True, default=str)
