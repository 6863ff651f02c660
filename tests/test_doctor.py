"""``doctor`` on checkpoints that are whole, and on such that are damaged in as many ways as people meet."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ov_decidiffusion.doctor import examine
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.writing import write_json


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(small_checkpoint, tmp_path / "checkpoint")


def of_report(folder: Path = Path("doctor")) -> dict[str, dict]:
    report = read_json(folder / "report.json")
    return {check["name"]: check for check in report["checks"]}


def test_a_whole_checkpoint_is_right_and_an_interrupted_look_at_it_goes_on(checkpoint, capsys, monkeypatch):
    assert examine(checkpoint, quick=True)
    report = read_json(Path("doctor/report.json"))
    assert report["is_right"] and [check["verdict"] for check in report["checks"]] == ["right"] * 3 + ["left out"] * 2
    # Weights of 32 bits lose some in the model folder, and that is the conversion's agreement, not a difference here.
    assert read_json(Path("doctor/kept.json"))["difference"] < 0.5
    told = capsys.readouterr().out
    assert "no download" in told and "agreement with PyTorch: text_encoder" in told
    assert told.rstrip().splitlines()[-1] == report["line"] and "3 of 5 right" in report["line"]
    text = Path("doctor/report.md").read_text()
    assert report["line"] in text and str(Path.home()) not in text + json.dumps(report)
    monkeypatch.setattr("ov_decidiffusion.doctor._difference", lambda *_: pytest.fail("done once already"))
    assert examine(checkpoint, quick=True)


@pytest.mark.at_length
def test_the_embedded_checkpoint_is_drawn_by_each_preset(tmp_path):
    command = [sys.executable, "-m", "ov_decidiffusion", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 right" in done.stdout and "peak" in done.stdout
    with Image.open(tmp_path / "doctor" / "sheet.png") as sheet:
        assert sheet.width > 700 and sheet.height > 2000


def change_weights(file: Path, **changed) -> None:
    save_file(load_file(file) | changed, file, {"format": "pt"})


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "flexible_unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_part(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "vae")


def with_nan(checkpoint: Path) -> None:
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    change_weights(
        file, **{"decoder.conv_in.bias": torch.full_like(load_file(file)["decoder.conv_in.bias"], torch.nan)}
    )


def without_a_parameter(checkpoint: Path) -> None:
    file = checkpoint / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, {"format": "pt"})


def of_whole_numbers(checkpoint: Path) -> None:
    file = checkpoint / "flexible_unet" / "diffusion_pytorch_model.safetensors"
    change_weights(file, **{"conv_in.weight": load_file(file)["conv_in.weight"].to(torch.int16)})


def of_another_shape(checkpoint: Path) -> None:
    config = read_json(checkpoint / "flexible_unet" / "config.json")
    write_json(checkpoint / "flexible_unet" / "config.json", config | {"cross_attention_dim": 32})


def with_an_odd_schedule(checkpoint: Path) -> None:
    file = checkpoint / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {"_class_name": "ScheduleOfOurOwn"})


def without_vocabulary(checkpoint: Path) -> None:
    for file in (checkpoint / "tokenizer").glob("*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_short, "flexible_unet/diffusion_pytorch_model.safetensors"),
        (without_a_part, "vae/"),
        (with_nan, "NaN or infinity, in decoder.conv_in.bias"),
        (without_a_parameter, "lack 1 parameters"),
        (of_whole_numbers, "conv_in.weight"),
        (of_another_shape, "cross_attention_dim"),
        (with_an_odd_schedule, "ScheduleOfOurOwn"),
        (without_vocabulary, "tokenizer"),
    ],
)
def test_each_kind_of_damage_is_named(checkpoint, damage, named):
    damage(checkpoint)
    assert not examine(checkpoint, quick=True, tell=lambda _: None)
    wrong = [check for check in of_report().values() if check["verdict"] == "wrong"]
    assert len(wrong) == 1 and named in wrong[0]["told"], wrong
    assert of_report()["drawing"]["verdict"] == "left out"


def test_the_command_ends_with_its_verdict(checkpoint):
    without_a_part(checkpoint)
    command = [sys.executable, "-m", "ov_decidiffusion", "doctor", "--checkpoint", str(checkpoint), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "✗ the checkpoint's files" in done.stdout
