"""The model folder is a contract: OpenVINO GenAI and Optimum Intel load it as it is, and make our pictures from the
same seed, at every size that is a multiple of 8.

Each picture of theirs is made in a process of its own, so that a crash of theirs is a failed test and no more.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.runs import PEERS_PYTHON
from training.scenes import example_picture

LENGTH = float(os.environ.get("FUZZ_LENGTH", "1"))
TASKS = ("text-to-image", "image-to-image", "inpainting")
SETTINGS = {"num_inference_steps": 6, "guidance_scale": 3.0}
STRENGTH = {"image-to-image": 0.6, "inpainting": 0.9}
PROMPT = "a fox in the snow"
SEED = 7

BEGIN = """
import sys, numpy as np
folder, task, given, made = sys.argv[1:5]
prompt, seed, steps, guidance, strength = sys.argv[5], int(sys.argv[6]), int(sys.argv[7]), *map(float, sys.argv[8:10])
source, mask = np.load(given)
height, width = source.shape[:2]
how = dict(num_inference_steps=steps, guidance_scale=guidance)
"""
GENAI = (
    BEGIN
    + """
import openvino as ov, openvino_genai as genai
kind = {"text-to-image": "Text2ImagePipeline", "image-to-image": "Image2ImagePipeline"}.get(task, "InpaintingPipeline")
pipe = getattr(genai, kind)(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
how["generator"] = genai.TorchGenerator(seed)
if task == "text-to-image":
    given = ()
else:
    given = [ov.Tensor(source[None])] + ([ov.Tensor(mask[None])] if task == "inpainting" else [])
    how |= dict(strength=strength)
if task != "image-to-image":
    how |= dict(height=height, width=width)
np.save(made, pipe.generate(prompt, *given, **how).data[0])
"""
)
OPTIMUM = (
    BEGIN
    + """
import torch
from PIL import Image
from optimum import intel
kind = {"text-to-image": "", "image-to-image": "Img2Img"}.get(task, "Inpaint")
kind = getattr(intel, f"OVStableDiffusion{kind}Pipeline")
pipe = kind.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
how["generator"] = torch.Generator().manual_seed(seed)
if task != "image-to-image":
    how |= dict(height=height, width=width)
if task != "text-to-image":
    how |= dict(image=Image.fromarray(source), strength=strength)
if task == "inpainting":
    how |= dict(mask_image=Image.fromarray(mask).convert("L"))
np.save(made, np.asarray(pipe(prompt, **how).images[0]))
"""
)
PEERS = {"GenAI": (sys.executable, GENAI), "Optimum": (str(PEERS_PYTHON), OPTIMUM)}
NEEDS_OPTIMUM = pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no Optimum Intel here: run `make peers`")

SIDES = range(64, 257, 8)
SIZES = [(side, SIDES[(7 * i + 3) % len(SIDES)]) for i, side in enumerate(SIDES)]  # each once as width and as height
A_FEW = {
    ("GenAI", "text-to-image"): [(96, 136)],
    ("GenAI", "image-to-image"): [(128, 128), (72, 200)],
    ("GenAI", "inpainting"): [(104, 64)],
    ("Optimum", "inpainting"): [(136, 96)],  # which runs all parts; it takes long to start
}


def cases():
    for peer in PEERS:
        for task in TASKS:
            for width, height in A_FEW.get((peer, task), []) if LENGTH == 1 else SIZES:
                marks = NEEDS_OPTIMUM if peer == "Optimum" else ()
                yield pytest.param(peer, task, width, height, marks=marks, id=f"{peer}-{task}-{width}x{height}")


@pytest.mark.parametrize(("peer", "task", "width", "height"), cases())
def test_other_tools_make_our_picture_of_the_folder(peer, task, width, height, model_dir, pipe, tmp_path):
    source = example_picture("house", "in a meadow").resize((width, height))
    mask = np.zeros((height, width, 3), np.uint8)
    mask[height // 8 : -height // 4, width // 4 : -width // 8] = 255
    given, made = tmp_path / "given.npy", tmp_path / "made.npy"
    np.save(given, np.stack([np.asarray(source), mask]))
    python, code = PEERS[peer]
    strength = STRENGTH.get(task, 1.0)
    told = [PROMPT, SEED, *SETTINGS.values(), strength]
    arguments = [python, "-c", code, str(model_dir), task, str(given), str(made), *map(str, told)]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"exit {finished.returncode}: {finished.stderr[-2000:]}"
    own = {"width": width, "height": height, "guidance_rescale": 0.0, "seed": SEED, **SETTINGS}
    if task != "text-to-image":
        own |= {"image": source, "strength": strength}
    if task == "inpainting":
        own |= {"mask_image": Image.fromarray(mask).convert("L")}
    ours = np.asarray(pipe(PROMPT, **own).images[0], float)
    theirs = np.load(made)
    assert theirs.shape == ours.shape == (height, width, 3) and ours.std() > 10
    difference = np.abs(ours - theirs).mean()
    print(f"{peer}, {task}, {width}x{height}: mean difference of a pixel {difference:.2f}/255")
    assert difference < 0.6  # GenAI rounds down where we round to the nearest
