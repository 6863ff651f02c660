"""Mapped weights leave memory after a model's first run, and large models take turns; pictures stay the same."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ov_decidiffusion.errors import NotEnoughMemory
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.runtime import memory, models
from ov_decidiffusion.runtime.memory import check_memory


def resident_kilobytes(file: Path) -> int:
    """Of all mappings of a file, from the kernel's own account."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1:
            counted = line.endswith(str(file.resolve()))
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


# In a process of its own, on a copy: pages that two have mapped stay, for they are there once anyway, and so do
# pages not written to the disk yet.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from ov_decidiffusion.runtime import memory
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from tests.runtime.test_memory import resident_kilobytes
folder = Path(sys.argv[1])
if sys.argv[2] == "keeps":
    memory.forget_mapped_weights = lambda file: None
pipe = OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")
file = folder / "unet" / "openvino_model.bin"
settings = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
picture, resident = pipe("a fox", **settings).images, resident_kilobytes(file)
again, later = pipe("a fox", **settings).images, resident_kilobytes(file)
print(resident, later, np.array_equal(picture, again))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
@pytest.mark.parametrize("what", ["forgets", "keeps"])
def test_weights_are_not_kept_twice(model_dir, tmp_path, what):
    folder = shutil.copytree(model_dir, tmp_path / "copy")
    os.sync()
    command = [sys.executable, "-c", MEASURE, str(folder), what]
    printed = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    resident, later, same = printed.split()
    size = (folder / "unet" / "openvino_model.bin").stat().st_size / 1024
    if what == "keeps":  # then they are: the measure can tell
        assert int(resident) > 0.3 * size
    else:
        assert int(resident) < 0.1 * size and int(later) < 0.5 * size and same == "True"


def test_weights_are_forgotten_all_through_a_first_run_and_not_after_it(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(memory, "forget_mapped_weights", calls.append)
    threads = threading.active_count()
    with pytest.raises(KeyError), memory.forgetting_mapped_weights(tmp_path):
        time.sleep(0.9)
        assert len(calls) >= 2
        raise KeyError("the run failed")
    assert threading.active_count() == threads and calls == [tmp_path] * len(calls)


def test_parts_of_a_large_model_take_turns_in_memory_and_make_the_same_picture(model_dir, monkeypatch):
    settings = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    plain = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    expected = [plain(prompt, **settings).images for prompt in ("a fox", "a whale")]
    turns = []
    monkeypatch.setattr(models, "trim_heap", lambda: turns.append(1))
    assert plain("a fox", **settings).images.shape == expected[0].shape and not turns
    monkeypatch.setattr(models, "LARGE", 0)
    large = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    for prompt, picture in zip(("a fox", "a whale"), expected, strict=True):
        np.testing.assert_array_equal(large(prompt, **settings).images, picture)
    assert len(turns) == 5  # text -> U-Net -> decoder, back to text, and on again


def test_what_a_container_may_use_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    check_memory(int(1e9))  # no files, no limit
    contents = {"max": "3000000000\n", "current": "2500000000\n", "stat": "anon 5\ninactive_file 100000000\n"}
    for name, content in contents.items():
        (tmp_path / f"memory.{name}").write_text(content)
    check_memory(int(0.5e9))
    with pytest.raises(NotEnoughMemory, match=r"about 1\.0 GB of memory, and 0\.6 GB are free"):
        check_memory(int(1e9))
    (tmp_path / "memory.max").write_text("max\n")
    check_memory(int(1e9))
