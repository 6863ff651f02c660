"""U-Net-NAS against recorded outputs and against the released checkpoint's list of parameters."""

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ov_decidiffusion.conversion.unet_nas import (
    PER_LEVEL_FIELDS,
    SCALAR_FIELDS,
    V1_UNET_CONFIG,
    FlexibleUNet2DConditionModel,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_config(case: str) -> dict:
    return json.loads((GOLDEN / f"unet_nas_{case}.json").read_text())


def golden_value(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The recorded outputs were made with every parameter filled by this rule."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        return noise / math.sqrt(parameter[0].numel())
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


def golden_model(case: str) -> FlexibleUNet2DConditionModel:
    model = FlexibleUNet2DConditionModel.from_config(golden_config(case)).eval()
    model.load_state_dict({name: golden_value(name, value) for name, value in model.state_dict().items()})
    return model


def run(model: FlexibleUNet2DConditionModel, case: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.load(GOLDEN / f"unet_nas_{case}.npz")
    inputs = [torch.from_numpy(arrays[name]) for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        return model(*inputs).sample.numpy(), arrays["out_sample"]


@pytest.mark.parametrize("case", ["a", "b"])
def test_matches_the_recorded_output_also_after_saving_and_loading(case, tmp_path):
    model = golden_model(case)
    out_sample, expected = run(model, case)
    np.testing.assert_allclose(out_sample, expected, rtol=0, atol=1e-4)

    model.save_pretrained(tmp_path)
    reloaded = FlexibleUNet2DConditionModel.from_pretrained(tmp_path)
    assert reloaded.config["configurations"] == golden_config(case)["configurations"]
    assert list(reloaded.config["block_out_channels"]) == golden_config(case)["block_out_channels"]
    assert np.array_equal(run(reloaded, case)[0], out_sample)


def test_has_exactly_the_parameters_of_decidiffusion_1_0():
    with torch.device("meta"):
        model = FlexibleUNet2DConditionModel.from_config(json.loads(V1_UNET_CONFIG.read_text()))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == json.loads((GOLDEN / "decidiffusion_v1_parameters.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == 814_746_884
    assert set(shapes) == set(model.state_dict())


@pytest.mark.parametrize("field", [*SCALAR_FIELDS, *PER_LEVEL_FIELDS])
def test_refuses_a_missing_field_by_name(field):
    config = golden_config("a")
    del config["configurations"][field]
    with pytest.raises(ValueError, match=f"'{field}'"):
        FlexibleUNet2DConditionModel.from_config(config)


@pytest.mark.parametrize("field", PER_LEVEL_FIELDS)
def test_refuses_a_wrong_length_by_name(field):
    config = golden_config("a")
    config["configurations"][field].append(config["configurations"][field][-1])
    with pytest.raises(ValueError, match=f"'{field}'" if field != "down_blocks_out_channels" else "levels"):
        FlexibleUNet2DConditionModel.from_config(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temb_dim", 64),
        ("num_attention_heads", 5),
        ("mid_num_resnets", -1),
        ("add_downsample", [1, 1, 0]),
        ("down_blocks_out_channels", [32, 64, 100]),
        ("prev_output_channels", [64, 128, 64]),
    ],
)
def test_refuses_a_value_that_cannot_be_built(field, value):
    config = copy.deepcopy(golden_config("a"))
    config["configurations"][field] = value
    with pytest.raises(ValueError, match=field):
        FlexibleUNet2DConditionModel.from_config(config)


def test_weights_without_a_mid_block_load_without_one(tmp_path):
    model = golden_model("b")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("mid_block.")}
    save_file(kept, weights, metadata={"format": "pt"})

    reloaded = FlexibleUNet2DConditionModel.from_pretrained(tmp_path)
    assert reloaded.mid_block is None
    model.mid_block = None
    assert np.array_equal(run(reloaded, "b")[0], run(model, "b")[0])
