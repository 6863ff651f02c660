"""The demo as programs and the network see it: what it answers, refuses and serves, and how its command ends."""

import base64
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pandas
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from ov_decidiffusion.cli.main import main
from ov_decidiffusion.demo.app import MAX_SESSIONS, DemoBlocks
from ov_decidiffusion.demo.page import example_source
from ov_decidiffusion.demo.sessions import Sessions
from ov_decidiffusion.demo.studio import Studio
from ov_decidiffusion.generation.metadata import made_with, settings_of
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.oracle import read_picture

ROOT = Path(__file__).parents[2]


def test_listens_on_localhost_only(demo):
    assert demo.server_name == "127.0.0.1" and demo.share_url is None


def test_programs_are_answered_over_http(demo, int8_pipe, tmp_path):
    client = Client(demo.local_url, verbose=False, download_files=str(tmp_path))
    known = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert sorted(known) == ["/image_to_image", "/inpaint", "/stop", "/text_to_image"]
    assert "settings that make it again" in known["/text_to_image"]["description"]
    names = [parameter["parameter_name"] for parameter in known["/inpaint"]["parameters"]]
    assert names[:3] == ["image", "mask_image", "prompt"] and "num_inference_steps" in names and "solver" in names
    wanted = {"prompt": "a red car on a white background", "negative_prompt": ""}
    client.predict(api_name="/stop")  # where nothing runs, it stops nothing later
    file, settings = client.predict(**wanted, seed=3, num_inference_steps=12, api_name="/text_to_image")
    assert settings["seed"] == 3 and settings["num_inference_steps"] == 12
    assert "car" in read_picture(Image.open(file)).objects
    np.testing.assert_array_equal(np.asarray(int8_pipe(**settings_of(file)).images[0]), np.asarray(Image.open(file)))

    job = client.submit(**wanted, num_inference_steps=100, api_name="/text_to_image")
    while job.status().code.name != "PROCESSING":
        time.sleep(0.1)
    time.sleep(0.5)
    client.predict(api_name="/stop")
    with contextlib.suppress(AppError):  # or the picture so far, if there was one
        file = job.result(60)[0]
        assert Image.open(file).size == (128, 128) and made_with(file)["stopped_after_step"] < 100

    source, mask = tmp_path / "source.png", tmp_path / "mask.png"
    example_source(128).save(source)
    half = Image.new("L", (128, 128), 0)
    half.paste(255, [64, 0, 128, 128])
    half.save(mask)
    given = wanted | {"image": handle_file(source), "preset": "fast", "seed": 3}
    file, settings = client.predict(**given, api_name="/image_to_image")
    assert Image.open(file).size == (128, 128) and settings["strength"] == 0.8
    file, settings = client.predict(**given, mask_image=handle_file(mask), api_name="/inpaint")
    assert (np.asarray(Image.open(file))[:, :60] == np.asarray(example_source(128))[:, :60]).all()
    for wrong, message in (
        ({"prompt": " "}, "Write a prompt first"),
        ({"size": "huge"}, "The size must be written like 512x384"),
        ({"size": "100x100"}, "`width` must be a multiple of 8"),
        ({"num_inference_steps": 1000}, "At most 100 steps"),
        ({"solver": "eulr"}, "Did you mean 'euler'"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(**wanted | wrong, api_name="/text_to_image")


def png_of(width: int, height: int) -> bytes:
    """A black picture in one bit a pixel."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_what_cannot_be_read_is_told_without_paths_or_tracebacks(demo, tmp_path, capfd):
    client = Client(demo.local_url, verbose=False)
    files = {
        "text.png": (b"hello", "This picture is damaged"),
        "cut.jpg": (b"\xff\xd8\xff\xe0" + bytes(40), "This picture is damaged"),
        "drawing.svg": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "is damaged",
        ),
        "large.png": (b"\x89PNG\r\n" + bytes(32_000_000), "exceeds the maximum file size"),
        "wide.png": (png_of(9000, 9000), "has 9000x9000 pixels; at most 64 million are read"),
        "wider.png": (png_of(30000, 10000), "has more pixels than can be read"),
        "print.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "in another format than PNG, JPEG"),
    }
    capfd.readouterr()
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Exception, match=message) as refused:
            client.predict(
                image=handle_file(tmp_path / name), prompt="a fox", negative_prompt="", api_name="/image_to_image"
            )
        if name != "large.png":  # which gradio's client refuses by the name that its user gave
            assert "/" not in str(refused.value)
    with pytest.raises(Exception, match="num_inference_steps has a value that cannot be used"):
        client.predict(prompt="a fox", negative_prompt="", num_inference_steps="many", api_name="/text_to_image")
    words = {"prompt": "a fox", "negative_prompt": "", "api_name": "/image_to_image"}
    file = {"path": "cat.png", "meta": {"_type": "gradio.FileData"}}
    for odd, message in (
        ({"image": "cat.png"}, "a file has to be uploaded first"),
        ({"image": {**file, "path": "http://127.0.0.1:9/cat.png"}}, "addresses are not fetched"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(**words, **odd)
    call = f"{demo.local_url}gradio_api/call/image_to_image"
    for data in ([file, "a fox", "", 0.8, 1, 2, 3, "exact", "auto", "auto"], ["a fox"]):
        event = httpx.post(call, json={"data": data}).json()["event_id"]
        told = httpx.get(f"{call}/{event}").text
        assert "event: error" in told and "The inputs are not" in told and str(ROOT) not in told
    inline = {**file, "path": None, "url": "data:image/png;base64,iVBORw0KGgo="}
    data = [inline, "a fox", "", 0.8, 1, 2, 3, "exact", "auto", "auto"]
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    assert "addresses are not fetched" in httpx.get(f"{call}/{event}").text
    example_source(128).save(tmp_path / "source.png")
    source = handle_file(tmp_path / "source.png")
    made, settings = client.predict(**words, image=source, strength=None, num_inference_steps=2)
    assert settings["strength"] == 0.8
    assert "Traceback" not in capfd.readouterr().err


def test_serves_no_file_that_it_did_not_make(demo, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("for my eyes only")
    for path in (secret, "/etc/hostname", "requirements.txt", "README.md"):
        for route in ("gradio_api/file=", "file="):
            answer = httpx.get(f"{demo.local_url}{route}{path}")
            assert answer.status_code >= 400 and "for my eyes only" not in answer.text, path


def test_fetches_nothing_from_elsewhere_and_sends_nothing_there(demo):
    """Gradio would hand other hosts' files on as the page's own, and keep runs on the hub with the owner's token."""
    for place in (
        "file=https://example.com/x.png",
        "file=HTTP://127.0.0.1:9/",
        "file/https://example.com/x",
        "proxy=x",
    ):
        for route in (f"gradio_api/{place}", place, f"gradio_api/{place.replace('=', '%3D', 1)}"):
            answer = httpx.get(f"{demo.local_url}{route}")
            assert (answer.status_code, answer.text) == (403, "Nothing is fetched from elsewhere."), route
    for place in ("runs", "run-history/buckets"):
        assert httpx.get(f"{demo.local_url}gradio_api/{place}").status_code == 404


class Served(Exception):
    """Where a command would wait for its end."""


def run_command(monkeypatch, *arguments):
    """What a command launches: the demo, and the arguments that it is launched with."""
    served = []

    def launch(demo, **options):
        served.append((demo, options))
        raise Served

    monkeypatch.setattr(DemoBlocks, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", *arguments])
    with pytest.raises(Served):
        main()
    return served[0]


def test_the_command_serves_what_it_converted_and_quantized(quantization, model_dir, monkeypatch, capsys):
    demo, arguments = run_command(monkeypatch, "--model-dir", str(model_dir), "--quantize", "--check")
    own = {"server_name": "127.0.0.1", "server_port": None, "auth": None, "prevent_thread_lock": True}
    assert arguments == own | {"allowed_hosts": []}
    assert demo.studio.outputs == Path("outputs")
    printed = capsys.readouterr().out
    assert str(quantization) in printed and f"{model_dir} is as it was written" in printed
    assert f"{quantization.model_dir} is as it was written" in printed
    presets = [block for block in demo.blocks.values() if getattr(block, "label", None) == "Quality or speed"]
    assert [[value for _, value in block.choices] for block in presets] == [list(PRESETS)]


def test_other_machines_are_asked_for_a_password_unless_told_otherwise(monkeypatch, model_dir, capsys):
    command = ["demo", "--model-dir", str(model_dir), "--host", "0.0.0.0"]
    made, given, none = (
        run_command(monkeypatch, *command, *more)[1]["auth"] for more in ([], ["--auth", "ann:secret"], ["--no-auth"])
    )
    assert f"user: {made[0]}, password: {made[1]}" in capsys.readouterr().out and len(made[1]) >= 12
    assert given == ("ann", "secret") and none is None
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", *command, "--auth", "ann"])
    with pytest.raises(SystemExit, match="--auth must be USER:PASSWORD, got 'ann'"):
        main()
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", *command, "--auth", ""])  # of a variable that is not set
    with pytest.raises(SystemExit, match="--auth must be USER:PASSWORD, got ''"):
        main()


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch, demo):
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", "--port", str(demo.server_port)])
    monkeypatch.setattr(OVStableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"port {demo.server_port} is taken"):
        main()


def test_pictures_of_whoever_has_left_or_is_long_gone_are_deleted():
    sessions = Sessions(idle_seconds=0.5)
    _, session = sessions.of(None)
    kept = session.save(Image.new("RGB", (8, 8)), {"prompt": "a fox"}, "")
    assert kept.path.is_file()
    deadline = time.time() + 20
    while kept.path.exists() and time.time() < deadline:
        time.sleep(0.05)
    assert not kept.path.parent.exists()
    leaver = sessions.of_program("one")
    sessions.end_program("one")  # in the midst of a run
    assert leaver.save(Image.new("RGB", (8, 8)), {"prompt": "a fox"}, "") is None and not leaver.folder.exists()
    root = leaver.folder.parent
    sessions.close()
    assert not root.exists()


def test_what_pictures_were_made_from_takes_no_more_memory_than_there_is_for_it():
    sessions = Sessions()
    _, session = sessions.of(None)
    large, small = Image.new("RGB", (5000, 5000)), Image.new("RGB", (64, 64))
    for source in (small, small, large, large.copy(), small):
        session.save(small, {"prompt": "a fox"}, "", source, small)
    assert [kept.source is not None for kept in session.pictures] == [True, True, False, False, False]
    assert [kept.mask is not None for kept in session.pictures] == [True, True, False, False, False]
    assert sessions.of_program("a program").save(small, {"prompt": "a fox"}, "", small).source is None
    sessions.close()


@pytest.mark.at_length
def test_who_wants_a_faster_quality_is_offered_the_int8_models(small_model_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(small_model_dir, tmp_path / "own-fp16")
    pipe = OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")
    monkeypatch.setattr(type(pipe.models), "int8_pays", True)
    studio = Studio(pipe)
    assert "need INT8 models. They are made once, which takes about half a minute." in studio.missing_int8()
    assert Studio(pipe, offers_int8=False).missing_int8() == ""
    session = studio.sessions.of_program("one")
    with pytest.raises(ValueError, match="have them made, or choose Best"):
        studio.start({"prompt": "a fox", "preset": "fast"}, "one", session)
    assert all("Making the INT8 models" in told for told in studio.make_int8())
    assert pipe.quantized_parts and studio.missing_int8() == ""
    run = studio.make({"prompt": "a fox", "preset": "fast"}, "one", session)
    assert [progress for progress in run if progress.saved]
    studio.close()
    pipe.close()


def test_the_page_opens_with_pictures_that_the_model_draws(int8_pipe):
    for one in int8_pipe.defaults["showcase"]:
        with Image.open(io.BytesIO(base64.b64decode(one["webp"]))) as kept:
            drawn = int8_pipe(one["prompt"], seed=one["seed"]).images[0]
            apart = np.asarray(kept.convert("RGB"), float) - np.asarray(drawn, float)
        assert np.sqrt(np.mean(apart**2)) < 8, one["prompt"]  # of 255: WebP is lossy


def test_nothing_is_decoded_for_whoever_has_left(int8_pipe, monkeypatch):
    studio = Studio(int8_pipe)
    session = studio.sessions.of_program("one")
    run = studio.make({"prompt": "a fox", "num_inference_steps": 8}, "one", session)
    next(run), next(run)
    studio.queue.forget("one")
    monkeypatch.setattr(int8_pipe, "finish", lambda *_: pytest.fail("decoded for nobody"))
    assert not [seen for seen in run if seen.saved] and not session.folder.exists()
    studio.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SIGINT", 130),
        *(pytest.param(*one, marks=pytest.mark.at_length) for one in (("SIGTERM", 143), ("SIGHUP", 129))),
    ],
)
def test_a_signal_ends_a_picture_in_progress_cleanly_and_leaves_no_picture(model_dir, tmp_path, name, expected):
    command = [sys.executable, "-m", "ov_decidiffusion", "--model-dir", str(model_dir)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(getattr(signal, name), signal.SIG_DFL),  # a job in the background ignores some
    )
    address = next(line for line in process.stdout if "http://127.0.0.1" in line).split()[-1]
    client = Client(address, verbose=False, download_files=str(tmp_path / "client"))
    wanted = {"prompt": "a red car", "negative_prompt": "", "api_name": "/text_to_image"}
    client.predict(**wanted, num_inference_steps=2)
    assert list(tmp_path.glob("ov_decidiffusion-*/**/*.png"))
    job = client.submit(**wanted, num_inference_steps=100)
    time.sleep(0.7)
    assert not job.done()
    process.send_signal(getattr(signal, name))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == expected, printed
    assert "terminate called" not in printed and not list(tmp_path.glob("ov_decidiffusion-*/**/*.png"))


def test_answers_to_its_own_name_only_and_has_no_way_past_the_queue(demo):
    assert "DeciDiffusion on OpenVINO" in httpx.get(demo.local_url).text
    assert httpx.get(demo.local_url, headers={"Host": "evil.example"}).status_code == 400
    upload = {"files": {"files": ("x.png", b"x")}}
    for origin, status in (("http://evil.example", 403), ("null", 403), (demo.local_url.rstrip("/"), 200), (None, 200)):
        headers = {} if origin is None else {"Origin": origin}
        assert httpx.post(f"{demo.local_url}gradio_api/upload", headers=headers, **upload).status_code == status
    policy = httpx.get(demo.local_url).headers["content-security-policy"]
    assert "frame-ancestors" in policy and "form-action 'self'" in policy and "ws:" not in policy
    arguments = {"data": ["a fox", "", 1, 1, 4, "exact", "auto", "auto"], "fn_index": 0}
    for route in ("run/predict", "run/text_to_image", "api/text_to_image"):
        answer = httpx.post(f"{demo.local_url}gradio_api/{route}", json=arguments)
        assert answer.status_code >= 400, (route, answer.text[:200])


def test_no_more_sessions_are_kept_than_memory_is_meant_for(demo):
    for number in range(MAX_SESSIONS + 20):
        demo.app.state_holder[f"visitor {number}"]
    assert len(demo.app.state_holder.session_data) == MAX_SESSIONS


def test_a_call_makes_no_table_of_all_calls_before_it(demo, monkeypatch):
    """Gradio's own account of its calls, in tables whose texts Arrow keeps, took 15 MB a minute of many clients."""
    made = []
    monkeypatch.setattr(pandas, "DataFrame", lambda *arguments, **options: made.append(arguments))
    client = Client(demo.local_url, verbose=False, download_files=False)
    for _ in range(2):
        client.predict("a fox", num_inference_steps=1, api_name="/text_to_image")
    assert not made
    assert httpx.get(f"{demo.local_url}monitoring/summary").status_code == 403


def test_one_small_request_cannot_make_the_editor_allocate_gigabytes(demo):
    config = httpx.get(f"{demo.local_url}config").json()
    (editor,) = [one["id"] for one in config["components"] if one["type"] == "imageeditor"]
    kept = io.BytesIO()
    Image.new("RGB", (8, 8)).save(kept, "PNG")
    fields = {"type": "layer", "id": "one", "session_hash": "x", "component_id": str(editor), "fn_name": "accept_blobs"}
    for index, status in (("100000000", 400), ("-5", 400), ("many", 400), ("0", 200)):
        answer = httpx.post(
            f"{demo.local_url}gradio_api/component_server",
            data=fields | {"index": index},
            files={"file": ("blob", kept.getvalue(), "image/png")},
        )
        assert answer.status_code == status, (index, answer.text)
