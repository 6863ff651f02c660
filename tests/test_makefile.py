"""Where ``make`` gets PyTorch from: the builds for CPUs, or the ordinary index; by uv, or by pip without it."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import UNIX_ONLY

ROOT = Path(__file__).parents[1]
pytestmark = [UNIX_ONLY, pytest.mark.skipif(shutil.which("make") is None, reason="needs make")]


def as_typed() -> dict[str, str]:
    """The environment of somebody who types the command, whatever runs the tests."""
    others = ("TORCH_INDEX", "LOCKED", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "UV", "UV_INDEX", "UV_FIND_LINKS")
    return {key: value for key, value in os.environ.items() if key not in others}


def index(folder: Path, version: str) -> Path:
    """A package index with one package, a ``torch`` that holds nothing."""
    place = folder / "simple" / "torch"
    place.mkdir(parents=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(place / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    (place / "index.html").write_text("".join(f'<a href="{file.name}">{file.name}</a>' for file in place.iterdir()))
    return folder


@pytest.fixture
def addresses(tmp_path):
    """Stand-ins: of the builds for CPUs, of the ordinary index, and an address where nothing answers."""
    servers, found = [], []
    for name, version in (("cpu", "2.13.9+cpu"), ("ordinary", "2.13.8")):
        handler = partial(SimpleHTTPRequestHandler, directory=index(tmp_path / name, version))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        found.append(f"http://127.0.0.1:{servers[-1].server_port}/simple")
    unused = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    found.append(f"http://127.0.0.1:{unused.server_port}/simple")
    unused.server_close()
    yield found
    for server in servers:
        server.shutdown()
        server.server_close()


CASES = [("cpu", "2.13.9+cpu", "uv"), ("nowhere", "2.13.8", "uv"), ("", "2.13.8", "pip")]


@pytest.mark.parametrize(("asked", "version", "by"), CASES)
def test_pytorch_comes_from_the_builds_for_cpus_or_from_the_ordinary_index(tmp_path, addresses, asked, version, by):
    uv = str(Path(sys.executable).with_name("uv"))
    if by == "uv" and not Path(uv).is_file():
        pytest.skip("needs uv, which make installs")
    cpu, ordinary, nowhere = addresses
    wanted = {"cpu": cpu, "": "", "nowhere": nowhere}[asked]
    venv = tmp_path / "venv"
    environment = {key: value for key, value in as_typed().items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": ordinary, "UV_CACHE_DIR": str(tmp_path / "cache")}
    command = ["make", f"VENV={venv}", f"TORCH_INDEX={wanted}", f"{venv}/torch"]
    command += [f"UV={uv}"] if by == "uv" else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("cannot be reached" in done.stdout) == (asked == "nowhere")
    [installed] = venv.rglob("torch-*.dist-info")
    assert installed.name == f"torch-{version}.dist-info"
    assert (installed / "INSTALLER").read_text().strip() == by
    assert (venv / "torch").is_file()


def test_the_builds_for_cpus_are_chosen_by_itself_on_linux_without_an_nvidia_gpu(tmp_path):
    printing = ["make", "-n", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/torch"]
    told = subprocess.run(printing, cwd=ROOT, env=as_typed(), capture_output=True, text=True, check=True).stdout
    chosen = 'PIP_INDEX_URL="https://download.pytorch.org/whl/cpu"' in told
    assert chosen == (os.uname().sysname == "Linux" and shutil.which("nvidia-smi") is None)
