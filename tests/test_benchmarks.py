"""What the benchmark's figures rest on: sizes, counted work, the difference of pictures, and that medians are shown."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import report, runs
from benchmarks.make_checkpoint import make_checkpoint, unet_of
from benchmarks.report import difference
from benchmarks.run_one import measure
from benchmarks.workload import gigaflops


def some_bench(folder):
    return runs.Bench(folder, folder / "compare.json", {"nas": 1228.0, "sd15": 1606.0})


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_module_that_a_benchmark_runs_does_something():
    for file in runs.HERE.glob("*.py"):
        for name in re.findall(r'"-m", "((?:benchmarks|ov_decidiffusion)[\w.]*)"', file.read_text(encoding="utf-8")):
            module = Path(find_spec(name).origin)
            source = module.with_name("__main__.py") if module.stem == "__init__" else module
            assert '__name__ == "__main__"' in source.read_text(encoding="utf-8"), (file.name, name)


def test_full_size_unets_have_the_published_sizes():
    assert parameters(unet_of("1.0")) == 814_746_884
    assert parameters(unet_of("sd15")) == 859_520_964
    assert 520e6 <= parameters(unet_of("2.0")) <= 530e6


def test_counted_work_agrees_with_what_was_counted_elsewhere():
    assert gigaflops(unet_of("1.0")) == pytest.approx(1228, rel=0.01)
    assert gigaflops(unet_of("sd15")) == pytest.approx(1606, rel=0.01)


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists: delete it or choose another one"):
        make_checkpoint("1.0", tmp_path)


def test_difference_of_pictures(tmp_path):
    a = np.zeros((8, 8, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0] = 16
    Image.fromarray(a).save(tmp_path / "a.png")
    Image.fromarray(b).save(tmp_path / "b.png")
    psnr, largest = difference(tmp_path / "b.png", tmp_path / "a.png")
    assert largest == 16 and psnr == pytest.approx(10 * np.log10(255**2 / (16**2 / 192)))


def test_runs_of_two_tools_time_every_step_and_make_the_same_picture(model_dir, tmp_path):
    for tool in ("ours", "genai"):
        options = runs.pictures_run(tool, "f32", side=128, steps=6)
        result = measure(options | {"model_dir": str(model_dir), "picture": str(tmp_path / f"{tool}.png")})
        assert len(result["steps_s"]) == 5 and result["step_s"] == sorted(result["steps_s"])[2]
        assert 0 < sum(result["steps_s"]) < result["end_to_end_s"] < result["first_picture_s"]
        assert 0 < result["decode_s"] < result["end_to_end_s"]
        assert 0.2 < result["peak_memory_gb"] < 20
    assert difference(tmp_path / "ours.png", tmp_path / "genai.png")[0] > 35


def test_report_shows_medians_and_ratios_to_ours(tmp_path):
    bench = some_bench(tmp_path)
    bench.conversions["plain"] = {"seconds": 44.0, "peak_memory_gb": 2.6, "parts": []}
    parts = [{"name": "unet", "psnr": 65.4}]
    bench.conversions["verified"] = {"seconds": 90.0, "peak_memory_gb": 5.0, "parts": parts}
    for rival, steps in {("ours", "auto"): (2.0, 9.0, 1.0), ("genai", "default"): (3.0, 3.0, 3.0)}.items():
        for turn, step in enumerate(steps):
            figures = {"step_s": step, "end_to_end_s": 5 * step + 1, "first_picture_s": 20.0, "peak_memory_gb": 4.5}
            figures["decode_s"] = 1.0
            bench.runs.append({"run": runs.pictures_run(*rival), "turn": turn, **figures})
    for turn, load in enumerate((2.5, 1.5, 1.0, 1.25)):
        bench.runs.append({"run": runs.loading_run("whole"), "turn": turn, "load_s": load, "cache_gb": 2.0})
    text = report.write(bench, "f32", tmp_path / "results")
    ours, genai = (next(line for line in text.splitlines() if line.startswith(f"| {name}")) for name in (
        "this project, auto", "OpenVINO GenAI, its defaults"))  # fmt: skip
    assert "2.00 s (1.00 to 9.00) [1.00x]" in ours
    assert "3.00 s (3.00 to 3.00) [1.50x]" in genai
    assert "not run" in text and "65.4 dB" in text and "| whole | 2.5 s | 1.2 s | 2.0 GB |" in text
    assert (tmp_path / "results" / "compare.png").stat().st_size > 5000


def test_finished_runs_are_found_again_and_another_machines_are_not(tmp_path, monkeypatch):
    bench = some_bench(tmp_path)
    run = runs.pictures_run("ours", "auto", arguments={"guidance_interval": (0.6, 1e7)})
    bench.runs.append({"run": run, "turn": 0, "step_s": 1.0})
    bench.save()
    again = some_bench(tmp_path)
    again.load()
    assert not again.done(run, 0)  # its picture is gone
    again.pictures.mkdir()
    again.picture(run).touch()
    assert again.done(run, 0) and again.done(json.loads(json.dumps(run)), 0) and not again.done(run, 1)
    monkeypatch.setattr(runs, "machine", lambda: {"processor": "another"})
    other = some_bench(tmp_path)
    other.load()
    assert not other.runs
