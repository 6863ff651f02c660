"""The server, spoken to by OpenAI's own client."""

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import gradio_client
import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from ov_decidiffusion.cli.main import main
from ov_decidiffusion.demo.app import mount_demo
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.generation.metadata import settings_of
from ov_decidiffusion.server import app as server_app
from ov_decidiffusion.server.app import _finished, create_app, under_known_names_only
from ov_decidiffusion.server.batching import Batcher
from ov_decidiffusion.web.guards import check_allowed_hosts
from ov_decidiffusion.web.queue import Queue

ROOT = Path(__file__).parents[2]
PROMPT = "a fox in the snow"
STEPS = {"num_inference_steps": 6}


class Served:
    """An application in a thread, on a port of its own."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def address(loaded_pipe):
    app = create_app(loaded_pipe, max_waiting=3)
    under_known_names_only(app)
    with Served(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def slow(loaded_pipe, monkeypatch):
    """The same loop at ten steps a second at most; tells what ran."""
    runs, denoise = [], type(loaded_pipe).denoise

    def slowly(*prompt, **arguments):
        runs.append([])
        for step in denoise(loaded_pipe, *prompt, **arguments):
            time.sleep(0.1)
            runs[-1].append((step.index, len(step.latents)))
            yield step

    monkeypatch.setattr(loaded_pipe, "denoise", slowly)
    return runs


def picture_of(data) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def differ(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())


def test_pictures_are_the_pipelines(client, pipe):
    more = STEPS | {"seed": 5, "guidance_scale": 4.0, "negative_prompt": "white", "solver": "euler"}
    made = client.images.generate(prompt=PROMPT, n=2, size="128x128", extra_body=more)
    assert [one.seed for one in made.data] == [5, 6] and made.created > 1.7e9
    for one, seed in zip(made.data, (5, 6), strict=True):
        expected = pipe(PROMPT, **more | {"seed": seed}).images[0]
        assert differ(picture_of(one), expected) <= 1
        assert settings_of(picture_of(one))["seed"] == seed
    jpeg = client.images.generate(prompt=PROMPT, output_format="jpeg", extra_body={"rng_seed": 5} | STEPS)
    assert picture_of(jpeg.data[0]).format == "JPEG"
    assert settings_of(picture_of(jpeg.data[0]))["seed"] == 5
    linked = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 5} | STEPS)
    kind, _, coded = linked.data[0].url.partition(",")
    assert kind == "data:image/png;base64" and settings_of(Image.open(io.BytesIO(base64.b64decode(coded))))["seed"] == 5
    small = client.images.generate(
        prompt=PROMPT, output_format="webp", output_compression=20, extra_body={"seed": 5} | STEPS
    )
    large = client.images.generate(prompt=PROMPT, output_format="webp", extra_body={"seed": 5} | STEPS)
    assert len(small.data[0].b64_json) < 0.7 * len(large.data[0].b64_json)


def test_edits_leave_what_is_opaque_in_the_mask(client, pipe):
    source = pipe("a house in a meadow", seed=1).images[0]
    mask = Image.new("RGBA", source.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), [64, 0, 128, 128])
    given = {"prompt": PROMPT, "image": ("source.png", png(source), "image/png")}
    made = client.images.edit(**given, mask=("mask.png", png(mask), "image/png"), extra_body=STEPS | {"seed": 5})
    made, was = np.asarray(picture_of(made.data[0]), int), np.asarray(source, int)
    assert (made[:, :64] == was[:, :64]).all() and np.abs(made - was)[:, 72:].mean() > 10
    whole = client.images.edit(**given, extra_body=STEPS | {"seed": 5, "strength": 0.6})
    expected = pipe(PROMPT, image=source, strength=0.6, seed=5, **STEPS).images[0]
    assert differ(picture_of(whole.data[0]), expected) <= 1


def test_several_pictures_are_edited_each(client, pipe):
    sources = pipe(["a house in a meadow", "a sailboat on the sea"], seed=[1, 2], num_inference_steps=4).images
    files = [(f"{i}.png", png(one), "image/png") for i, one in enumerate(sources)]
    more = STEPS | {"seed": 5, "strength": 0.5}
    made = client.images.edit(prompt=PROMPT, image=files, n=2, extra_body=more)
    expected = pipe(
        [PROMPT] * 4, image=[sources[i] for i in (0, 0, 1, 1)], seed=[5, 6, 7, 8], strength=0.5, **STEPS
    ).images
    assert [differ(picture_of(one), other) <= 1 for one, other in zip(made.data, expected, strict=True)] == [True] * 4
    with pytest.raises(openai.BadRequestError, match="`n` pictures of each of 2 are 12; at most 10 are made"):
        client.images.edit(prompt=PROMPT, image=files, n=6, extra_body=more)
    with pytest.raises(openai.BadRequestError, match="A `mask` goes with one `image`"):
        client.images.edit(prompt=PROMPT, image=files, mask=files[0], extra_body=more)


@pytest.mark.parametrize(
    ("asked", "more", "kind", "param", "message"),
    [
        ({"size": "100x100"}, {}, openai.BadRequestError, "size", "multiples of 8, got '100x100'"),
        (
            {"size": "16384x64", "output_format": "webp"},
            {},
            openai.BadRequestError,
            "size",
            "`size` 16384x64 is too long for webp",
        ),
        ({"n": 11}, {}, openai.BadRequestError, "n", "`n` must be from 1 to 10"),
        ({"background": "transparent"}, {}, openai.BadRequestError, "background", "must be auto or opaque"),
        ({"output_compression": 50}, {}, openai.BadRequestError, "output_compression", "png being exact"),
        ({}, {"partial_images": 2}, openai.BadRequestError, "partial_images", "is not offered"),
        ({}, {"stream": True}, openai.BadRequestError, "stream", "is not offered"),
        ({"model": "x" * 500_000}, {}, openai.NotFoundError, "model", "There is no model 'xxx"),
        ({"response_format": "file"}, {}, openai.BadRequestError, "response_format", "must be b64_json or url"),
        ({"model": "dall-e-3"}, {}, openai.NotFoundError, "model", "There is no model 'dall-e-3' here, only"),
        ({}, {"steps": 5}, openai.BadRequestError, "steps", "`steps` is no field of a request; there are prompt, "),
        ({}, {"num_inference_steps": "many"}, openai.BadRequestError, "num_inference_steps", "integer, got 'many'"),
        ({}, {"guidance_scale": -1}, openai.BadRequestError, "guidance_scale", "`guidance_scale` must be a number"),
        ({}, {"solver": "eulr"}, openai.BadRequestError, "solver", "Did you mean 'euler'"),
        ({"prompt": "a (star:50)"}, {}, openai.BadRequestError, "prompt", "`prompt` weighs 'star' by 50"),
        ({}, {"strength": 0.5}, openai.BadRequestError, "strength", "/images/edits"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(client, asked, more, kind, param, message):
    with pytest.raises(kind) as refused:
        client.images.generate(**{"prompt": PROMPT} | asked, extra_body=more)
    assert refused.value.param == param and message in refused.value.message
    assert refused.value.type == "invalid_request_error"


def test_what_is_no_request_is_told_so(address):
    for content, param, said in (
        ('{"prompt": "a', None, "no JSON"),
        ("[]", None, "no JSON"),
        ("{}", "prompt", "missing"),
    ):
        form = {"Content-Type": "application/json"}
        answer = httpx.post(f"{address}/v1/images/generations", content=content, headers=form)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and said in error["message"], error


def test_values_that_ask_for_nothing_special_are_taken(client):
    """OpenAI's own defaults, which its clients and others' send."""
    neutral = {"stream": False, "partial_images": 0, "background": "auto", "output_compression": 100, "seed": 1}
    assert client.images.generate(prompt=PROMPT, extra_body=neutral | STEPS).data


def test_what_cannot_be_read_of_a_request_is_told(address, monkeypatch):
    url = f"{address}/v1/images/edits"
    odd = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na fox\r\n--x--\r\n'
    answer = httpx.post(url, content=form, headers=odd)
    assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    for place, kind, begin in (
        ("edits", "multipart/form-data; boundary=x", file),
        ("generations", "application/json", b'{"prompt": "'),
    ):
        pieces = iter([begin, *[b"x" * 1_000_000] * 40])  # without being told how many there are
        answer = httpx.post(f"{address}/v1/images/{place}", content=pieces, headers={"Content-Type": kind})
        assert answer.status_code == 413 and "larger than" in answer.json()["error"]["message"]
    monkeypatch.setattr(server_app, "PIECE_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as half:
        half.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in half.recv(100)


def test_seeds_count_on_from_the_largest_to_0(client, pipe):
    made = client.images.generate(prompt=PROMPT, n=2, extra_body=STEPS | {"seed": 2**32 - 1})
    assert [one.seed for one in made.data] == [2**32 - 1, 0]
    assert differ(picture_of(made.data[1]), pipe(PROMPT, seed=0, **STEPS).images[0]) <= 1


def test_files_that_are_none_and_too_large_ones_are_refused(client, address):
    with pytest.raises(openai.BadRequestError, match="`image` is damaged"):
        client.images.edit(prompt=PROMPT, image=("text.png", b"hello", "image/png"))
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.edit(prompt=PROMPT, image=("large.png", bytes(31_000_000), "image/png"))
    assert refused.value.status_code == 413
    chunks = (bytes(1_000_000) for _ in range(32))
    assert httpx.post(f"{address}/v1/images/generations", content=chunks).status_code in (400, 413)


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"max_batch": -1}, {"max_waiting": 0}, {"timeout": -1}, {"timeout": float("nan")}]
)
def test_numbers_with_which_nothing_would_be_answered_are_refused(loaded_pipe, monkeypatch, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        create_app(loaded_pipe, **wrong)
    monkeypatch.setattr(sys, "argv", ["ov_decidiffusion", "serve", f"--{name.replace('_', '-')}={value}"])
    with pytest.raises(SystemExit, match=f"`{name}` must be"):
        main()


@pytest.mark.parametrize("kind", ["RGBA", "palette"])
def test_without_a_mask_the_pictures_own_transparency_is_one(client, kind):
    hole = Image.new("RGBA", (128, 128), "skyblue")
    hole.paste((0, 0, 0, 0), (32, 32, 96, 96))
    hole = hole if kind == "RGBA" else hole.quantize(8)
    file = io.BytesIO()
    hole.save(file, "PNG")
    edit = client.images.edit(
        prompt=PROMPT, image=("a.png", file.getvalue(), "image/png"), extra_body=STEPS | {"seed": 1}
    )
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(edit.data[0].b64_json))).convert("RGB")).astype(int)
    opaque = np.asarray(hole.convert("RGBA").convert("RGB")).astype(int)
    apart = np.abs(made - opaque).max(axis=-1)
    assert apart[:24].max() <= 2 and apart[:, :24].max() <= 2 and apart[104:].max() <= 2, "what is opaque stays"
    assert apart[40:88, 40:88].mean() > 10, "what is transparent is repainted"


def test_pictures_whose_metadata_are_damaged_or_that_are_huge_are_refused(client):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", exif=b"garbage")
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    eps = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # Ghostscript would be run for it
    for name, data, message in (
        ("damaged.png", file, "is damaged"),
        ("huge.png", huge, "has 9000x9000 pixels"),
        ("print.png", eps, "in another format than PNG, JPEG"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            client.images.edit(prompt=PROMPT, image=(name, data.getvalue(), "image/png"))
        assert refused.value.param == "image"


def test_a_request_that_its_server_gives_up_is_not_made(loaded_pipe):
    class Request:
        async def is_disconnected(self):
            return False

    async def ask(batcher):
        answer = asyncio.create_task(_finished(batcher, job, Request(), 60))
        await asyncio.sleep(0.3)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer

    batcher = Batcher(loaded_pipe, Queue())
    job = batcher.make_job("somebody", [{"prompt": PROMPT, "seed": 1}], {"num_inference_steps": 900})
    asyncio.run(ask(batcher))
    assert job.left
    batcher.close()


def test_pages_of_other_sites_and_two_masks_are_refused(address):
    files = [("image", ("a.png", b"x")), ("mask", ("b.png", b"x")), ("mask", ("c.png", b"x"))]
    asked = {"url": f"{address}/v1/images/edits", "data": {"prompt": PROMPT}, "files": files}
    assert httpx.post(**asked, headers={"Origin": "http://evil.example"}).status_code == 403
    answer = httpx.post(**asked)
    assert answer.status_code == 400 and "A `mask` goes with one `image`" in answer.json()["error"]["message"]


def test_models_that_are_damaged_are_told_without_the_servers_paths(client, loaded_pipe, monkeypatch):
    for error, said in (
        (ModelDirError("`model_dir` /secret/place is damaged"), "server's models cannot be used"),
        (TypeError("/secret/place"), "could not be made \\(TypeError\\)"),
    ):
        monkeypatch.setattr(loaded_pipe, "denoise", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(openai.InternalServerError, match=said) as refused:
            client.images.generate(prompt=PROMPT)
        assert "secret" not in str(refused.value)


def test_models_health_and_metrics(client, address, pipe):
    assert [model.id for model in client.models.list()] == [pipe.origin["checkpoint"]]
    assert client.models.retrieve(pipe.origin["checkpoint"]).owned_by == "ov_decidiffusion"
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    asked = {"prompt": PROMPT, "num_inference_steps": 2, "size": "auto"}
    assert httpx.post(f"{address}/v3/images/generations", json=asked, timeout=60).json()["data"]
    told = httpx.get(f"{address}/metrics").text
    assert 'ov_decidiffusion_answers_total{status="200"}' in told and "ov_decidiffusion_waiting 0.0" in told
    assert httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code == 400


def test_this_machine_is_answered_under_each_of_its_names(address):
    for name in ("localhost", "[::1]", "127.0.0.1:8000"):
        assert httpx.get(f"{address}/health", headers={"Host": name}).status_code == 200


def test_behind_a_proxy_its_public_name_is_answered(loaded_pipe):
    hosts = check_allowed_hosts(["Pictures.Example.org"])
    app = create_app(loaded_pipe)
    under_known_names_only(app, hosts)
    asked = {"json": {"prompt": PROMPT} | STEPS, "timeout": 60}
    with Served(app) as address:
        url = f"{address}/v1/images/generations"
        for headers, status in (
            ({"Host": "pictures.example.org", "Origin": "https://pictures.example.org"}, 200),
            ({"Origin": "https://pictures.example.org"}, 200),  # a proxy that asks for localhost
            ({"Host": "evil.example"}, 400),
            ({"Host": "pictures.example.org", "Origin": "https://evil.example"}, 403),
        ):
            assert httpx.post(url, headers=headers, **asked).status_code == status, headers
    with pytest.raises(ValueError, match="--allowed-host must be a name such as"):
        check_allowed_hosts(["https://example.org/"])


def test_a_key_is_asked_for(loaded_pipe):
    with pytest.raises(ValueError, match="`api_key` must not be empty"):
        create_app(loaded_pipe, api_key="")
    with Served(create_app(loaded_pipe, api_key="secret")) as address:
        for key in ("wrong", ""):
            with pytest.raises(openai.AuthenticationError, match="Send the API key"):
                openai.OpenAI(base_url=f"{address}/v1", api_key=key or "none", max_retries=0).models.list()
        assert len(list(openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list())) == 1
        assert httpx.get(f"{address}/health").status_code == 200
        for header, status in (("bearer secret", 200), ("BEARER  secret", 200), ("Basic secret", 401), ("secret", 401)):
            answer = httpx.get(f"{address}/v1/models", headers={"Authorization": header})
            assert answer.status_code == status, header
    for key in ("schlüssel", "two\nlines", " spaces "):
        with pytest.raises(ValueError, match="must be of printable ASCII"):
            create_app(loaded_pipe, api_key=key)


def test_no_page_of_the_server_loads_anything_from_another_host(address):
    assert [httpx.get(f"{address}/{page}").status_code for page in ("docs", "redoc")] == [404, 404]
    assert "/v1/images/generations" in httpx.get(f"{address}/openapi.json").json()["paths"]


def at_once(calls):
    """The results of calls that run at the same time, or their errors."""
    results = [None] * len(calls)

    def run(i, call):
        try:
            results[i] = call()
        except openai.APIError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
        time.sleep(0.15)
    for thread in threads:
        thread.join(120)
    return results


def test_requests_that_wait_run_together_and_each_picture_is_as_alone(client, pipe, slow):
    def ask(seed, prompt=PROMPT):
        return lambda: client.images.generate(prompt=prompt, extra_body=STEPS | {"seed": seed})

    results = at_once([ask(1), ask(2), ask(3)])
    assert [run[0][1] for run in slow] == [1, 2], "pictures that ran together"
    for result, seed in zip(results, (1, 2, 3), strict=True):
        assert differ(picture_of(result.data[0]), pipe(PROMPT, seed=seed, **STEPS).images[0]) <= 1
    results = at_once([ask(1), ask(2), ask(3, "a (star:50)")])
    assert isinstance(results[2], openai.BadRequestError)
    assert len(results[0].data) == len(results[1].data) == 1, "a wrong one harms no other"


def test_a_picture_that_fails_fails_alone(client, loaded_pipe, slow, monkeypatch):
    slowly = loaded_pipe.denoise

    def failing(**arguments):
        for step in slowly(**arguments):
            if "a bomb" in arguments["prompt"]:
                raise FloatingPointError("NaN instead of a picture")
            yield step

    monkeypatch.setattr(loaded_pipe, "denoise", failing)
    prompts = (PROMPT, "a car", "a bomb")
    results = at_once([lambda one=one: client.images.generate(prompt=one, extra_body=STEPS) for one in prompts])
    assert isinstance(results[2], openai.InternalServerError) and len(results[0].data) == len(results[1].data) == 1


def test_no_more_pictures_run_together_than_may(loaded_pipe, pipe, slow):
    with Served(create_app(loaded_pipe, max_batch=2)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        made = client.images.generate(prompt=PROMPT, n=5, extra_body=STEPS | {"seed": 1})
    assert [run[0][1] for run in slow] == [2, 2, 1]
    assert differ(picture_of(made.data[4]), pipe(PROMPT, seed=5, **STEPS).images[0]) <= 1


def leaves_early(address, slow):
    """A client hangs up, and its run ends soon."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 100}, timeout=1.5)
    time.sleep(1.5)
    steps = len(slow[0])
    time.sleep(0.5)
    assert len(slow[0]) == steps < 60


def test_too_many_are_told_when_to_come_back_and_whoever_leaves_is_not_served(client, address, slow):
    def ask():
        return client.images.generate(prompt=PROMPT, n=4, extra_body={"num_inference_steps": 8})

    results = at_once([ask] * 7)
    refused = [one for one in results if isinstance(one, openai.RateLimitError)]
    assert refused and int(refused[0].response.headers["retry-after"]) >= 1
    assert len([one for one in results if not isinstance(one, openai.APIError)]) >= 4
    slow.clear()
    leaves_early(address, slow)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "signals",
    [["SIGINT", "SIGINT"], *(pytest.param([name], marks=pytest.mark.at_length) for name in ("SIGTERM", "SIGHUP"))],
)
def test_the_command_ends_gracefully(model_dir, tmp_path, signals):
    first, *others = (getattr(signal, name) for name in signals)
    command = [sys.executable, "-m", "ov_decidiffusion", "serve", "--model-dir", str(model_dir), "--port", "8123"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*command, "--demo"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            try:
                httpx.get("http://127.0.0.1:8123/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        asked = {"prompt": PROMPT, "num_inference_steps": 40}
        answers = []
        request = threading.Thread(
            target=lambda: answers.append(
                httpx.post("http://127.0.0.1:8123/v1/images/generations", json=asked, timeout=120)
            )
        )
        request.start()
        time.sleep(0.7)
        for one in (first, *others):
            process.send_signal(one)
            time.sleep(0.3)
        request.join(120)
        assert answers[0].status_code == 200 and answers[0].json()["data"]
        process.wait(60)
        assert process.returncode == 128 + first and b"Traceback" not in process.stderr.read()
        assert not list(tmp_path.glob("ov_decidiffusion-*")), "pictures and uploads go with the process"
    finally:
        process.kill()


def test_the_demo_can_be_served_beside_it(loaded_pipe, pipe, slow, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = create_app(loaded_pipe)
    demo = mount_demo(app, loaded_pipe)
    try:
        with Served(app) as address:
            assert httpx.get(f"{address}/health").json()["status"] == "ok"
            page = httpx.get(f"{address}/demo/", follow_redirects=True)
            assert page.status_code == 200 and "DeciDiffusion" in page.text
            assert "default-src 'self'" in page.headers["Content-Security-Policy"]
            assert httpx.get(address, follow_redirects=True).url.path.startswith("/demo")
            client = gradio_client.Client(f"{address}/demo/", verbose=False, download_files=str(tmp_path / "got"))
            file, _ = client.predict(PROMPT, seed=1, num_inference_steps=4, api_name="/text_to_image")
            expected = pipe(PROMPT, seed=1, num_inference_steps=4).images[0]
            assert differ(Image.open(file), expected) <= 1
            slow.clear()
            leaves_early(address, slow)
    finally:
        demo.close(verbose=False)
