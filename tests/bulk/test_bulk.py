"""Many pictures: the same however the work is spread, resumed after any kill, and no row ends the job."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import UNIX_ONLY
from PIL import Image

from ov_decidiffusion.bulk.generate import generate
from ov_decidiffusion.bulk.rows import make_chunks, make_samples, read_rows
from ov_decidiffusion.cli.main import main
from ov_decidiffusion.demo.studio import arguments_of
from ov_decidiffusion.generation.metadata import settings_of

ROWS = [
    {"prompt": "a fox in the snow", "seed": 7},
    {"prompt": "a lion in the desert"},
    {"prompt": "a whale under water", "num_images": 2},
    {"prompt": "an owl in a forest at night", "num_inference_steps": 3},
    {"prompt": "a pizza in space", "num_inference_steps": 0},  # is refused by the pipeline
    {"prompt": None},  # is refused before
    {"prompt": "a fox in the snow", "colour": "red"},
]
SHORT = {"num_inference_steps": 4}
EXACT = {"inference_precision": "f32", "threads": 1}


def records(manifest: Path) -> list[dict]:
    return pyarrow.parquet.read_table(manifest).to_pylist()


def sums(manifest: Path) -> dict[str, str]:
    """Of all pictures, by row and number; each file read again."""
    found = {}
    for record in records(manifest):
        if record["file"]:
            data = (manifest.parent / record["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == record["sha256"]
            found[f"{record['row']}-{record['image']}"] = record["sha256"]
    return found


def without_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    """All rows in this process."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return generate(ROWS, model_dir, tmp_path_factory.mktemp("bulk") / "alone", **EXACT, **SHORT)


def test_every_row_is_a_picture_of_the_pipeline_or_an_error(alone, pipe):
    found = records(alone)
    assert [(record["row"], record["image"]) for record in found] == [(i, 0) for i in (0, 1)] + [
        (2, 0), (2, 1), (3, 0), (4, 0), (5, 0), (6, 0)
    ]  # fmt: skip
    assert [bool(record["error"]) for record in found] == [False] * 5 + [True] * 3
    assert "`num_inference_steps` must be a whole number from 1 to 1000, got 0" in found[5]["error"]
    assert "there is no column 'colour'" in found[7]["error"]
    for record in found[:5]:
        with Image.open(alone.parent / record["file"]) as picture:
            again = pipe(**settings_of(picture)).images[0]
            assert np.abs(np.asarray(picture, int) - np.asarray(again, int)).max() <= 1
            assert json.loads(record["settings"])["arguments"]["seed"] == record["seed"]
    assert found[2]["seed"] + 1 == found[3]["seed"] and found[0]["seed"] == 7


def test_no_row_ends_the_job_whatever_it_holds(model_dir, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    odd = [
        {"prompt": "a \ud800 b"},
        {"prompt": "a fox", "seed": 2**70},
        {"prompt": "a fox", "num_images": 10**9},
        {"prompt": "a fox", None: ["in the snow"]},
        ["a fox"],
        {"prompt": ["a fox"]},
        {"prompt": "a fox in the snow", "seed": np.int64(7), "num_inference_steps": np.int32(2)},
    ]
    found = records(generate(odd, model_dir, tmp_path / "out", **EXACT))
    assert [bool(record["error"]) for record in found] == [True] * 6 + [False]
    said = ["half of a character", "`seed`", "`num_images` must be .* 1 to 1000", "more values than columns"]
    said += ["a row must be a dictionary", "`prompt` must be a string"]
    for record, words in zip(found, said, strict=False):
        assert re.search(words, record["error"]), record


def test_files_that_cannot_be_read_are_told_by_name(tmp_path):
    for name, content, said in (
        ("latin.txt", "ein Füchslein".encode("latin-1"), "is not UTF-8"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("long.csv", b"prompt\n" + b"a" * 200_000, "cannot be read: field larger"),
        ("bad.parquet", b"PAR1", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            list(read_rows(tmp_path / name))


def test_what_was_lost_or_damaged_is_made_again(model_dir, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    manifest = generate(ROWS[:2], model_dir, tmp_path / "out", **EXACT, **SHORT)
    before = sums(manifest)
    for part in (tmp_path / "out" / "manifest").iterdir():
        part.write_bytes(part.read_bytes()[:100])
    assert sums(generate(ROWS[:2], model_dir, tmp_path / "out", **EXACT, **SHORT)) == before
    next((tmp_path / "out" / "pictures").rglob("*.png")).unlink()
    assert sums(generate(ROWS[:2], model_dir, tmp_path / "out", **EXACT, **SHORT)) == before


@pytest.mark.parametrize("output_format", ["png", "webdataset"])
def test_a_picture_that_other_rows_were_written_over_is_made_again(model_dir, tmp_path, monkeypatch, output_format):
    without_ray(monkeypatch)
    more = {"output_format": output_format} | EXACT | SHORT
    for row in (0, 1, 0):
        manifest = generate([ROWS[row] | {"seed": 1}], model_dir, tmp_path / "out", **more)
    ((record,),) = [records(manifest)]
    place = tmp_path / "out" / record["file"]
    if output_format == "png":
        data = place.read_bytes()
    else:
        with tarfile.open(place.parent) as shard:
            data = shard.extractfile(place.name).read()
    assert hashlib.sha256(data).hexdigest() == record["sha256"]
    assert settings_of(Image.open(io.BytesIO(data)))["prompt"] == record["prompt"] == ROWS[0]["prompt"]


def test_what_failed_for_want_of_memory_is_made_by_the_next_call(model_dir, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    asked = (ROWS[:2], model_dir, tmp_path / "out")
    monkeypatch.setenv("OV_DECIDIFFUSION_MEMORY_GB", "0.001")
    assert all("GB of memory" in record["error"] for record in records(generate(*asked, **EXACT, **SHORT)))
    monkeypatch.delenv("OV_DECIDIFFUSION_MEMORY_GB")
    assert not any(record["error"] for record in records(generate(*asked, **EXACT, **SHORT)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_scal": 3}, "guidance_scal"),
        ({"preset": "fats"}, "`preset`"),
        ({"device": "CPUU"}, "`device`"),
        ({"inference_precision": "f64"}, "`inference_precision`"),
        ({"threads": 0}, "`threads`"),
        ({"rows": 42}, "`rows` must be a file"),
        ({"rows": "missing.txt"}, "No such file"),
        ({"rows": "prompts.doc"}, "end in .txt"),
        ({"model_dir": "nowhere"}, "`model_dir` .*nowhere does not exist"),
        ({"out": ""}, "`out`"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_folder_is_begun(model_dir, tmp_path, wrong, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        generate(**{"rows": ROWS[:1], "model_dir": model_dir, "out": tmp_path / "out", "threads": 1} | wrong)
    assert not (tmp_path / "out").exists()


def test_one_precision_is_decided_for_all_however_the_device_is_written(model_dir, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    for device in ("CPU", "cpu"):  # the second call would be refused if it came to another
        generate(ROWS[:1], model_dir, tmp_path / "out", device=device, threads=1, **SHORT)
    assert json.loads((tmp_path / "out" / "bulk.json").read_text())["precision"] in ("f32", "bf16")


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, started once: bulk uses what runs already."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.mark.at_length
@pytest.mark.parametrize("actors", [1, 2, 4])
def test_actors_make_the_same_pictures(alone, cluster, model_dir, tmp_path, actors):
    spread = generate(ROWS, model_dir, tmp_path / "spread", actors=actors, **EXACT, **SHORT)
    assert sums(spread) == sums(alone)
    assert [record["error"] for record in records(spread)] == [record["error"] for record in records(alone)]


@pytest.mark.at_length
def test_rows_for_actors_may_name_files_by_paths(cluster, model_dir, tmp_path):
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    rows = [{"prompt": "a fox in the snow", "image": tmp_path / "red.png"}]
    (record,) = records(generate(rows, model_dir, tmp_path / "out", actors=1, **EXACT, **SHORT))
    assert record["file"] and not record["error"]


def test_without_ray_one_pipeline_here_does_the_actors_work(alone, model_dir, tmp_path, monkeypatch, caplog):
    without_ray(monkeypatch)
    here = generate(ROWS, model_dir, tmp_path / "here", actors=2, **EXACT, **SHORT)  # in the same batches
    assert "Ray is not installed" in caplog.text
    assert sums(here) == sums(alone)
    with pytest.raises(ValueError, match="`ray_address` needs Ray"):
        generate(ROWS[:2], model_dir, tmp_path / "there", ray_address="ray://nowhere:10001", **EXACT, **SHORT)


def test_a_finished_job_does_nothing_and_a_changed_one_is_refused(alone, model_dir, monkeypatch):
    without_ray(monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in alone.parent.rglob("*.png")}
    generate(ROWS, model_dir, alone.parent, **EXACT, **SHORT)
    assert {file: file.stat().st_mtime_ns for file in alone.parent.rglob("*.png")} == before
    with pytest.raises(ValueError, match="begun with another defaults"):
        generate(ROWS, model_dir, alone.parent, **EXACT, num_inference_steps=5)
    with pytest.raises(ValueError, match="holds other files"):
        generate(ROWS, model_dir, model_dir, **EXACT, **SHORT)


@UNIX_ONLY
@pytest.mark.at_length
@pytest.mark.parametrize("whom", ["driver", "actor"])
def test_whatever_is_killed_the_same_call_goes_on(model_dir, tmp_path, whom):
    if whom == "actor":
        pytest.importorskip("ray")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"a fox on a beach {i}" for i in range(60)))
    code = (
        "from ov_decidiffusion.bulk.generate import generate\n"
        f"generate({str(prompts)!r}, {str(model_dir)!r}, {str(out)!r}, inference_precision='f32', threads=1, "
        f"actors={None if whom == 'driver' else 2}, num_inference_steps=6)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.time() + 120
    while len(list(out.glob("manifest/*.parquet"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    done = {file: file.read_bytes() for file in out.glob("manifest/*.parquet")}
    assert 2 <= len(done) < 8
    if whom == "driver":
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.parquet").exists()
        assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
    else:
        assert subprocess.run(["pkill", "-KILL", "-f", "ray::.*Actor|ray::.*Map"]).returncode == 0
        assert process.wait(300) == 0
    assert all(file.read_bytes() == data for file, data in done.items()), "nothing is made twice"
    assert len(sums(out / "manifest.parquet")) == 60
    assert not [file for file in out.rglob(".*")], "no half file is left"


def test_shards_hold_pictures_and_what_they_were_made_with(model_dir, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    manifest = generate(ROWS[:3], model_dir, tmp_path / "out", output_format="webdataset", **EXACT, **SHORT)
    for record in records(manifest):
        shard, name = record["file"].rsplit("/", 1)
        with tarfile.open(tmp_path / "out" / shard) as members:
            data = members.extractfile(name).read()
            told = json.load(members.extractfile(name.replace(".png", ".json")))
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
        assert told["prompt"] == record["prompt"] and Image.open(io.BytesIO(data)).size == (128, 128)


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = [{"prompt": "a fox, in the snow", "seed": 3, "guidance_scale": 2.5}, {"prompt": "an owl"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "seed", "guidance_scale"])
        writer.writeheader()
        writer.writerows(rows)
    table = pyarrow.Table.from_pylist(rows, schema=None)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    expected = list(make_samples(rows, {}))
    for ending in ("jsonl", "csv", "parquet"):
        assert list(make_samples(read_rows(tmp_path / f"rows.{ending}"), {})) == expected, ending
    (tmp_path / "rows.txt").write_text("a fox\n\nan owl\n", encoding="utf-8")
    assert [sample.arguments["prompt"] for sample in make_samples(read_rows(tmp_path / "rows.txt"), {})] == [
        "a fox",
        "an owl",
    ]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n[1]\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="got 'rows.xml'"):
        list(read_rows(tmp_path / "rows.xml"))


def test_what_runs_together_has_the_same_settings():
    rows = [{"prompt": str(i), "num_inference_steps": 3 + i // 4} for i in range(10)]
    chunks = list(make_chunks(make_samples(rows, {}), 3))
    assert [len(chunk.samples) for chunk in chunks] == [3, 1, 3, 1, 2]
    assert all(chunk.shared == {"num_inference_steps": 3 + chunk.samples[0].row // 4} for chunk in chunks)


def bulk(monkeypatch, model_dir, tmp_path, name: str, text: str) -> Path:
    """The command, in this process."""
    (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    options = ["--model-dir", str(model_dir), "--threads", "1", "--inference-precision", "f32"]
    monkeypatch.setattr(sys, "argv", ["ov-decidiffusion", "bulk", str(tmp_path / name), "--out", str(out), *options])
    main()
    return out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("bars.csv", "prompt|seed\na fox|1\n", "no column 'prompt|seed'.*separated by commas"),
        ("unclosed.csv", 'prompt,seed\n"a fox,1\na dog,2\n', "cannot be read: unexpected end of data"),
        ("other.csv", "id,prompt\n7,a fox\n", "there is no column 'id'"),
        ("no_prompt.csv", "seed\n1\n", "there is no column `prompt`"),
        ("header.csv", "prompt\n", "holds no rows"),
        ("empty.txt", "", "holds no rows"),
        ("blank.jsonl", "\n\n", "holds no rows"),
    ],
)
def test_a_table_of_which_nothing_can_be_made_is_refused_before_anything_begins(
    monkeypatch, model_dir, tmp_path, name, text, said
):
    with pytest.raises(SystemExit, match=said):
        bulk(monkeypatch, model_dir, tmp_path, name, text)
    assert not (tmp_path / "out").exists()


def test_the_command_counts_what_failed_and_fails_if_nothing_was_made(monkeypatch, model_dir, tmp_path, capsys):
    good, bad = '{"prompt": "a fox", "num_inference_steps": 1}', '{"prompt": "a dog", "seed": -1}'
    bulk(monkeypatch, model_dir, tmp_path, "one.jsonl", f"{good}\n{bad}\n")
    told = capsys.readouterr().out
    assert "1 pictures" in told and "1 failed; the first is row 1: ValueError: `seed` must be a whole number" in told
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit, match="no picture was made"):
        bulk(monkeypatch, model_dir, tmp_path, "none.jsonl", bad)
    assert "0 pictures" in capsys.readouterr().out


def test_seeds_are_as_large_as_other_programs_draw_them():
    (sample,) = make_samples([{"prompt": "a fox", "seed": 2**32 - 1}], {})
    assert not sample.error and sample.arguments["seed"] == 2**32 - 1
    assert arguments_of(prompt="a fox", seed=2**32 - 1)["seed"] == [2**32 - 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("floats.csv", "prompt,seed\na fox,1.0\na dog,\n"),
        ("semicolons.csv", "prompt;seed\na fox;1\na dog;2\n"),
        ("tabs.tsv", "prompt\tseed\na fox\t1\n"),
        ("CAPITALS.CSV", "prompt,seed\na fox,1\n"),
        ("index.csv", ",prompt,seed\n0,a fox,1\n1,a dog,2\n"),
        ("comma_at_end.csv", "prompt,seed,\na fox,1,\n"),
        ("spaces.csv", "prompt, seed\na fox, 1\n"),
        ("empty_rows.csv", "prompt,seed\na fox,1\n,\n,\n"),
        ("floats.jsonl", '{"prompt": "a fox", "seed": 1.0, "num_images": 1.0}\n{"prompt": "a dog", "seed": NaN}\n'),
    ],
)
def test_tables_are_read_as_spreadsheets_and_pandas_write_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    first, *others = make_samples(read_rows(tmp_path / name), {})
    assert first.arguments == {"prompt": "a fox", "seed": 1} and type(first.arguments["seed"]) is int
    assert not [sample.error for sample in (first, *others) if sample.error]


def test_flags_and_numbers_of_tables_and_what_is_no_whole_number(tmp_path):
    (tmp_path / "flags.csv").write_text("prompt,prompt_syntax,num_inference_steps\na fox,TRUE,4\na dog,False,4.0\n")
    samples = list(make_samples(read_rows(tmp_path / "flags.csv"), {}))
    assert [sample.arguments["prompt_syntax"] for sample in samples] == [True, False]
    assert [sample.arguments["num_inference_steps"] for sample in samples] == [4, 4]
    (half,) = make_samples([{"prompt": "a fox", "seed": 1.5}], {})
    assert "`seed` must be a whole number" in half.error
    frame = pyarrow.table({"prompt": ["a fox"], "seed": [float("nan")], "__index_level_0__": [7]})
    pyarrow.parquet.write_table(frame, tmp_path / "frame.parquet")
    (sample,) = make_samples(read_rows(tmp_path / "frame.parquet"), {})
    assert not sample.error and sample.arguments["prompt"] == "a fox"


@pytest.mark.parametrize("spoiled", ["other columns", "no rows", "neither file nor error", "another row"])
def test_a_part_of_the_manifest_that_is_not_the_chunks_own_is_made_again(loaded_worker_folder, spoiled):
    rows, out, make = loaded_worker_folder
    manifest = make()
    good = pyarrow.parquet.read_table(manifest).to_pylist()
    (part,) = (out / "manifest").iterdir()
    records = pyarrow.parquet.read_table(part)
    wrong = {
        "other columns": pyarrow.table({"a": [1]}),
        "no rows": records.slice(0, 0),
        "neither file nor error": pyarrow.Table.from_pylist([one | {"file": None} for one in records.to_pylist()]),
        "another row": pyarrow.Table.from_pylist([one | {"row": one["row"] + 1} for one in records.to_pylist()]),
    }
    pyarrow.parquet.write_table(wrong[spoiled], part)
    again = pyarrow.parquet.read_table(make()).to_pylist()
    assert [(one["row"], one["sha256"]) for one in again] == [(one["row"], one["sha256"]) for one in good]


@pytest.fixture(scope="module")
def loaded_worker_folder(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("bulk") / "out"
    rows = [{"prompt": "a fox", "seed": seed, "num_inference_steps": 1} for seed in (1, 2)]

    def make():
        (out / "manifest.parquet").unlink(missing_ok=True)
        return generate(rows, model_dir, out)

    return rows, out, make


def test_a_target_is_judged_before_the_work(monkeypatch, model_dir, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="is a link to .*nowhere, which is not there"):
        bulk(monkeypatch, model_dir, tmp_path, "one.jsonl", '{"prompt": "a fox"}')
