"""Damaged and hostile folders: refused by name, or pictures; nothing of them is run, followed or built without end."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNIX_ONLY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT, check_checkpoint
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.export import write_tokenizer
from ov_decidiffusion.conversion.reports import existing_report
from ov_decidiffusion.conversion.torch_modules import (
    load_text_encoder,
    load_tiny_decoder,
    load_tokenizer,
    load_unet,
    load_vae,
)
from ov_decidiffusion.demo.app import make_demo
from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.model_folder.integrity import describe_files, read_json, verify_model_dir
from ov_decidiffusion.model_folder.layout import (
    CONVERSION_REPORT,
    DEFAULTS_FILE,
    QUANTIZATION_FORMAT,
    QUANTIZATION_REPORT,
    TINY_DECODER,
    graph_file,
    prompt_tokenizer_file,
    quantized_sibling,
)
from ov_decidiffusion.model_folder.tokenizer import prompt_tokenizer
from ov_decidiffusion.model_folder.writing import write_json
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import QuantizedPart, existing_quantization
from ov_decidiffusion.runtime.models import Models
from ov_decidiffusion.schedulers.registry import make_scheduler

ROOT = Path(__file__).parents[2]
LENGTH = int(os.environ.get("FUZZ_LENGTH", "1"))  # `make soak` draws ten times the examples
ODD = st.sampled_from([None, -1, 0, 3, 10**9, 1e400, float("nan"), "", "x", [], [1], {}, True, [[]], "somebody/kernel"])
FOUND_AS_THEY_ARE = (Phase.explicit, Phase.reuse, Phase.generate)  # every example takes a second: none are made smaller
CUT = (
    "unet/openvino_model.bin",
    "unet/openvino_model.xml",
    "vae_decoder/openvino_model.bin",
    "tiny_decoder/openvino_model.bin",
)
LOADERS = {"text_encoder": load_text_encoder, "flexible_unet": load_unet, "vae": load_vae}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path_factory.mktemp("checkpoint") / "tiny-decidiffusion")


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory) -> Path:
    """A model folder without its report: what other tools made, or what was changed on purpose."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("folder") / "tiny")
    (folder / "conversion_report.json").unlink()
    return folder


def json_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.json") if "openvino" not in file.name)


def changed(content, data):
    """One field of a JSON object, at any depth, replaced or taken away."""
    content = copy.deepcopy(content)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(content)
    holder, key = data.draw(st.sampled_from(places))
    if isinstance(holder, dict) and data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(ODD)
    return content


class Damage:
    """A file with other contents for as long as it is looked at."""

    def __init__(self, file: Path, content: bytes):
        self.file, self.content, self.kept = file, content, file.read_bytes()

    def __enter__(self):
        self.file.write_bytes(self.content)

    def __exit__(self, *args):
        self.file.write_bytes(self.kept)


def use_checkpoint(folder: Path) -> None:
    """What a conversion does before it traces."""
    check_checkpoint(folder)
    make_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))
    prompt_tokenizer(load_tokenizer(folder))
    if (folder / TINY_DECODER).is_dir():
        load_tiny_decoder(folder / TINY_DECODER)
    for load in LOADERS.values():
        load(folder)


@settings(max_examples=15 * LENGTH, deadline=None, suppress_health_check=list(HealthCheck), phases=FOUND_AS_THEY_ARE)
@given(data=st.data())
def test_a_checkpoint_with_any_odd_field_is_taken_or_refused(checkpoint, data):
    file = data.draw(st.sampled_from(json_files(checkpoint)))
    content = json.dumps(changed(json.loads(file.read_text()), data)).encode()
    with Damage(file, data.draw(st.sampled_from([content, content, content, content[:-3], b"", b"[]", b"null"]))):
        try:
            use_checkpoint(checkpoint)
        except ValueError as error:
            assert str(error)


@settings(max_examples=5 * LENGTH, deadline=None, suppress_health_check=list(HealthCheck), phases=FOUND_AS_THEY_ARE)
@given(data=st.data())
def test_a_model_folder_with_any_odd_field_makes_a_picture_or_is_refused(folder, data):
    file = data.draw(st.sampled_from(json_files(folder)))
    content = json.dumps(changed(json.loads(file.read_text()), data)).encode()
    with Damage(file, data.draw(st.sampled_from([content, content, content, content[:-3], b"", b"[]"]))):
        try:
            pipe = OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")
            pipe.set_progress_bar_config(disable=True)
            picture = pipe("a fox", seed=0, num_inference_steps=2, output_type="np").images
            if file.name == DEFAULTS_FILE:
                make_demo(pipe).close(verbose=False)
        except (ValueError, FloatingPointError) as error:
            assert str(error)
        else:
            assert picture.ndim == 4 and np.isfinite(picture).all()


@pytest.fixture(scope="module")
def reported(checkpoint, small_model_dir, tmp_path_factory) -> Path:
    """A model folder and beside it one of INT8 models, by their reports: what is in them does not matter here."""
    folder = shutil.copytree(small_model_dir, tmp_path_factory.mktemp("reported") / "small-fp16")
    quantized = shutil.copytree(folder, quantized_sibling(folder))
    part = asdict(QuantizedPart("unet", True, 1.0, 2.0, 3.0, 40.0))
    content = {"format": QUANTIZATION_FORMAT, "mode": "int8", "files": describe_files(quantized), "parts": [part]}
    write_json(quantized / QUANTIZATION_REPORT, content)
    return folder


@settings(max_examples=20 * LENGTH, deadline=None, suppress_health_check=list(HealthCheck), phases=FOUND_AS_THEY_ARE)
@given(data=st.data())
def test_a_report_with_any_odd_field_is_taken_or_refused(reported, small_checkpoint, data):
    quantized = quantized_sibling(reported)
    files = [reported / CONVERSION_REPORT, quantized / CONVERSION_REPORT, quantized / QUANTIZATION_REPORT]
    file = data.draw(st.sampled_from(files))
    with Damage(file, json.dumps(changed(json.loads(file.read_text()), data)).encode()):
        for look in (
            lambda: str(existing_report(reported, small_checkpoint, None, "fp16", False)),
            lambda: str(existing_quantization(quantized, reported)),
            lambda: verify_model_dir(quantized),
            lambda: Models.load(reported, inference_precision="f32").wait(),
        ):
            try:
                look()
            except ValueError as error:
                assert str(error)


def test_models_of_an_older_format_are_not_used(reported, caplog):
    report = quantized_sibling(reported) / QUANTIZATION_REPORT
    assert Models.load(reported, inference_precision="f32").quantized_parts == {"unet"}
    with Damage(report, json.dumps(read_json(report) | {"format": QUANTIZATION_FORMAT - 1}).encode()):
        assert not Models.load(reported, inference_precision="f32").quantized_parts
    assert "older format: not used" in caplog.text


@pytest.mark.parametrize("blocks", [None, [], 3, {"add_downsample": None}, {"add_downsample": [1, "x"]}])
def test_blocks_that_are_none_are_refused_by_their_name(folder, blocks):
    file = folder / "unet" / "config.json"
    content = json.dumps(read_json(file) | {"configurations": blocks}).encode()
    with Damage(file, content), pytest.raises(ValueError, match="`unet/config.json: configurations` must hold"):
        OVStableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("cut", [0, 100, 0.5])
@pytest.mark.parametrize("name", CUT)
def test_a_model_cut_short_is_refused_by_its_folder(folder, name, cut):
    content = (folder / name).read_bytes()
    with (
        Damage(folder / name, content[: int(cut * len(content)) if cut < 1 else cut]),
        pytest.raises(ValueError, match="`model_dir`.*tiny.*(compiling|reading|running)|lacks"),
    ):
        OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")("a fox", num_inference_steps=1)


@UNIX_ONLY
def test_links_out_of_a_checkpoint_are_not_followed_and_other_files_not_copied(small_checkpoint, tmp_path):
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    for name in ("x.txt", "run.py"):
        os.symlink("/etc/hostname", checkpoint / "tokenizer" / name)
    report = convert_checkpoint(checkpoint, tmp_path / "model", verify=False)
    tokenizer = {file.name for file in (report.model_dir / "tokenizer").iterdir()}
    assert not {"x.txt", "run.py"} & tokenizer and "vocab.json" in tokenizer
    for name in ("x.txt", "run.py"):
        (checkpoint / "tokenizer" / name).unlink()
    merges = checkpoint / "tokenizer" / "merges.txt"
    kept = merges.read_bytes()
    outside = tmp_path / "outside.txt"
    outside.write_bytes(kept)
    merges.unlink()
    os.symlink(outside, merges)
    with pytest.raises(CheckpointError, match="merges.txt is a link out of the checkpoint"):
        check_checkpoint(checkpoint)
    merges.unlink()
    merges.write_bytes(kept)
    check_checkpoint(checkpoint)


@UNIX_ONLY
def test_files_that_a_checkpoint_does_not_have_are_not_read(checkpoint, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("{{ 'a word that nobody may read' }}")
    template = checkpoint / "tokenizer" / "chat_template.jinja"
    os.symlink(secret, template)
    try:
        write_tokenizer(checkpoint, tmp_path / "model")
        written = b"".join(file.read_bytes() for file in (tmp_path / "model").rglob("*.*"))
        assert b"nobody may read" not in written and b"whale" in written
    finally:
        template.unlink()
    index = checkpoint / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"decoder.conv_in.bias": "other.bin"}}))
    try:
        with pytest.raises(CheckpointError, match="holds weights in one file and in several"):
            check_checkpoint(checkpoint)
    finally:
        index.unlink()


def test_tokens_that_the_text_encoder_has_no_row_for_are_refused_wherever_they_stand(checkpoint, folder):
    settings = checkpoint / "tokenizer" / "tokenizer_config.json"
    added = json.loads(settings.read_text())
    added.setdefault("added_tokens_decoder", {})["835"] = {"content": "<new>", "special": False}
    with (
        Damage(settings, json.dumps(added).encode()),
        pytest.raises(CheckpointError, match="has '<new>' as number 835"),
    ):
        load_tokenizer(checkpoint)
    file = prompt_tokenizer_file(folder)
    content = json.loads(file.read_text())
    content["model"]["vocab"]["fox</w>"] = 10**6
    with (
        Damage(file, json.dumps(content).encode()),
        pytest.raises(ValueError, match="has 'fox</w>' as number 1000000"),
    ):
        OVStableDiffusionPipeline.from_pretrained(folder)


def test_attention_named_in_a_configuration_is_not_loaded_from_anywhere(checkpoint):
    file = checkpoint / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"_attn_implementation": "somebody/kernel", "attn_implementation": "a/b"}
    with Damage(file, json.dumps(config).encode()):
        assert load_text_encoder(checkpoint).config._attn_implementation == "sdpa"


def test_pickles_are_only_taken_by_name_and_never_run(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    weights = checkpoint / "text_encoder" / "model.safetensors"
    kept = tmp_path / "kept.safetensors"
    state = load_file(weights)
    shutil.move(weights, kept)
    pickled = weights.with_name("pytorch_model.bin")
    try:
        torch.save(state, pickled)
        with pytest.raises(CheckpointError, match="is a pickle.*allow_pickles=True"):
            check_checkpoint(checkpoint)
        check_checkpoint(checkpoint, allow_pickles=True)
        assert torch.equal(load_text_encoder(checkpoint).state_dict()["final_layer_norm.bias"].half(),
                           state["text_model.final_layer_norm.bias"])  # fmt: skip
        pickled.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match="text_encoder does not hold a model that can be built"):
            load_text_encoder(checkpoint)
        assert not (tmp_path / "ran").exists()
    finally:
        pickled.unlink()
        shutil.move(kept, weights)


def test_weights_without_numbers_and_words_without_a_row_are_refused(checkpoint):
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_in.bias"][0] = float("nan")
    kept = weights.read_bytes()
    save_file(state, weights)
    with pytest.raises(CheckpointError, match="NaN or infinity, in decoder.conv_in.bias"):
        load_vae(checkpoint)
    weights.write_bytes(kept)
    vocabulary = checkpoint / "tokenizer" / "vocab.json"
    words = json.loads(vocabulary.read_text())
    with (
        Damage(vocabulary, json.dumps(words | {"fox</w>": 100_000}).encode()),
        pytest.raises(CheckpointError, match="vocab.json does not fit the text encoder"),
    ):
        check_checkpoint(checkpoint)
    with (
        Damage(weights, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        pytest.raises(CheckpointError, match="only a pointer of Git LFS"),
    ):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("field", ["down_blocks_num_resnets", "mid_num_attentions"])
def test_a_configuration_of_a_billion_layers_is_refused_before_it_is_built(checkpoint, field):
    file = checkpoint / "flexible_unet" / "config.json"
    config = json.loads(file.read_text())
    found = config["configurations"][field]
    config["configurations"][field] = [10**9, *found[1:]] if isinstance(found, list) else 10**9
    with Damage(file, json.dumps(config).encode()), pytest.raises(CheckpointError, match=f"{field} = 1000000000"):
        check_checkpoint(checkpoint)


@UNIX_ONLY
def test_a_pipeline_says_what_to_do_instead_of_being_pickled_or_forked(pipe):
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="from_pretrained in each process"):
            way(pipe)
    child = os.fork()
    if child == 0:  # pragma: no cover
        refused = 0
        for use in (
            lambda: pipe("a fox", num_inference_steps=1),
            lambda: pipe("a fox", num_inference_steps=2, cache_interval=2),
            lambda: pipe.models.profiled("unet"),
            lambda: pipe.models.compiled("vae_encoder"),
            lambda: OVStableDiffusionPipeline.from_pretrained(pipe.models.folder),
        ):
            try:
                use()
            except RuntimeError as error:
                refused += "before a fork" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("where", ["in a model", "in torch"])
def test_a_process_that_ends_while_a_thread_of_it_generates_ends_cleanly(model_dir, where):
    code = (
        "import sys, threading, time, torch; from ov_decidiffusion import OVStableDiffusionPipeline as P\n"
        "pipe, large = P.from_pretrained(sys.argv[1], inference_precision='f32'), torch.ones(2048, 2048)\n"
        "of, there = type(pipe.scheduler), threading.Event()\n"
        "step = of.step\n"
        "def slow(*args, **kwargs):\n"
        "    there.set()\n"
        "    for _ in range(10 if sys.argv[2] == 'in torch' else 0): large @ large\n"
        "    return step(*args, **kwargs)\n"
        "of.step = slow\n"
        "work = lambda: pipe('a fox', num_inference_steps=500)\n"
        "threading.Thread(target=work, daemon=True).start(); there.wait(); time.sleep(0.5)"
    )
    command = [sys.executable, "-c", code, str(model_dir), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_threads_that_come_to_openvino_s_numbers_at_once_do_not_wait_for_each_other(model_dir):
    code = (
        "import sys, threading, openvino as ov, ov_decidiffusion.runtime.models\n"
        "ops = ov.Core().read_model(sys.argv[1]).get_ordered_ops()\n"
        "constants = [node for node in ops if node.get_type_name() == 'Constant'][:8]\n"
        "there = threading.Barrier(8)\n"
        "sys.setswitchinterval(1e-6)\n"
        "def read(node): there.wait(); node.get_data()\n"
        "threads = [threading.Thread(target=read, args=(node,)) for node in constants]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    command = [sys.executable, "-c", code, str(graph_file(model_dir, "vae_decoder"))]
    for _ in range(3):  # without the care that is taken, about nine of ten never end
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)
