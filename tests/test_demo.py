"""The demo in a real browser: it makes pictures, reports errors, and asks no other host for anything."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import sync_playwright

from ov_decidiffusion.__main__ import main
from ov_decidiffusion.demo import DemoBlocks, example_source, make_demo
from ov_decidiffusion.presets import PRESETS
from training.oracle import read_picture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(int8_pipe):
    demo = make_demo(int8_pipe)
    demo.launch(prevent_thread_lock=True, quiet=True)
    yield demo
    demo.close(verbose=False)


def test_listens_on_localhost_only(demo):
    assert demo.server_name == "127.0.0.1" and demo.share_url is None


def test_both_tabs_answer_over_http(demo, tmp_path):
    client = Client(demo.local_url, verbose=False, download_files=str(tmp_path))
    names = sorted(client.view_api(print_info=False, return_format="dict")["named_endpoints"])
    assert names == ["/image_to_image", "/text_to_image"]
    picture, used = client.predict(
        "a large red circle on a white background", "", "exact", 3, 12, 4, api_name="/text_to_image"
    )
    assert used == "seed 3"
    assert read_picture(Image.open(picture)).color == "red"

    source = tmp_path / "source.png"
    example_source(128).save(source)
    arguments = (handle_file(source), "a large green circle on a blue background", "", 0.8, "fast", 3, 12, 4)
    picture, _ = client.predict(*arguments, api_name="/image_to_image")
    assert Image.open(picture).size == (128, 128)
    with pytest.raises(Exception, match="Write a prompt first"):
        client.predict(" ", "", "exact", 3, 12, 4, api_name="/text_to_image")


def test_what_cannot_be_read_is_told_without_paths_or_tracebacks(demo, tmp_path, capfd):
    client = Client(demo.local_url, verbose=False)
    files = {
        "text.png": (b"hello", "source picture cannot be read"),
        "cut.jpg": (b"\xff\xd8\xff\xe0" + bytes(40), "source picture cannot be read"),
        "drawing.svg": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "SVG files are not supported",
        ),
        "large.png": (b"\x89PNG\r\n" + bytes(32_000_000), "exceeds the maximum file size"),
    }
    capfd.readouterr()
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        arguments = (handle_file(tmp_path / name), "a star", "", 0.8, "exact", 3, 2, 4)
        with pytest.raises(Exception, match=message) as refused:
            client.predict(*arguments, api_name="/image_to_image")
        if name != "large.png":  # which gradio's client refuses by the name that its user gave
            assert "/" not in str(refused.value)
    with pytest.raises(Exception, match="Steps has a value that cannot be used"):
        client.predict("a star", "", "exact", 3, "many", 4, api_name="/text_to_image")
    assert "Traceback" not in capfd.readouterr().err


def test_serves_no_file_that_it_did_not_make(demo, tmp_path):
    import httpx

    secret = tmp_path / "secret.txt"
    secret.write_text("for my eyes only")
    for path in (secret, "/etc/hostname", "requirements.txt", "README.md"):
        for route in ("gradio_api/file=", "file="):
            answer = httpx.get(f"{demo.local_url}{route}{path}")
            assert answer.status_code >= 400 and "for my eyes only" not in answer.text, path


def slowed(denoise, seen=None):
    """The same loop at ten steps a second at most."""

    def slowly(**arguments):
        for step in denoise(**arguments):
            time.sleep(0.1)
            if seen is not None:
                seen.append(step.index)
            yield step

    return slowly


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium")
def test_in_a_browser_it_makes_a_picture_stops_one_and_asks_no_other_host(demo, int8_pipe, monkeypatch):
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        page = browser.new_page()
        page.set_default_timeout(90_000)
        page.set_default_navigation_timeout(90_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        refused = []
        page.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
        page.goto(demo.local_url)
        page.get_by_label("Prompt", exact=True).first.fill("a large red circle on a white background")
        page.get_by_role("button", name="Generate").first.click()
        page.get_by_text(re.compile(r"^seed \d+$")).first.wait_for(timeout=60_000)
        monkeypatch.setattr(int8_pipe, "denoise", slowed(int8_pipe.denoise))
        page.get_by_label("number input for Steps").first.fill("100")
        page.get_by_role("button", name="Generate").first.click()
        page.get_by_text("denoising").first.wait_for(timeout=20_000)
        page.get_by_role("button", name="Stop").first.click()
        page.get_by_text(re.compile(r"^stopped after step \d+ of 100$")).first.wait_for(timeout=20_000)
        page.get_by_role("button", name="Stop").first.click()  # while nothing runs: harms no later picture
        page.wait_for_timeout(300)
        page.get_by_label("number input for Steps").first.fill("3")
        page.get_by_role("button", name="Generate").first.click()
        page.get_by_text(re.compile(r"^seed \d+$")).first.wait_for(timeout=20_000)
        page.get_by_label("Prompt", exact=True).first.fill("")
        page.get_by_role("button", name="Generate").first.click()
        page.get_by_text("Write a prompt first").first.wait_for(timeout=20_000)

        seen = []
        monkeypatch.setattr(int8_pipe, "denoise", slowed(type(int8_pipe).denoise.__get__(int8_pipe), seen))
        page.get_by_label("Prompt", exact=True).first.fill("a small red star")
        page.get_by_label("number input for Steps").first.fill("100")
        page.get_by_role("button", name="Generate").first.click()
        page.get_by_text("denoising").first.wait_for(timeout=20_000)
        page.close()  # whoever leaves frees the machine
        time.sleep(4)
        steps = len(seen)
        time.sleep(1)
        assert 0 < len(seen) == steps < 60
        browser.close()
    foreign = [url for url in asked if not url.startswith((demo.local_url, "data:", "blob:"))]
    assert len(asked) > 5 and not foreign and not refused


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
    assert arguments == {"server_name": "127.0.0.1", "server_port": None, "auth": None, "prevent_thread_lock": True}
    printed = capsys.readouterr().out
    assert str(quantization) in printed and f"{model_dir} is as it was written" in printed
    presets = [block for block in demo.blocks.values() if getattr(block, "label", None) == "Preset"]
    assert [[value for _, value in block.choices] for block in presets] == [list(PRESETS)] * 2


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


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch, demo):
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", "--port", str(demo.server_port)])
    start = time.perf_counter()
    with pytest.raises(SystemExit, match=f"port {demo.server_port} is taken"):
        main()
    assert time.perf_counter() - start < 5


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_picture_in_progress_cleanly_and_leaves_no_picture(model_dir, tmp_path, number, expected):
    command = [sys.executable, "-m", "ov_decidiffusion", "--model-dir", str(model_dir)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    address = next(line for line in process.stdout if "http://127.0.0.1" in line).split()[-1]
    client = Client(address, verbose=False, download_files=str(tmp_path / "client"))
    client.predict("a large red circle", "", "exact", 3, 2, 4, api_name="/text_to_image")
    assert list(tmp_path.glob("ov_decidiffusion-pictures-*/**/*.png"))
    job = client.submit("a large red circle", "", "exact", 3, 100, 4, api_name="/text_to_image")
    time.sleep(0.7)
    assert not job.done()
    process.send_signal(number)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == expected, printed
    assert "terminate called" not in printed and not list(tmp_path.glob("ov_decidiffusion-pictures-*"))


def test_answers_to_its_own_name_only_and_has_no_way_past_the_queue(demo):
    import httpx

    assert "DeciDiffusion on OpenVINO" in httpx.get(demo.local_url).text
    assert httpx.get(demo.local_url, headers={"Host": "evil.example"}).status_code == 400
    policy = httpx.get(demo.local_url).headers["content-security-policy"]
    assert "frame-ancestors" in policy and "form-action 'self'" in policy and "ws:" not in policy
    arguments = {"data": ["a star", "", "exact", 1, 1, 4], "fn_index": 0}
    for route in ("run/predict", "run/text_to_image", "api/text_to_image"):
        answer = httpx.post(f"{demo.local_url}gradio_api/{route}", json=arguments)
        assert answer.status_code >= 400, (route, answer.text[:200])
