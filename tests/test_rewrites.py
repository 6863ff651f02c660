"""Rewritten graphs against the graphs as they were converted."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ov_decidiffusion.convert import psnr
from ov_decidiffusion.rewrites import merge_upsampling, split_group_norms

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def some_inputs(part, height, width):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, height, width)).astype(np.float32)
    if part == "vae_decoder":
        return {"latent_sample": latents}
    texts = rng.standard_normal((2, 77, 96)).astype(np.float32)
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


def enlarged(scales=(2.0, 2.0), mode="nearest", coordinates="asymmetric", pads_end=(0, 0, 0, 0), kernel=3, consumers=1):
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
    pads = [kernel // 2] * 2
    outputs = [ops.convolution(large, weights, [1, 1], pads, pads, [1, 1]) for _ in range(consumers)]
    return ov.Model(outputs, [sample], "enlarged")


@pytest.mark.parametrize(
    "other",
    [
        {"scales": (3.0, 3.0)},
        {"scales": (2.0, 1.0)},
        {"mode": "linear"},
        {"coordinates": "half_pixel"},  # position 2 would not be a copy of position 1
        {"pads_end": (0, 0, 1, 1)},
        {"kernel": 5},
        {"consumers": 2},
    ],
)
def test_only_doubling_before_one_3x3_convolution_is_merged(other):
    model = enlarged(**other)
    before = kinds(model)
    assert merge_upsampling(enlarged()) == 1
    assert merge_upsampling(model) == 0
    assert kinds(model) == before


def test_int8_models_are_quantized_merged_and_run_split(int8_pipe, quantization):
    for part in ("unet", "vae_decoder"):
        stored = kinds(ov.Core().read_model(quantization.model_dir / part / "openvino_model.xml"))
        assert "Interpolate" not in stored and "ConvolutionBackpropData" in stored
    list(int8_pipe.denoise("a large red star on a blue background", preset="fast", seed=0))
    graph = int8_pipe._models._models["unet", True].get_runtime_model()
    running = [
        {key: value.astype(str) for key, value in node.get_rt_info().items()} for node in graph.get_ordered_ops()
    ]
    layers = [node["layerType"] for node in running]
    assert layers.count("Deconvolution") == 3 and layers.count("Reduce") >= 2 * 20
    assert {node["runtimePrecision"] for node in running if node["layerType"] == "Deconvolution"} <= {"i8", "u8"}
