"""Pictures from outside are looked at before anything is decoded, whatever they are and wherever they come from."""

import io
import os
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from conftest import UNIX_ONLY
from PIL import Image

from ov_decidiffusion.bulk.generate import generate
from ov_decidiffusion.demo import app
from ov_decidiffusion.demo.editor import picture_editor
from ov_decidiffusion.demo.sessions import Sessions
from ov_decidiffusion.web.uploads import MAX_CHUNKS, MAX_SCANS, UploadError, open_picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"  # Ghostscript would be run for it


def written(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


SMALL = written(Image.new("RGB", (8, 8), "red"))
PROGRESSIVE = written(Image.effect_noise((64, 64), 60).convert("RGB"), "JPEG", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
FRAME = b"\x08" + struct.pack(">HH", 64, 64)  # bits a sample, height and width
LARGE = PROGRESSIVE.replace(FRAME, b"\x08" + struct.pack(">HH", 7900, 7900), 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (EPS, "is damaged"),
        (b"hello", "is damaged"),
        (written(Image.new("RGB", (8, 8)), "TGA"), "is damaged"),
        (written(Image.new("1", (9000, 9000))), "has 9000x9000 pixels; at most 64 million"),
        (written(Image.new("1", (20000, 10000))), "has more pixels than can be read"),
        (SMALL + bytes(30_000_000), "has 30 MB; at most 30 MB are read"),
        (PROGRESSIVE[:-2] + MAX_SCANS * SCAN + b"\xff\xd9", "is a JPEG of 1.. scans; at most 100 are read"),
        (
            LARGE[:-2] + 20 * SCAN + b"\xff\xd9",
            "is a JPEG of 3. scans of 7900x7900 pixels; at most 24 of these are read",
        ),
        (SMALL[:33] + MAX_CHUNKS * chunk(b"zzZz") + SMALL[33:], "is a PNG of more than 20000 chunks"),
    ],
)
def test_what_is_not_taken_is_told_before_it_is_decoded(monkeypatch, data, said):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UploadError, match=said):
        open_picture(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_usual_kinds_are_taken(kind):
    picture = open_picture(written(Image.new("RGB", (8, 6), "red"), kind))
    assert picture.format == kind and picture.size == (8, 6)
    assert open_picture(PROGRESSIVE).size == (64, 64)
    many = written(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3)).astype(np.uint8)))
    assert open_picture(many).size == (900, 900)  # two megabytes in hundreds of chunks


def sent(editor: gr.ImageEditor, file: bytes, **fields) -> None:
    """As Gradio's route hands a form on, whose fields are text."""
    data = {"type": "background", "index": "null", "id": "one"} | fields
    editor.accept_blobs(SimpleNamespace(data=data, files=[("file", file)]))


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (SMALL, {"type": "layer", "index": "100000000"}),
        (SMALL, {"type": "layer", "index": "-1"}),
        (SMALL, {"type": "layer", "index": "abc"}),
        (SMALL, {"type": "other"}),
        (SMALL, {"id": "x" * 1000}),
        (EPS, {}),
        (SMALL + bytes(30_000_000), {}),
    ],
)
def test_the_editor_keeps_nothing_of_what_no_page_would_send(file, fields):
    from starlette.exceptions import HTTPException

    editor = picture_editor(type="pil")
    with pytest.raises(HTTPException) as refused:
        sent(editor, file, **fields)
    assert refused.value.status_code == 400 and not editor.blob_storage


def test_the_editor_keeps_a_bounded_number_of_bytes_and_the_latest():
    editor, file = picture_editor(type="pil"), SMALL + bytes(20_000_000)
    for number in range(12):
        sent(editor, file, id=f"visitor {number}")
    kept = [blobs.background for blobs in editor.blob_storage.values()]
    assert sum(map(len, kept)) <= 100_000_000 and "visitor 11" in editor.blob_storage
    sent(editor, SMALL, id="layered")
    sent(editor, SMALL, id="layered", type="layer", index="0")
    assert len(editor.blob_storage["layered"].layers) == 1


@UNIX_ONLY
def test_rows_of_tables_name_files_of_pictures_and_nothing_else(model_dir, tmp_path):
    (tmp_path / "print.png").write_bytes(EPS)
    os.mkfifo(tmp_path / "pipe.png")
    names = [str(tmp_path / name) for name in ("print.png", "pipe.png", "none.png")]
    rows = [{"prompt": "a fox", "image": name} for name in (*names, 7, "\0")]
    manifest = generate(rows, model_dir, tmp_path / "out", threads=1, inference_precision="f32", num_inference_steps=2)
    import pyarrow.parquet

    errors = [record["error"] for record in pyarrow.parquet.read_table(manifest).to_pylist()]
    no_name = "`image` must name a file"
    for error, said in zip(errors, ("is damaged", "is not a file", "there is no file", no_name, no_name), strict=True):
        assert said in error


def test_a_process_that_serves_others_keeps_only_the_readers_it_needs(tmp_path):
    """In a process of its own: what is taken out does not come back."""
    code = (
        "import io, sys\n"
        "from PIL import Image\n"
        "from ov_decidiffusion.web.uploads import keep_only_these_readers, open_picture\n"
        "buffer = io.BytesIO(); Image.new('RGB', (8, 8)).save(buffer, 'PNG')\n"
        "eps = io.BytesIO(); Image.new('RGB', (8, 8)).save(eps, 'EPS')\n"
        "keep_only_these_readers()\n"
        "open_picture(buffer.getvalue()).load()\n"
        "Image.open(buffer).load()\n"
        "try: Image.open(eps)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "UnidentifiedImageError"


def test_what_visitors_send_is_bounded_together_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_UPLOADS", 100)
    monkeypatch.setattr(app, "MAX_UPLOAD", 40)
    for i in range(5):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "sent.png").write_bytes(b"x" * 30)
        os.utime(tmp_path / str(i) / "sent.png", (i, i))
    app._make_room_for_uploads(tmp_path)
    assert sorted(file.parent.name for file in tmp_path.rglob("*.png")) == ["3", "4"]


def test_a_browsers_token_never_leads_to_a_programs_pictures():
    sessions = Sessions()
    try:
        program = sessions.of_program("abc")
        for token in ("session abc", "abc", ("program", "abc"), "program abc"):
            assert sessions.of(token)[1] is not program
        assert sessions.of_program("abc") is program
        assert sessions.of_program(None) is not sessions.of_program(None)
    finally:
        sessions.close()
