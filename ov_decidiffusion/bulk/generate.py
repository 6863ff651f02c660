"""Many pictures from a file of prompts: in this process, or by actors of Ray Data on one machine or many.

Pictures are made in chunks. A chunk's pictures are written first, then its part of the manifest. So whatever is killed,
the same call can resume with the chunks that have no part yet.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ov_decidiffusion.arguments import check_choice, check_path, check_whole, shown
from ov_decidiffusion.bulk.rows import FILES, Chunk, Sample, check_defaults, make_chunks, make_samples, read_rows
from ov_decidiffusion.errors import ModelDirError, NotEnoughMemory
from ov_decidiffusion.model_folder.configs import read_origin
from ov_decidiffusion.model_folder.integrity import check_model_dir, read_json
from ov_decidiffusion.model_folder.layout import weights_file
from ov_decidiffusion.model_folder.writing import is_free, write_json, write_whole
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.progress import progress_bar
from ov_decidiffusion.runtime.loading import choose_target
from ov_decidiffusion.web.uploads import open_own_file

logger = logging.getLogger(__name__)

FORMATS = ("png", "webdataset")
SMALL = 200e6  # bytes of a U-Net; below it, several pictures at once are faster than one after the other
TOGETHER = 8
BLOCKS_PER_ACTOR = 32  # enough to keep all busy to the end; one block per chunk would cost Ray time and memory
BEGUN, PARTS, MANIFEST, PICTURES = "bulk.json", "manifest", "manifest.parquet", "pictures"
FOR_GOOD = (ValueError, TypeError, FileNotFoundError)  # errors of a row, which would occur again
PASSING = (NotEnoughMemory, ModelDirError)  # subclasses of these, but not errors of a row


def generate(
    rows: Any,
    model_dir: str | Path,
    out: str | Path,
    *,
    actors: int | None = None,
    threads: int | None = None,
    ray_address: str | None = None,
    output_format: str = "png",
    device: str = "CPU",
    inference_precision: str = "auto",
    **defaults: Any,
) -> Path:
    """Make a picture for each row, or as many as its ``num_images`` says.

    A row without a ``seed`` gets one from its content and number, so the same row gives the same picture however the
    work is distributed. With ``inference_precision="f32"`` and the same ``threads`` it is the same bit for bit; among
    other rows it is the same to 1/255 in a pixel, since batches of other sizes round differently. If it was interrupted
    or killed, the same call resumes. A row that cannot be made becomes an error in the manifest.

    Args:
        rows: a file that ``read_rows`` can read, dictionaries, or a ``ray.data.Dataset``.
        model_dir: a folder that ``convert_checkpoint`` made, at a path that all actors can read.
        out: a folder, new or begun by the same call; on a cluster, at a path that all actors can write.
        actors: number of pipelines that work at once, on Ray; None for one in this process. If Ray is not installed,
            one pipeline in this process does the work.
        threads: number of threads of each pipeline; None for all cores divided by ``actors``.
        ray_address: the address of a cluster whose actors do the work; None starts Ray on this machine if ``actors``
            is given.
        output_format: "png", files in folders of a thousand rows; or "webdataset", a tar file for each chunk.
        device, inference_precision: see ``from_pretrained``; "auto" is decided here once, for all actors.
        defaults: arguments of the pipeline's call, for what rows leave out.

    Returns:
        the manifest, a Parquet file: row, image, prompt, seed, settings (JSON), file, sha256, seconds, error.

    Raises:
        ValueError: a wrong argument, a cluster without Ray installed, or ``out`` was begun with other arguments.
    """
    if actors is not None:
        check_whole("actors", actors, 1)
    on_ray = _is_for_ray(actors, ray_address)
    check_choice("output_format", output_format, FORMATS)
    check_defaults(defaults)
    model_dir, out = check_path("model_dir", model_dir).resolve(), check_path("out", out).resolve()
    check_model_dir(model_dir)
    precision = _precision(device, inference_precision, threads)
    together = TOGETHER if weights_file(model_dir, "unet").stat().st_size < SMALL else 1
    begun = {"model": read_origin(model_dir), "precision": precision, "format": output_format, "defaults": defaults}
    chunks = list(make_chunks(make_samples(_rows(rows), defaults), together))
    _begin(out, json.loads(json.dumps(begun, default=str)))
    waiting = [chunk for chunk in chunks if not _is_done(out, chunk)]
    actors = (actors or 1) if on_ray else 1
    threads = threads or max(1, (os.cpu_count() or 1) // actors)
    options = {"model_dir": model_dir, "out": out, "device": device, "precision": precision, "threads": threads}
    options["output_format"] = output_format
    if waiting:
        spread = _with_ray(waiting, options, actors, ray_address) if on_ray else map(Worker(**options), waiting)
        total = sum(len(chunk.samples) for chunk in waiting)
        with progress_bar(total=total, desc="generating", unit="picture") as progress:
            for made in spread:
                progress.update(made)
    return _finish(out, chunks)


class Worker:
    """Makes the pictures of chunks with a pipeline of its own; each actor has one.

    Args:
        model_dir, out, device, output_format: see ``generate``.
        precision: the precision that was chosen for all actors.
        threads: number of threads that the pipeline computes with.
    """

    def __init__(
        self, model_dir: Path, out: Path, device: str, precision: str | None, threads: int, output_format: str
    ):
        self.out, self.output_format = out, output_format
        self.pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, device, precision or "auto", threads=threads)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, chunk: Chunk) -> int:
        """Make and write a chunk; returns its number of pictures."""
        start = time.perf_counter()
        pictures = self._generate(chunk.samples)
        seconds = (time.perf_counter() - start) / len(chunk.samples)
        records, files = [], {}
        for sample, picture in zip(chunk.samples, pictures, strict=True):
            record = _record(sample, seconds)
            if isinstance(picture, Exception):
                record["error"] = f"{type(picture).__name__}: {picture}"
                record["for_good"] = isinstance(picture, FOR_GOOD) and not isinstance(picture, PASSING)
            else:
                data = _png(picture)
                files[f"{sample.name}.png"] = data
                record |= {"file": f"{sample.name}.png", "sha256": hashlib.sha256(data).hexdigest()}
                record["settings"] = picture.info["ov_decidiffusion"]
            records.append(record)
        place = self._write(chunk, files, records)
        for record in records:
            if record["file"]:
                record["file"] = f"{place}/{record['file']}"
        _write_part(self.out, chunk, records)
        return len(records)

    def _generate(self, samples: list[Sample]) -> Sequence[Image.Image | Exception]:
        """A picture or an error for each sample; if one makes the call fail, each is made alone."""
        if samples[0].error:
            return [ValueError(samples[0].error)]
        arguments = Chunk(samples).shared
        try:
            for name in FILES:
                if name in samples[0].arguments:
                    arguments[name] = [_open(name, sample.arguments[name]) for sample in samples]
            own = {
                name: [sample.arguments.get(name, "") for sample in samples] for name in ("prompt", "negative_prompt")
            }
            return self.pipe(**own, seed=[sample.arguments["seed"] for sample in samples], **arguments).images
        except Exception as error:
            if len(samples) == 1:
                return [error]
            return [one for sample in samples for one in self._generate([sample])]

    def _write(self, chunk: Chunk, files: dict[str, bytes], records: list[dict[str, Any]]) -> str:
        """Write a chunk's pictures; returns their place, for the manifest."""
        if not files:
            return ""
        if self.output_format == "webdataset":
            place = f"{PICTURES}/{chunk.name}.tar"
            write_whole(self.out / place, _shard(files, records))
            return place
        place = f"{PICTURES}/{chunk.samples[0].row // 1000:05d}"
        for name, data in files.items():
            write_whole(self.out / place / name, data)
        return place


def _is_for_ray(actors: int | None, address: str | None) -> bool:
    """Whether Ray is requested and installed."""
    if actors is None and address is None:
        return False
    try:
        import ray.data  # noqa: F401
    except ImportError:
        if address is not None:
            raise ValueError("`ray_address` needs Ray: pip install '.[scale]'.") from None
        logger.warning("Ray is not installed (pip install '.[scale]'): everything is done in this process.")
        return False
    return True


def _with_ray(chunks: list[Chunk], options: dict[str, Any], actors: int, address: str | None) -> Iterator[int]:
    """Distribute chunks over a pool of actors; an actor that dies is replaced, and another one makes its chunk."""
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        local = {} if address else {"num_cpus": max(actors * options["threads"], 1) + 1, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **local)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [
            {"chunk": i, "samples": json.dumps([vars(sample) for sample in chunk.samples], default=str)}
            for i, chunk in enumerate(chunks)
        ]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS_PER_ACTOR * actors))
        made = dataset.map(
            _Actor,  # pyright: ignore[reportArgumentType]  # Ray takes classes too, but does not declare it
            fn_constructor_kwargs={"options": options},
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=options["threads"],
        )
        for row in made.iter_rows():
            yield row["made"]
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A Worker that gets its chunks as rows from Ray Data."""

    def __init__(self, options: dict[str, Any]):
        self.worker = Worker(**options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk([Sample(**sample) for sample in json.loads(row["samples"])])
        if _is_done(self.worker.out, chunk):  # done by an actor that died before its block was finished
            return {"made": len(chunk.samples)}
        return {"made": self.worker(chunk)}


def _rows(rows: Any) -> Iterable[dict[str, Any]]:
    if isinstance(rows, (str, Path)):
        return read_rows(rows)
    rows = rows.iter_rows() if hasattr(rows, "iter_rows") else rows
    if not isinstance(rows, Iterable):
        raise ValueError(f"`rows` must be a file, dictionaries or a ray.data.Dataset, got {shown(rows)}.")
    return rows


def _precision(device: str, asked: str, threads: int | None) -> str | None:
    """The precision for all actors: one machine decides, so that equal rows give equal pictures."""
    return choose_target(device, asked, threads=threads).precision


def check_out(out: Path) -> None:
    """Refuse a path that cannot be a folder for pictures, before anything else is done.

    Raises:
        ValueError: the path is a file, or a link that leads nowhere.
    """
    if not is_free(out) and not out.is_dir():
        raise ValueError(f"`out` {out} is a file: choose a folder.")


def _begin(out: Path, begun: dict[str, Any]) -> None:
    """Make the output folder; refuse one that holds something else."""
    check_out(out)
    file = out / BEGUN
    if file.is_file():
        before = read_json(file)
        other = [name for name in begun if before.get(name) != begun[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"{out} was begun with another {name} ({before.get(name)} instead of {begun[name]}): go on with that, "
                "or choose another folder."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: choose a new folder.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, begun)


def _part(out: Path, chunk: Chunk) -> Path:
    """The file of a chunk's part of the manifest; its name has a hash of the rows, so that changed rows are redone."""
    content = json.dumps([vars(sample) for sample in chunk.samples], sort_keys=True, default=str)
    return out / PARTS / f"{chunk.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.parquet"


def _is_done(out: Path, chunk: Chunk) -> bool:
    """Whether a chunk is in the manifest with all its pictures, and without errors that may not occur again."""
    import pyarrow.parquet

    part = _part(out, chunk)
    if not part.is_file():
        return False
    try:
        records = pyarrow.parquet.read_table(part).to_pylist()
    except (pyarrow.ArrowInvalid, OSError):  # damaged
        return False
    if not _are_of(chunk, records) or any(record["error"] and not record["for_good"] for record in records):
        return False
    return _hashes(out, records) == {record["file"]: record["sha256"] for record in records if record["file"]}


def _are_of(chunk: Chunk, records: list[dict[str, Any]]) -> bool:
    """Whether records belong to a chunk: they have its rows and all columns, and each has a picture or an error."""
    wanted = [_record(sample, 0.0) for sample in chunk.samples]
    if [list(record) for record in records] != [list(record) for record in wanted]:
        return False
    if any([record[name] for record in records] != [record[name] for record in wanted] for name in ("row", "image")):
        return False
    return all(isinstance(record["file"], str) and bool(record["file"]) != bool(record["error"]) for record in records)


def _hashes(out: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The SHA-256 of a chunk's existing pictures: another call with other rows may have overwritten them."""
    hashes = {}
    for place in {out / record["file"] for record in records if record["file"]}:
        with contextlib.suppress(OSError, KeyError, tarfile.TarError):
            if place.parent.suffix == ".tar":
                with tarfile.open(place.parent) as shard:
                    member = shard.extractfile(place.name)
                    assert member is not None  # a file, as ``_shard`` writes them
                    data = member.read()
            else:
                data = place.read_bytes()
            hashes[place.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return hashes


def _record(sample: Sample, seconds: float) -> dict[str, Any]:
    return {
        "row": sample.row,
        "image": sample.image,
        "prompt": str(sample.arguments["prompt"]),
        "seed": sample.arguments["seed"],
        "settings": "",
        "file": "",
        "sha256": "",
        "seconds": seconds,
        "error": "",
        "for_good": False,
    }


def _write_part(out: Path, chunk: Chunk, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), buffer)
    write_whole(_part(out, chunk), buffer.getvalue())


def _finish(out: Path, chunks: list[Chunk]) -> Path:
    """Write the parts of all chunks as one manifest, in the order of the rows."""
    import pyarrow as pa
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(_part(out, chunk)) for chunk in chunks]
    table = pa.concat_tables(parts) if parts else pa.table({"row": pa.array([], pa.int64())})
    if parts:
        table = table.sort_by([("row", "ascending"), ("image", "ascending")]).drop_columns(["for_good"])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    write_whole(out / MANIFEST, buffer.getvalue())
    return out / MANIFEST


def summary(manifest: Path) -> tuple[int, str]:
    """The number of pictures in a manifest, and a summary: what was made, what failed, and the first failure."""
    import pyarrow.parquet

    records = pyarrow.parquet.read_table(manifest).to_pylist()
    failed = [record for record in records if record["error"]]
    made = len(records) - len(failed)
    told = f"{made} pictures; {manifest} lists them with their settings"
    if failed:
        first = failed[0]
        told += f"\n{len(failed)} failed; the first is row {first['row']}: {first['error']}"
    return made, told


def _open(name: str, path: Any) -> Image.Image:
    if not isinstance(path, (str, Path)) or "\0" in str(path):
        raise ValueError(f"`{name}` must name a file, got {shown(path)}.")
    picture = open_own_file(Path(path))
    picture.load()  # not a copy, which would lose the format, and with it the meaning of the values
    return picture


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _shard(files: dict[str, bytes], records: list[dict[str, Any]]) -> bytes:
    """A tar file of pictures, each with its record in a JSON file beside it, as WebDataset expects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for record in records:
            if record["file"] not in files:
                continue
            told = {key: record[key] for key in ("prompt", "seed", "settings")}
            for name, data in (
                (record["file"], files[record["file"]]),
                (Path(record["file"]).stem + ".json", json.dumps(told).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
