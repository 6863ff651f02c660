"""The real configuration at its real size, with random weights: memory, time and agreement of the conversion.

Left out by default; ``pytest -m full_size`` takes a few minutes, 8 GB of memory and 8 GB of disk.
"""

import json
import subprocess
import sys

import pytest

from benchmarks.make_checkpoint import make_checkpoint
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.schedulers.squeezed import SqueezedDPMSolverMultistepScheduler

pytestmark = pytest.mark.full_size


def converted(checkpoint, model_dir, verify=False):
    options = {"tool": "conversion", "checkpoint": str(checkpoint), "model_dir": str(model_dir), "verify": verify}
    command = [sys.executable, "-m", "benchmarks.run_one", json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_decidiffusion_1_converts_in_little_memory(tmp_path):
    assert make_checkpoint("1.0", tmp_path / "v1")["flexible_unet"] == 814_746_884
    plain = converted(tmp_path / "v1", tmp_path / "plain")
    verified = converted(tmp_path / "v1", tmp_path / "verified", verify=True)
    print(f"{plain['seconds']:.0f} s, {plain['peak_memory_gb']:.2f} GB; verified {verified['peak_memory_gb']:.2f} GB")
    assert plain["peak_memory_gb"] <= 3.0 and plain["seconds"] <= 180
    assert verified["peak_memory_gb"] <= 6.0
    assert all(part["psnr"] > 60 for part in verified["parts"]), verified["parts"]
    folders = {"model_dir": str(tmp_path / "plain"), "cache_dir": str(tmp_path / "cache")}
    options = json.dumps({"tool": "loading", "cache_mode": "OPTIMIZE_SPEED"} | folders)
    command = [sys.executable, "-m", "benchmarks.run_one", options]
    seconds = [json.loads(subprocess.check_output(command, text=True))["load_s"] for _ in range(2)]
    print(f"loaded in {seconds[0]:.1f} s, and with the model cache in {seconds[1]:.1f} s")
    assert seconds[1] < 5


def test_a_checkpoint_like_decidiffusion_2_runs_its_ten_steps(tmp_path):
    make_checkpoint("2.0", tmp_path / "v2")
    report = convert_checkpoint(tmp_path / "v2", tmp_path / "v2-ov")
    pipe = OVStableDiffusionPipeline.from_pretrained(report.model_dir)
    assert isinstance(pipe.scheduler, SqueezedDPMSolverMultistepScheduler)
    assert len(list(pipe.denoise("a fox", width=128, height=128, seed=0))) == 10
