"""The choice of the number format: by measuring, once on a machine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import cpu_flags

from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.runtime import models, precision


@pytest.fixture(autouse=True)
def memory_file(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "MEMORY_FILE", tmp_path / "cache" / "precision.json")
    return tmp_path / "cache" / "precision.json"


class SomeCore:
    """A machine with the devices and the timings that a test wants."""

    def __init__(self, *devices):
        self.available_devices = list(devices)

    def get_property(self, device, name):
        return "Some Processor"


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({"f32": 10.0, "bf16": 16.6}, "f32"),  # bf16 instructions, no matrix units
        ({"f32": 10.0, "bf16": 9.8}, "f32"),  # not worth the lost digits
        ({"f32": 10.0, "bf16": 1.5}, "bf16"),
        ({"f32": 10.0, "bf16": 5.0, "f16": 4.0}, "f16"),
        ({"f32": 10.0}, "f32"),
    ],
)
def test_the_fastest_is_chosen_and_remembered(monkeypatch, memory_file, milliseconds, expected):
    monkeypatch.setattr(precision, "probe", lambda core: milliseconds | {"int8": 1.0})
    chosen, why = precision.choose_precision(SomeCore("CPU"), "CPU")
    assert chosen == expected and expected in why
    monkeypatch.setattr(precision, "probe", lambda core: pytest.fail("probed again"))
    assert precision.choose_precision(SomeCore("CPU"), "AUTO") == (chosen, why)
    memory_file.write_text("not json")
    monkeypatch.setattr(precision, "probe", lambda core: {"f32": 1.0, "bf16": 0.1, "int8": 1.0})
    assert precision.choose_precision(SomeCore("CPU"), "CPU")[0] == "bf16"


def test_other_devices_keep_openvinos_choice():
    assert precision.choose_precision(SomeCore("CPU", "GPU"), "GPU")[0] is None
    assert precision.choose_precision(SomeCore("CPU", "GPU"), "AUTO")[0] is None
    assert models.precision_hint("vae_decoder", "GPU.0", "f16") == {"INFERENCE_PRECISION_HINT": "f32"}
    assert models.precision_hint("vae_decoder", "GPU.0", None) == {"INFERENCE_PRECISION_HINT": "f32"}
    assert models.precision_hint("vae_decoder", "CPU", "f16") == {"INFERENCE_PRECISION_HINT": "f32"}
    assert models.precision_hint("vae_decoder", "CPU", "bf16") == {"INFERENCE_PRECISION_HINT": "bf16"}
    assert models.precision_hint("unet", "GPU.0", None) == {}


def test_the_probe_measures_what_this_processor_says_it_has():
    core = ov.Core()
    milliseconds = precision.probe(core)
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert {"f32", "int8"} <= set(milliseconds) and ("bf16" in milliseconds) == has_bf16
    assert all(np.isfinite(value) and value > 0 for value in milliseconds.values())
    if "avx512_vnni" in cpu_flags() or "avx_vnni" in cpu_flags():  # the best of runs in turn
        assert milliseconds["int8"] < milliseconds["f32"]


def test_a_preset_does_without_int8_where_it_is_no_gain_and_says_so(quantization, model_dir, monkeypatch, caplog):
    monkeypatch.setattr(precision, "probe", lambda core: {"f32": 2.0, "bf16": 2.5, "int8": 2.1})
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    assert next(iter(pipe.denoise("a fox", preset="fast", seed=0))).quantized == frozenset()
    assert "INT8 is 0.95 times as fast as f32 on this processor: presets do without it" in caplog.text
    asked = next(iter(pipe.denoise("a fox", preset="fast", quantized=["unet"], seed=0)))
    assert asked.quantized == {"unet"} and asked.total == 6


def test_pipeline_says_what_it_chose(model_dir, monkeypatch):
    monkeypatch.setattr(precision, "probe", lambda core: {"f32": 2.0, "bf16": 3.0, "int8": 1.0})
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
    assert pipe.inference_precision == "f32 is fastest here (f32 2.0 ms, bf16 3.0 ms in a probe; INT8 models 1.0 ms)"
    assert pipe.models.compiled("text_encoder").get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32


def test_static_shapes_give_the_same_picture(model_dir, monkeypatch, pipe):
    monkeypatch.setattr(models, "needs_static_shapes", lambda device: True)
    static = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    static.set_progress_bar_config(disable=True)
    settings = {"seed": 3, "num_inference_steps": 4, "output_type": "np"}
    prompts = ["a penguin in the snow", "an owl in a forest at night"]
    assert abs(static(prompts, **settings).images - pipe(prompts, **settings).images).max() < 2 / 255
    with pytest.raises(ValueError, match="pictures are 128x128 pixels, got 192x128"):
        static("a fox", width=192)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere everybody has a name")
def test_a_user_without_a_home_can_use_it(model_dir):
    """A container's bare user id: the system knows no name and no home of it."""
    code = (
        "import pwd, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from ov_decidiffusion import OVStableDiffusionPipeline\nfrom ov_decidiffusion.runtime import precision\n"
        "OVStableDiffusionPipeline.from_pretrained(sys.argv[1])('a fox', num_inference_steps=1)\n"
        "print('remembers', precision.MEMORY_FILE)"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(model_dir)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("remembers"), done.stderr
