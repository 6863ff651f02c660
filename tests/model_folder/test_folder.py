"""The model folder: changes of the checkpoint and damage are noticed, and two makers end in one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import UNIX_ONLY
from PIL import Image

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.model_folder.defaults import read_defaults
from ov_decidiffusion.model_folder.integrity import verify_model_dir
from ov_decidiffusion.model_folder.layout import DEFAULTS_FILE, default_model_dir
from ov_decidiffusion.model_folder.writing import copy_folder, only_one, write_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline


@pytest.fixture
def copied(small_model_dir, tmp_path) -> Path:
    return shutil.copytree(small_model_dir, tmp_path / "tiny")


def flip_a_bit(file: Path, place: float) -> None:
    position = int(place * (file.stat().st_size - 1))
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["unet/openvino_model.bin", "tokenizer/vocab.json", "vae_encoder/config.json"])
def test_a_flipped_bit_is_found_on_request(copied, name):
    verify_model_dir(copied)
    for place in (0.1, 0.9):
        flip_a_bit(copied / name, place)
        with pytest.raises(ValueError, match=f"is damaged: {name} is not what was written.*convert again"):
            verify_model_dir(copied)
        flip_a_bit(copied / name, place)
    verify_model_dir(copied)


def test_a_file_cut_short_is_found_whenever_the_folder_is_loaded(copied, small_checkpoint):
    os.truncate(copied / "unet" / "openvino_model.bin", 1000)
    for use in (
        OVStableDiffusionPipeline.from_pretrained,
        lambda folder: convert_checkpoint(small_checkpoint, folder),
    ):
        with pytest.raises(ValueError, match="unet/openvino_model.bin is of another size than was written"):
            use(copied)


def test_any_changed_byte_of_a_checkpoint_is_seen_and_a_new_time_alone_is_none(model_dir, tmp_path):
    checkpoint = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / EMBEDDED_CHECKPOINT.name)
    weights = checkpoint / "flexible_unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights)
    assert not convert_checkpoint(checkpoint, model_dir).converted
    flip_a_bit(weights, 0.8)  # far behind the first megabyte
    with pytest.raises(ValueError, match="fingerprint differs"):
        convert_checkpoint(checkpoint, model_dir)


def test_a_folder_of_fewer_sizes_is_converted_again_and_until_then_keeps_to_them(copied, caplog, small_checkpoint):
    file = copied / "conversion_report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"format": 2}))
    pipe = OVStableDiffusionPipeline.from_pretrained(copied)
    assert pipe.size_factor == 64
    with pytest.raises(ValueError, match="`width` must be a multiple of 64"):
        pipe("a fox", width=96, height=64)
    pipe.close()
    assert convert_checkpoint(small_checkpoint, copied, verify=False).converted
    assert "makes fewer sizes of pictures: converting it again" in caplog.text
    assert json.loads(file.read_text())["format"] > 2


def test_a_folder_of_an_older_format_is_converted_again(copied, caplog, small_checkpoint):
    file = copied / "conversion_report.json"
    report = json.loads(file.read_text())
    for name in ("format", "read", "files"):
        del report[name]
    file.write_text(json.dumps(report | {"fingerprint": "0123"}))
    (copied / "of-old").write_text("")
    assert convert_checkpoint(small_checkpoint, copied, verify=False).converted
    assert "older format" in caplog.text and not (copied / "of-old").exists()
    verify_model_dir(copied)
    assert [left.name for left in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{", '{"format": 9}'])
def test_a_broken_report_is_told_by_its_name(copied, content, small_checkpoint):
    (copied / "conversion_report.json").write_text(content)
    with pytest.raises(ValueError, match="conversion_report.json"):
        convert_checkpoint(small_checkpoint, copied)


def test_a_folder_of_a_newer_format_is_left_alone(copied, small_checkpoint):
    file = copied / "conversion_report.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"format": content["format"] + 1}))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is no report of this version .another format."):
        convert_checkpoint(small_checkpoint, copied)
    assert file.read_bytes() == before


@pytest.mark.at_length
def test_two_conversions_at_once_and_one_killed_before_end_in_one_folder(tmp_path, small_checkpoint):
    target = tmp_path / "models" / "tiny"
    left = target.with_name(f".{target.name}.0123abcd.partial")
    left.mkdir(parents=True)
    (left / "half").write_text("of a model")
    code = (
        "import sys; from ov_decidiffusion.conversion.convert import convert_checkpoint; "
        "print(convert_checkpoint(sys.argv[1], sys.argv[2], verify=False))"
    )
    command = [sys.executable, "-c", code, str(small_checkpoint), str(target)]
    root = Path(__file__).parents[2]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [process.communicate(timeout=300)[0] for process in both]
    assert sorted("converted to" in report for report in reports) == [False, True]
    assert all(str(target) in report for report in reports)
    assert [one.name for one in target.parent.iterdir()] == [target.name]


def test_what_another_folder_is_written_in_is_left_alone(tmp_path):
    mine, others = tmp_path / ".a.0123abcd.partial", tmp_path / ".a.b.0123abcd.partial"
    for left in (mine, tmp_path / ".a.0123abcd.old.partial", others):
        left.mkdir()
    with only_one(tmp_path / "a"):
        assert list(tmp_path.iterdir()) == [others]


@UNIX_ONLY
def test_a_copy_of_a_folder_that_cannot_be_written_to_can_be(tmp_path):
    source, inner = tmp_path / "source", tmp_path / "source" / "unet"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    (source / "left_out").mkdir()
    for path, mode in ((inner / "config.json", 0o444), (inner, 0o555), (source, 0o555)):
        path.chmod(mode)
    copy_folder(source, tmp_path / "copy", leave_out=["left_out"])
    copied = sorted((tmp_path / "copy").rglob("*"))
    assert [path.name for path in copied] == ["unet", "config.json"]
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy", *copied))
    for path in (source, inner):  # for whoever deletes it
        path.chmod(0o755)


def test_an_empty_folder_is_a_place_to_convert_to_and_names_come_from_real_ones(
    tmp_path, monkeypatch, small_checkpoint
):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert convert_checkpoint(small_checkpoint, empty, verify=False).converted
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here is the folder that this runs in: run it from outside of it"):
        convert_checkpoint(small_checkpoint, ".", verify=False)
    assert Path.cwd() == tmp_path / "here" and not list(Path.cwd().iterdir())
    with pytest.raises(OSError, match="is no folder that can be written to"):
        convert_checkpoint("somebody/theirs", __file__ + "/models")
    monkeypatch.chdir(tmp_path / "empty")
    assert default_model_dir(".") == Path("models/empty-fp16")


@pytest.mark.parametrize(
    "odd",
    [
        {"example_prompts": 3},
        {"example_prompts": []},
        {"example_prompts": [["a fox"]]},
        {"negative_example": ["a castle"]},
        {"image_example": 3},
        {"understands": [1]},
        {"understands": {"places": [1]}},
        {"calibration_prompts": ["a fox"]},
    ],
)
def test_texts_of_another_form_are_refused_by_file_and_name(tmp_path, odd):
    write_json(tmp_path / DEFAULTS_FILE, odd)
    with pytest.raises(ValueError, match=f"{DEFAULTS_FILE}: {next(iter(odd))}` must be "):
        read_defaults(tmp_path)


def test_a_loaded_pipeline_works_from_another_folder_too(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir.name, inference_precision="f32")
    monkeypatch.chdir(tmp_path)
    source = Image.new("RGB", (128, 128), "red")
    assert pipe("a fox", image=source, num_inference_steps=2, seed=1).images  # the encoder is compiled only now
    assert pipe.tokenizer("a fox")


@pytest.mark.parametrize("part", ["unet", "vae_decoder"])
def test_weights_that_became_no_numbers_are_told_and_make_no_black_picture(copied, part):
    file = copied / part / "openvino_model.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match=f"is damaged: {part}/openvino_model.bin is not what was written"):
        OVStableDiffusionPipeline.from_pretrained(copied, inference_precision="f32")("a fox", num_inference_steps=2)


@UNIX_ONLY
def test_a_target_that_is_a_link_to_nowhere_is_refused_before_the_work(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ov_decidiffusion.conversion.export.make_model_dir", lambda *_: pytest.fail("began to work"))
    target = tmp_path / "link"
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a link to .*nowhere, which is not there"):
        convert_checkpoint(small_checkpoint, target)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are of any bytes there")
def test_folders_whose_names_are_no_utf8_are_refused_by_name(copied, small_checkpoint, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    for call in (
        lambda: convert_checkpoint(small_checkpoint, odd),
        lambda: convert_checkpoint(odd, tmp_path / "models"),
        lambda: OVStableDiffusionPipeline.from_pretrained(shutil.copytree(copied, odd)),
        lambda: verify_model_dir(odd),
    ):
        with pytest.raises(ValueError, match="has a name that is not UTF-8: rename the folder"):
            call()


def test_without_a_console_everything_works_but_words(model_dir, tmp_path):
    """As under ``pythonw``, where both streams are None."""
    code = (
        "import sys; sys.stdout = sys.stderr = None\n"
        "from ov_decidiffusion import OVStableDiffusionPipeline\n"
        f"pipe = OVStableDiffusionPipeline.from_pretrained({str(model_dir)!r})\n"
        "picture = pipe('a fox', num_inference_steps=1).images[0]\n"
        f"picture.save({str(tmp_path / 'library.png')!r})\n"
        "from ov_decidiffusion.cli.main import main\n"
        f"sys.argv = ['x', 'generate', 'a fox', '--num-inference-steps', '1', '-o', {str(tmp_path / 'made.png')!r},\n"
        f"            '--model-dir', {str(model_dir)!r}]\n"
        "main()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "library.png").is_file() and (tmp_path / "made.png").is_file()
