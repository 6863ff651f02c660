"""Rewritten graphs against the graphs as they were converted."""

import platform
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.runtime.transformations import merge_upsampling, split_group_norms
from training.models import TEXT_WIDTH

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def has_avx512():
    """Without it, OpenVINO runs transposed convolutions of dynamic sizes in f32."""
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and "avx512" in facts.read_text()


def some_inputs(part, height, width):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, height, width)).astype(np.float32)
    if part == "vae_decoder":
        return {"latent_sample": latents}
    texts = rng.standard_normal((2, 77, TEXT_WIDTH)).astype(np.float32)
    return {"sample": latents, "timestep": np.array([420]), "encoder_hidden_states": texts}


@pytest.mark.parametrize("part", ["unet", "vae_decoder"])
@pytest.mark.parametrize("rewrite", [merge_upsampling, split_group_norms])
def test_a_rewritten_model_computes_the_same_at_every_size(model_dir, part, rewrite):
    core = ov.Core()
    model = core.read_model(model_dir / part / "openvino_model.xml")
    before = kinds(model)
    plain = core.compile_model(model.clone(), "CPU", F32)
    changed = rewrite(model)
    after = kinds(model)
    if rewrite is merge_upsampling:
        assert changed == before.count("Interpolate") == after.count("ConvolutionBackpropData") > 0
        assert "Interpolate" not in after
    else:
        assert changed == before.count("GroupNormalization") - after.count("GroupNormalization") > 0
    rewritten = core.compile_model(model, "CPU", F32)
    for height, width in ((16, 16), (8, 24)):
        inputs = some_inputs(part, height, width)
        agreement = psnr(rewritten(inputs)[0], plain(inputs)[0])
        print(f"{part}, {rewrite.__name__}, {height}x{width}: {agreement:.0f} dB")
        assert agreement >= 100


def enlarged(
    scales=(2.0, 2.0),
    mode="nearest",
    coordinates="asymmetric",
    pads_end=(0, 0, 0, 0),
    kernel=3,
    stride=1,
    padding=1,
    dilation=1,
    consumers=1,
):
    """An enlargement, and convolutions of it."""
    sample = ops.parameter([1, 3, -1, -1], np.float32)
    large = ops.interpolate(
        sample,
        np.array(scales, np.float32),
        mode,
        "scales",
        pads_end=list(pads_end),
        coordinate_transformation_mode=coordinates,
        nearest_mode="floor",
        axes=np.array([2, 3]),
    )
    weights = np.random.default_rng(0).standard_normal((5, 3, kernel, kernel)).astype(np.float32)
    strides, pads, dilations = [stride] * 2, [padding] * 2, [dilation] * 2
    outputs = [ops.convolution(large, weights, strides, pads, pads, dilations) for _ in range(consumers)]
    return ov.Model(outputs, [sample], "enlarged")


@pytest.mark.parametrize(
    "other",
    [
        {"scales": (3.0, 3.0)},
        {"scales": (2.0, 1.0)},
        {"mode": "linear"},
        {"coordinates": "half_pixel"},  # position 2 would not be a copy of position 1
        {"pads_end": (0, 0, 1, 1)},
        {"kernel": 5, "padding": 2},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"consumers": 2},
    ],
)
def test_only_doubling_before_one_3x3_convolution_is_merged(other):
    model = enlarged(**other)
    before = kinds(model)
    assert merge_upsampling(enlarged()) == 1
    assert merge_upsampling(model) == 0
    assert kinds(model) == before


@pytest.mark.parametrize(("mean", "floor"), [(0.0, 120), (10.0, 80)])
def test_split_statistics_hold_where_the_mean_is_many_times_the_spread(mean, floor):
    sample = ops.parameter([-1, 8, -1, -1], np.float32)
    weight, bias = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    model = ov.Model([ops.group_normalization(sample, weight, bias, 4, 1e-6)], [sample], "norm")
    values = np.random.default_rng(1).standard_normal((2, 8, 24, 16)).astype(np.float32) + np.float32(mean)
    groups = values.astype(np.float64).reshape(2, 4, -1)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-6)
    expected = normal.reshape(values.shape) * weight[:, None, None] + bias[:, None, None]
    assert split_group_norms(model) == 1 and "GroupNormalization" not in kinds(model)
    agreement = psnr(ov.Core().compile_model(model, "CPU", F32)(values)[0], expected)
    print(f"group normalization of values around {mean:.0f}: {agreement:.0f} dB")
    assert agreement >= floor


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what OpenVINO runs on x86 processors")
def test_int8_models_are_quantized_merged_and_run_split(int8_pipe, quantization):
    for part in ("unet", "vae_decoder"):
        stored = kinds(ov.Core().read_model(quantization.model_dir / part / "openvino_model.xml"))
        assert "Interpolate" not in stored and "ConvolutionBackpropData" in stored
    list(int8_pipe.denoise("a fox in the snow", preset="fast", seed=0))
    graph = int8_pipe.models.compiled("unet", True).get_runtime_model()
    running = [
        {key: value.astype(str) for key, value in node.get_rt_info().items()} for node in graph.get_ordered_ops()
    ]
    layers = [node["layerType"] for node in running]
    assert layers.count("Deconvolution") == 3 and layers.count("Reduce") >= 2 * 20
    precisions = {node["runtimePrecision"] for node in running if node["layerType"] == "Deconvolution"}
    assert precisions <= {"i8", "u8"} or not has_avx512()
    # At a level's odd side the last row is a little different: it is cut from a larger one.
    own = {"preset": "fast", "seed": 0, "width": 96, "height": 72, "output_type": "np"}
    exact, fast = (int8_pipe("a fox in the snow", **own | other).images for other in ({"preset": "exact"}, {}))
    agreement = psnr(fast, exact)
    print(f"fast, 96x72: {agreement:.1f} dB from exact")
    assert fast.std() > 0.05 and agreement > 15


def test_merged_upsampling_is_cut_to_odd_sides(model_dir):
    core = ov.Core()
    model = core.read_model(model_dir / "unet" / "openvino_model.xml")
    plain = core.compile_model(model, "CPU", F32)
    assert merge_upsampling(model.clone(), to_skips="keep") == 1  # the mid block's, which knows no size
    assert merge_upsampling(model, to_skips="crop") == 3
    cropped = core.compile_model(model, "CPU", F32)
    inputs = some_inputs("unet", 16, 24)
    assert psnr(cropped(inputs)[0], plain(inputs)[0]) >= 100
    inputs = some_inputs("unet", 18, 27)
    assert 20 < psnr(cropped(inputs)[0], plain(inputs)[0]) < 100
