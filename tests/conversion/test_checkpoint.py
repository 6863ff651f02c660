"""Checkpoints from folders and from a hub; the hub is one that the test serves on localhost."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT, check_checkpoint
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.conversion.torch_modules import load_text_encoder
from ov_decidiffusion.errors import CheckpointError

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNWANTED = ("pipeline.py", "unet/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors",
            "text_encoder/pytorch_model.bin", "README.md")  # fmt: skip
FIND = "import sys; from ov_decidiffusion.conversion.hub import *\n" + (
    "try: print('FOUND', find_checkpoint(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))\n"
    "except CheckpointError as error: print('REFUSED', error)"
)


class Hub:
    """Answers as the hub does for one repository, and remembers what was fetched."""

    def __init__(self, folder: Path, repository: str = "Deci/Tiny"):
        self.repository = repository
        self.folder, self.fetched, self.cut_after, self.claimed_size = folder, [], None, {}
        self.status, self.nonsense, self.damaged = None, None, None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def files(self):
        return {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}

    def answer(self, request, body):
        path, _, _ = request.path.partition("?")
        if self.status is not None:
            return self.reply(request, self.status, b"{}", {}, body)
        if self.nonsense is not None:
            return self.misbehave(request, body)
        if not path.removeprefix("/api/models").startswith(f"/{self.repository}"):
            return self.reply(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith("/api/") and "/tree/" in path:
            entries = [self.entry(name, file) for name, file in self.files().items()]
            return self.reply(request, 200, json.dumps(entries).encode(), {}, body)
        if path.startswith("/api/"):
            if "nothere" in path:
                return self.reply(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            info = {"id": self.repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files()]}
            return self.reply(request, 200, json.dumps(info).encode(), {}, body)
        name = path.split(f"/resolve/{COMMIT}/")[1]
        data = self.files()[name].read_bytes()
        sent = bytes([data[0] ^ 1]) + data[1:] if name == self.damaged else data
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin = int((request.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if body:
            self.fetched.append((name, begin))
        if not body and name in self.claimed_size:
            return self.reply(request, 200, data, headers, body, self.claimed_size[name])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.reply(request, 206 if begin else 200, sent[begin:], headers, body)

    def misbehave(self, request, body):
        """Answer with what is no hub's answer: a text, or something that is no HTTP at all."""
        if isinstance(self.nonsense, str):
            return self.reply(request, 200, self.nonsense.encode(), {"Content-Type": "application/json"}, body)
        if self.nonsense == {"goes": "round"}:
            return self.reply(request, 302, b"", {"Location": request.path}, body)
        request.wfile.write(self.nonsense["raw"])
        request.close_connection = True
        request.connection.shutdown(2)

    def entry(self, name, file):
        size = self.claimed_size.get(name, file.stat().st_size)
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"type": "file", "path": name, "size": size, "oid": sha[:40]}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
        return entry

    def reply(self, request, status, data, headers, body, size=None):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data) if size is None else size))
        request.end_headers()
        if body:
            if self.cut_after is not None and len(data) > self.cut_after:
                request.wfile.write(data[: self.cut_after])
                self.cut_after = None
                request.close_connection = True
                return request.connection.shutdown(2)
            request.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(EMBEDDED_CHECKPOINT, folder)
    for name in UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('this must never run')")
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()


def run_code(code: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own: the hub's settings are read when it is imported."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert done.stdout, done.stderr
    return done


def find(home: Path, *arguments: str, **environment: str) -> str:
    """What ``find_checkpoint`` says."""
    done = run_code(FIND, home, *arguments, **environment)
    return done.stdout.strip().splitlines()[-1]


def test_downloads_only_what_is_needed_then_works_from_the_cache(hub, tmp_path):
    home = tmp_path / "home"
    hub.cut_after = 15_000_000  # the U-Net breaks off
    found = find(home, "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    if found.startswith("REFUSED"):
        found = find(home, "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    assert found.startswith("FOUND"), found
    folder = Path(found.removeprefix("FOUND "))
    assert any(begin > 0 for _, begin in hub.fetched), "the broken download did not go on where it stopped"
    assert not {name for name, _ in hub.fetched} & set(UNWANTED)
    assert not list(folder.rglob("*.py"))
    for file in folder.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (EMBEDDED_CHECKPOINT / file.relative_to(folder)).read_bytes()

    fetched = len(hub.fetched)
    assert find(home, "Deci/Tiny", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1") == found
    assert find(home, "Deci/Tiny", HF_ENDPOINT="http://127.0.0.1:9") == found
    assert len(hub.fetched) == fetched


@pytest.mark.at_length
def test_a_download_can_be_discarded_once_it_is_converted(hub, small_checkpoint, tmp_path):
    hub.folder = small_checkpoint
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "ov_decidiffusion", "convert", "--checkpoint", "Deci/Tiny", "--discard-download"]
    options = {"env": os.environ | settings | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"deleted the download of Deci/Tiny: 0\.\d\d GB are free again", done.stderr)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    again = subprocess.run(command[:-1], cwd=tmp_path, timeout=120, **options)  # found without a download
    assert again.returncode == 0 and not list((tmp_path / "home").rglob("*.safetensors"))


def test_what_the_hub_cannot_give_is_said_in_one_sentence(hub, tmp_path):
    home = tmp_path / "home"
    gone = find(home, "Deci/Gone", HF_ENDPOINT=hub.endpoint)
    assert "'Deci/Gone' does not exist" in gone and str(EMBEDDED_CHECKPOINT) in gone
    revision = find(home, "Deci/Tiny", "nothere", HF_ENDPOINT=hub.endpoint)
    assert "'Deci/Tiny' at revision 'nothere' does not exist" in revision
    offline = find(home, "Deci/Tiny", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline and "folder" in offline
    assert find(home, "Deci/Tiny", HF_ENDPOINT="nonsense").startswith("REFUSED 'Deci/Tiny' cannot be downloaded")
    unreachable = find(home, "Deci/Tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "no connection" in unreachable and str(EMBEDDED_CHECKPOINT) in unreachable
    hub.claimed_size["flexible_unet/diffusion_pytorch_model.safetensors"] = 10**18
    full = find(home, "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    assert "needs 1000000000." in full and "HF_HOME" in full
    assert not hub.fetched


@pytest.mark.parametrize("status", [403, 416, 500])
def test_what_the_hub_answers_is_what_is_said(hub, tmp_path, status):
    hub.status = status
    said = find(tmp_path / "home", "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    assert said.startswith("REFUSED") and f"the hub answers {status}" in said and "no connection" not in said


@pytest.mark.parametrize(
    ("nonsense", "told"),
    [
        ("<html>Welcome to the hotel</html>", "does not answer as a hub does"),
        ("[]", "does not answer as a hub does"),
        ("[" * 200_000, "does not answer as a hub does"),
        ({"goes": "round"}, "cannot be downloaded"),
        ({"raw": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc"}, "no connection"),
        ({"raw": b"\0\1garbage\r\n\r\n"}, "no connection"),
        ({"raw": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nnogzp"}, "as a hub does"),
    ],
)
def test_something_else_in_the_hubs_place_is_told(hub, tmp_path, nonsense, told):
    hub.nonsense = nonsense
    said = find(tmp_path / "home", "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    assert said.startswith("REFUSED") and told in said and hub.endpoint in said


def test_a_file_of_the_right_size_and_other_bytes_is_refused_and_fetched_again(hub, tmp_path):
    hub.damaged = "vae/diffusion_pytorch_model.safetensors"
    said = find(tmp_path / "home", "Deci/Tiny", HF_ENDPOINT=hub.endpoint)
    assert said.startswith(f"REFUSED {hub.damaged} is not what {hub.endpoint} says"), said
    hub.damaged = None
    assert find(tmp_path / "home", "Deci/Tiny", HF_ENDPOINT=hub.endpoint).startswith("FOUND")


def test_a_broken_folder_is_refused_by_the_name_of_what_is_broken(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(EMBEDDED_CHECKPOINT, folder)
    assert find_checkpoint(folder) == folder
    weights = folder / "flexible_unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="flexible_unet.*incomplete or damaged.*download it again"):
        find_checkpoint(folder)
    shutil.move(folder / "flexible_unet", folder / "unet")
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(
        CheckpointError, match="lacks tokenizer/vocab.json, flexible_unet/config.json.*Stable Diffusion"
    ):
        find_checkpoint(folder)
    for wrong in ("nonsense", "./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(CheckpointError, match="must be a folder or a hub id"):
            find_checkpoint(wrong)


def test_text_weights_under_their_old_names_are_loaded(caplog):
    """A text encoder whose weights were not found would be random and different every time."""
    first, second = load_text_encoder(EMBEDDED_CHECKPOINT), load_text_encoder(EMBEDDED_CHECKPOINT)
    state = second.state_dict()
    assert all((value == state[name]).all() for name, value in first.state_dict().items())
    assert "newly initialized" not in caplog.text


def test_weights_in_whole_numbers_are_refused_and_positions_are_not(small_checkpoint, tmp_path):
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {"old.position_ids": torch.arange(77)}, file)
    check_checkpoint(checkpoint)
    save_file(weights | {name: (1000 * weights[name]).to(torch.int16)}, file)
    with pytest.raises(CheckpointError, match=f"holds {re.escape(name)} as I16, and weights are of F16"):
        check_checkpoint(checkpoint)


def as_fp16_variant(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        if file.parent.name != "tiny_decoder":
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def in_several_files(folder: Path) -> None:
    """As ``save_pretrained(max_shard_size=…)`` writes large models."""
    for part in ("flexible_unet", "text_encoder", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        weights, where = load_file(file), {}
        half = len(weights) // 2
        for i, names in enumerate((list(weights)[:half], list(weights)[half:])):
            shard = f"{file.stem}-{i + 1:05}-of-00002.safetensors"
            save_file({name: weights[name] for name in names}, file.with_name(shard), {"format": "pt"})
            where |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": file.stat().st_size}, "weight_map": where}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
        file.unlink()


def with_the_tokenizers_one_file(folder: Path) -> None:
    """As transformers 5 saves a tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert sorted(file.name for file in (folder / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def in_64_bits(folder: Path) -> None:
    """As a fine-tune may be saved."""
    for file in folder.glob("*/*.safetensors"):
        weights = {name: one.double() if one.is_floating_point() else one for name, one in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})


def with_stable_diffusions_unet_beside(folder: Path) -> None:
    """As the real repository has it: a U-Net of its first pipeline, and code that nobody runs."""
    other = folder / "unet"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "in_channels": 9}))
    save_file({"conv_in.weight": torch.zeros(1)}, other / "diffusion_pytorch_model.safetensors")
    (folder / "pipeline.py").write_text("raise SystemExit('this must never run')")


@pytest.fixture(scope="module")
def plain(small_checkpoint, tmp_path_factory) -> Path:
    """The small checkpoint's model folder."""
    return convert_checkpoint(small_checkpoint, tmp_path_factory.mktemp("models") / "plain", verify=False).model_dir


AS_PEOPLE_HAVE_THEM = (
    as_fp16_variant,
    in_several_files,
    with_the_tokenizers_one_file,
    in_64_bits,
    with_stable_diffusions_unet_beside,
)


@pytest.mark.parametrize("change", AS_PEOPLE_HAVE_THEM)
def test_checkpoints_as_people_have_them_make_the_same_model_folder(small_checkpoint, plain, tmp_path, change):
    other = shutil.copytree(small_checkpoint, tmp_path / "other")
    change(other)
    made = convert_checkpoint(other, tmp_path / "made", verify=False).model_dir
    files = {file.relative_to(plain) for file in plain.rglob("*.bin")}
    assert {file.relative_to(made) for file in made.rglob("*.bin")} == files
    for file in files:
        assert (made / file).read_bytes() == (plain / file).read_bytes(), file
    vocabularies = [json.loads((folder / "tokenizer" / "vocab.json").read_text()) for folder in (plain, made)]
    assert vocabularies[0] == vocabularies[1]
    merges = [(folder / "tokenizer" / "merges.txt").read_text().split("\n") for folder in (plain, made)]
    assert [line for line in merges[0] if line] == [line for line in merges[1] if line]


def test_weights_in_several_files_come_from_a_mirror_of_another_name_too(hub, tmp_path):
    in_several_files(hub.folder)
    hub.repository = "somebody/a-mirror"
    (hub.folder / "vae" / "stray-00001-of-00001.safetensors").write_text("not named by the index")
    found = find(tmp_path / "home", hub.repository, HF_ENDPOINT=hub.endpoint)
    assert found.startswith("FOUND"), found
    assert len(list(Path(found.removeprefix("FOUND ")).glob("flexible_unet/*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("../../outside-00001-of-00001.safetensors", "is no file of weights beside it"),
        ("gone-00001-of-00001.safetensors", "which .*index.json names"),
        ("model.bin", "is no file of weights beside it"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(small_checkpoint, tmp_path, named, told):
    folder = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    in_several_files(folder)
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = named
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(folder)
