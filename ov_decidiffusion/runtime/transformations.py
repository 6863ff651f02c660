"""Changes to a model's graph before it is compiled.

- ``merge_upsampling`` and ``split_group_norms`` compute the same numbers with less work, up to rounding in single
  precision. They are for OpenVINO's CPU plugin, and leave a graph alone where they do not apply.
- ``expose_deep_features`` and ``cut_shallow_model`` are for feature caching (DeepCache: Ma et al. 2023, arXiv
  2312.00858). The outputs of the deeper levels change slowly from step to step, so they can be reused for a few steps
  on which only the top level runs. In U-Net-NAS the top level has no attention and is about a fifth of the work. Both
  models are made from one converted graph by cutting it where the way up reaches the top level, so the shallow model
  has the graph's own weights and formats.
- ``cross_attention_model`` outputs the weights of cross-attention.
- ``fix_shapes`` is for devices that compile for one shape.
"""

import math
import re
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ov_decidiffusion.model_folder.configs import vae_factor

DEEP_FEATURES = "deep_features"


def deep_features(model: ov.Model) -> ov.Output:
    """The tensor [b, channels, h, w] that the deeper levels pass to the top level, at the latents' own size.

    Raises:
        ValueError: the model is not a U-Net whose blocks can be told apart.
    """
    joined = {}
    for node in model.get_ordered_ops():
        found = re.search(r"\bup_blocks\.(\d+)/aten::cat/Concat$", node.get_friendly_name())
        if found and node.get_type_name() == "Concat":
            joined[int(found.group(1))] = node
    if not joined:
        raise ValueError("Feature caching needs a U-Net that convert_checkpoint wrote; this one has no up blocks.")
    return joined[max(joined)].input_value(0)


def expose_deep_features(model: ov.Model) -> ov.Model:
    """Add a second output, ``deep_features``, to a U-Net; the first stays unchanged. Returns the same model."""
    result = ops.result(deep_features(model))
    model.add_results([result])
    result.output(0).get_tensor().add_names({DEEP_FEATURES})
    model.validate_nodes_and_infer_types()
    return model


def cut_shallow_model(model: ov.Model) -> ov.Model:
    """The top level alone: takes ``sample``, ``timestep`` and ``deep_features``, and returns ``out_sample``.

    The text acts in deeper levels only, so it is not an input. ``model`` cannot be used afterwards.

    Raises:
        ValueError: see ``deep_features``; or the top level uses the text.
    """
    cut = deep_features(model)
    channels = cut.get_partial_shape()[1]
    given = ops.parameter(ov.PartialShape([-1, channels, -1, -1]), cut.get_element_type(), DEEP_FEATURES)
    given.output(0).get_tensor().set_names({DEEP_FEATURES})
    for consumer in cut.get_target_inputs():
        consumer.replace_source_output(given.output(0))
    wanted = [port.get_node() for port in model.inputs if port.any_name in ("sample", "timestep")]
    try:
        return ov.Model(  # pyright: ignore[reportGeneralTypeIssues]  # OpenVINO has two classes of this name
            [model.output("out_sample").get_node()], [*wanted, given], "unet_top_level"
        )
    except RuntimeError as error:
        raise ValueError("Feature caching needs a U-Net without attention at its top level.") from error


def cross_attention_model(model: ov.Model) -> ov.Model:
    """A U-Net that returns, in place of its prediction, the weights [b, h * w, tokens] of each cross-attention layer.

    They are means over the layer's heads. ``model`` cannot be used afterwards.

    Raises:
        ValueError: the model has no such layers.
    """
    results = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or ".attn2/" not in node.get_friendly_name():
            continue
        query, key = node.input_value(0), node.input_value(1)
        scale = np.float32(1 / math.sqrt(query.get_partial_shape()[3].get_length()))
        scores = ops.multiply(ops.matmul(query, key, transpose_a=False, transpose_b=True), scale)
        results.append(
            ops.result(ops.reduce_mean(ops.softmax(scores, axis=3), np.array([1], np.int64), keep_dims=False))
        )
    if not results:
        raise ValueError("This U-Net has no layers of cross-attention that convert_checkpoint wrote.")
    return ov.Model(  # pyright: ignore[reportGeneralTypeIssues]  # OpenVINO has two classes of this name
        results, model.get_parameters(), "unet_attention"
    )


def fix_shapes(model: ov.Model, unet_config: dict[str, Any], vae_config: dict[str, Any]) -> None:
    """Fix a model's shapes to batch 1 at the default size; larger batches then run one entry at a time."""
    latent_side = unet_config["sample_size"]
    picture_side = latent_side * vae_factor(vae_config)
    shapes = {}
    for port in model.inputs:
        shape = port.partial_shape
        fixed = [1, *(shape[i].get_length() if shape[i].is_static else None for i in range(1, len(shape)))]
        if len(shape) == 4:
            fixed[2:] = [picture_side if fixed[1] == vae_config["in_channels"] else latent_side] * 2
        elif len(shape) == 3:
            fixed[2] = unet_config["cross_attention_dim"]
        shapes[port.any_name] = ov.PartialShape(fixed)
    model.reshape(shapes)


def merge_upsampling(model: ov.Model, to_skips: str = "double") -> int:
    """Replace each upsampling by 2 and the 3x3 convolution after it by one transposed convolution.

    Copying a position to 2x2 and then weighting 3x3 neighbours, most of them copies of each other, equals a transposed
    convolution of stride 2 whose 4x4 kernel is the 3x3 kernel summed over the copies. It takes 16 products for each
    position of the small tensor instead of 36. The zeros outside the borders enter the same products.

    Args:
        model: the model; it is changed in place.
        to_skips: what to do where the U-Net upsamples to the size of a skip, which is twice the size, or one less if a
            side was odd. "double" assumes that no side is odd, and merges them. "crop" merges them, and cuts the
            surplus row or column off the result, which changes the last ones a little. "keep" leaves them as they
            are, which is exact at every size.

    Returns:
        the number of replacements.
    """
    merged = 0
    for node in model.get_ordered_ops():
        by_size = _is_enlarged_to_a_size(node)
        if not _doubles_the_size(node) and not (by_size and to_skips != "keep"):
            continue
        consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
        weights = _constant(consumers[0].input_value(1)) if _is_3x3_convolution(consumers) else None
        if weights is None:
            continue
        kernel = ops.constant(_summed_over_copies(weights))
        one = ops.convolution_backprop_data(node.input_value(0), kernel, [2, 2], None, [1, 1], [1, 1], [1, 1])
        size = node.input_value(1)
        _take_over(consumers[0], one)
        if by_size and to_skips == "crop":
            _crop(one, size)
        merged += 1
    model.validate_nodes_and_infer_types()
    return merged


def _doubles_the_size(node: ov.Node) -> bool:
    """Whether a node is a nearest-neighbour upsampling of [b, c, h, w] to [b, c, 2h, 2w]."""
    if not _is_nearest_enlargement(node, "scales"):
        return False
    scales, axes = (_constant(node.input_value(i)) for i in (1, 2))
    return scales is not None and axes is not None and scales.tolist() == [2, 2] and axes.tolist() == [2, 3]


def _is_enlarged_to_a_size(node: ov.Node) -> bool:
    """Whether a node is a nearest-neighbour upsampling of [b, c, h, w] to the height and width of another tensor."""
    if not _is_nearest_enlargement(node, "sizes"):
        return False
    axes = _constant(node.input_value(2))
    return _constant(node.input_value(1)) is None and axes is not None and axes.tolist() == [2, 3]


def _is_nearest_enlargement(node: ov.Node, calculated_from: str) -> bool:
    if node.get_type_name() != "Interpolate" or node.get_input_size() < 3:
        return False
    wanted = {
        "mode": "nearest",
        "shape_calculation_mode": calculated_from,
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    attributes = node.get_attributes()
    padded = any(attributes["pads_begin"] + attributes["pads_end"])
    return not padded and all(attributes[key] == value for key, value in wanted.items())


def _crop(node: ov.Node, size: ov.Output) -> None:
    """Crop a convolution's output [b, c, h, w] to a height and width, after its bias, so that the two can be fused."""
    consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
    if [one.get_type_name() for one in consumers] == ["Add"]:
        node = consumers[0]
    targets = node.output(0).get_target_inputs()
    start, step, axes = (np.array(values, np.int64) for values in ([0, 0], [1, 1], [2, 3]))
    cropped = ops.slice(node, start, ops.convert(size, "i64"), step, axes)
    for target in targets:
        target.replace_source_output(cropped.output(0))


def _is_3x3_convolution(nodes: list[ov.Node]) -> bool:
    """Whether there is exactly one node, a convolution with a 3x3 kernel that keeps the size."""
    if [node.get_type_name() for node in nodes] != ["Convolution"]:
        return False
    attributes, kernel = nodes[0].get_attributes(), nodes[0].input_value(1).get_partial_shape()
    ones = [attributes[key] for key in ("strides", "dilations", "pads_begin", "pads_end")]
    return ones == [[1, 1]] * 4 and [str(size) for size in kernel][2:] == ["3", "3"]


def _constant(value: ov.Output) -> np.ndarray | None:
    """A constant's values, also if it is stored as float16 and converted; None if it is not a constant."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def _summed_over_copies(weights: np.ndarray) -> np.ndarray:
    """Kernels [out, in, 3, 3] of a convolution -> [in, out, 4, 4] of the transposed convolution."""
    flipped = weights.astype(np.float32)[:, :, ::-1, ::-1]
    summed = np.zeros((*weights.shape[:2], 4, 4), np.float32)
    for row in (0, 1):
        for column in (0, 1):
            summed[:, :, row : row + 3, column : column + 3] += flipped
    return summed.transpose(1, 0, 2, 3)


def split_group_norms(model: ov.Model) -> int:
    """Write group normalizations [b, c, h, w] out as statistics, a factor and an offset for each channel.

    OpenVINO's CPU plugin normalizes groups in a memory layout of their own. Around INT8 convolutions, which keep a
    position's channels together, every normalization therefore rearranges the whole tensor twice. Means and norms of
    single channels can be computed in the convolutions' layout. Averaging them over a group, and spreading the result
    over the channels again, works on few numbers; it is done by convolutions too, because they keep that layout. The
    variance is the mean of squares minus the square of the mean. That loses precision if the mean is much larger than
    the spread, but little compared with the rounding of INT8 convolutions.

    Returns:
        the number of normalizations written out; the model is changed in place.
    """
    split = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization" or node.get_output_partial_shape(0).rank != ov.Dimension(4):
            continue
        _take_over(node, _split_group_norm(node))
        split += 1
    model.validate_nodes_and_infer_types()
    return split


def _split_group_norm(node: ov.Node) -> ov.Node:
    """The operations of one group normalization [b, c, h, w]."""
    sample, weight, bias = node.input_values()
    attributes, channels = node.get_attributes(), sample.get_partial_shape()[1].get_length()
    groups, rows_and_columns = attributes["num_groups"], np.array([2, 3])
    members = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)[:, :, None, None]

    def over_groups(values: ov.Node) -> ov.Node:
        averaged = _pointwise(values, members * np.float32(groups / channels))
        return _pointwise(averaged, members.transpose(1, 0, 2, 3))

    size = ops.gather(ops.shape_of(sample), rows_and_columns, np.int64(0))
    positions = ops.convert(ops.reduce_prod(size, np.array([0]), True), "f32")
    norm = ops.reduce_l2(sample, rows_and_columns, True)
    mean = over_groups(ops.reduce_mean(sample, rows_and_columns, True))
    mean_of_squares = over_groups(ops.divide(ops.multiply(norm, norm), positions))
    variance = ops.maximum(ops.subtract(mean_of_squares, ops.multiply(mean, mean)), np.float32(0))
    deviation = ops.sqrt(ops.add(variance, np.float32(attributes["epsilon"])))
    shape = np.array([1, channels, 1, 1])
    factor = ops.divide(ops.reshape(weight, shape, False), deviation)
    offset = ops.subtract(ops.reshape(bias, shape, False), ops.multiply(mean, factor))
    return ops.add(ops.multiply(sample, factor), offset)


def _pointwise(values: ov.Node, matrix: np.ndarray) -> ov.Node:
    """Values [b, in, 1, 1] times a matrix [out, in, 1, 1]."""
    return ops.convolution(values, ops.constant(matrix), [1, 1], [0, 0], [0, 0], [1, 1])


def _take_over(old: ov.Node, new: ov.Node) -> None:
    """Connect ``new`` to all consumers of ``old``, under its name."""
    new.set_friendly_name(old.get_friendly_name())
    for consumer in old.output(0).get_target_inputs():
        consumer.replace_source_output(new.output(0))
