"""Nothing is sent anywhere: no other host is asked for, neither by this library nor by those that it uses."""

import os
import subprocess
import sys

import pytest

WORK = """
import sys

def note(event, arguments):  # forked processes have it too
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1"):
        with open(sys.argv[3], "a") as asked:
            print(arguments[0], file=asked)

sys.addaudithook(note)
if sys.argv[4]:
    __import__(sys.argv[4])
from ov_decidiffusion import OVStableDiffusionPipeline, convert_checkpoint, make_demo, quantize_models

model_dir = convert_checkpoint(sys.argv[1], sys.argv[2]).model_dir
import nncf
import openvino as ov

pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
pipe("a fox", num_inference_steps=1)
demo = make_demo(pipe)
demo.launch(prevent_thread_lock=True, quiet=True)
demo.close()
"""


@pytest.mark.parametrize("first", ["", pytest.param("openvino", marks=pytest.mark.at_length)])
def test_no_other_host_is_asked_for(small_checkpoint, tmp_path, first):
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI")}
    asked = tmp_path / "asked"
    arguments = [str(small_checkpoint), str(tmp_path / "models"), str(asked), first]
    done = subprocess.run(
        [sys.executable, "-c", WORK, *arguments],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = set(asked.read_text().split()) if asked.exists() else set()
    # Whoever imports OpenVINO alone, before this library, is reported once, by OpenVINO.
    assert found <= ({"www.google-analytics.com"} if first else set())
    assert first or not (tmp_path / "intel").exists()
