"""Optimum Intel, in an environment of its own, loads the converted folder as it is and makes the same picture."""

import subprocess

import numpy as np
import pytest

from benchmarks.runs import PEERS_PYTHON

PROMPT = "a fox in the snow"
GENERATE = """
import sys
import numpy as np, torch
from optimum.intel import OVStableDiffusionPipeline
pipe = OVStableDiffusionPipeline.from_pretrained(sys.argv[1], ov_config={"INFERENCE_PRECISION_HINT": "f32"})
out = pipe(sys.argv[3], num_inference_steps=8, guidance_scale=4.0, height=128, width=128,
           generator=torch.Generator().manual_seed(5), output_type="np")
np.save(sys.argv[2], out.images)
"""


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="Optimum Intel is not installed: run `make peers`")
def test_optimum_intel_makes_the_same_picture(model_dir, pipe, tmp_path):
    file = tmp_path / "picture.npy"
    arguments = [str(PEERS_PYTHON), "-c", GENERATE, str(model_dir), str(file), PROMPT]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    ours = pipe(
        PROMPT, num_inference_steps=8, guidance_scale=4.0, guidance_rescale=0.0, seed=5, output_type="np"
    ).images
    difference = np.abs(np.load(file) - ours) * 255
    print(f"Optimum Intel: mean difference {difference.mean():.3f}/255, largest {difference.max():.1f}/255")
    assert difference.mean() < 0.05
