"""INT8 models by NNCF, from statistics that are collected here, in a fraction of the memory that NNCF takes for it.

NNCF decides where numbers are rounded to 8 bits, and writes it into the graph. What it has to know are the least and
the largest number at each of these places. It would collect them through 1,600 outputs of the full-size U-Net, also of
its weights, which OpenVINO then all holds in 32 bits: 14 GB. Here weights are looked at one by one, and the rest
through two numbers for each place, in the graph as it runs anyway.
"""

import contextlib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import rich
from nncf.common.factory import build_graph
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.quantization.algorithms.post_training.algorithm import PostTrainingQuantization
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from nncf.tensor import Tensor
from openvino import opset13 as ops
from openvino._offline_transformations import compress_quantize_weights_transformation

from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.runtime.memory import forgetting_mapped_weights, release_freed_memory

Inputs = dict[str, np.ndarray]

PLAIN_METRIC = 100.0
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
# The first and the last convolutions, where latents and pixels themselves would be rounded: a tenth of a percent of
# the work, and 8 dB of the embedded checkpoint's decoder.
ENDS = nncf.IgnoredScope(
    patterns=[r".*model\.conv_in/.*", r".*model\.conv_out/.*", r".*decoder\.conv_(in|out)/.*", r".*post_quant_conv.*"],
    validate=False,
)
PARAMETERS = nncf.AdvancedQuantizationParameters(
    # Weights keep to half of their range, -64 to 63. Processors without VNNI (AVX2, the first with AVX-512) add pairs
    # of products of 8 bits in 16, which the whole range overflows. Processors with VNNI add in 32 bits and lose next
    # to nothing by it.
    overflow_fix=nncf.OverflowFix.ENABLE,
    # Neither gains anything here: without them the embedded checkpoint's U-Net comes 1.5 dB closer, and with the least
    # and the largest numbers of all runs, not their means, 4 dB more.
    disable_bias_correction=True,
    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
)


def quantize_within_budget(
    model: ov.Model,
    weights: Path,
    rows: list[Inputs],
    checks: list[Inputs],
    expected: list[np.ndarray],
    budget: float,
) -> ov.Model:
    """INT8 weights and activations, as much of them as the budget allows.

    Where INT8 misses the budget, NNCF ranks the layers by the harm that each does and takes them back to full
    precision one after the other until the budget holds. That compiles the model once for each of them, and takes
    four times the memory.

    Args:
        weights: the file that the model's weights are in.
        rows: inputs to calibrate on.
        checks: inputs left out of the calibration, and ``expected``, the plain model's outputs for them.
        budget: the agreement to keep, in dB.
    """
    with bars_for_terminals_only():
        quantized = _quantize(model, weights, rows)
        _center_inputs_of_transposed_convolutions(quantized)
        if agreement_of(outputs_of(quantized, weights, checks), expected) >= budget:
            return quantized
        del quantized
        quantized = _quantize_layer_by_layer(model, rows, checks, expected, budget)
    _center_inputs_of_transposed_convolutions(quantized)
    return quantized


def _quantize(model: ov.Model, weights: Path, rows: list[Inputs]) -> ov.Model:
    algorithm = PostTrainingQuantization(
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        ignored_scope=ENDS,
        advanced_parameters=PARAMETERS,
    )
    graph = build_graph(model)
    points = algorithm.get_statistic_points(model, graph)
    _collect_statistics(model, weights, points, rows)
    quantized = algorithm.apply(model, graph, points, nncf.Dataset(rows))
    compress_quantize_weights_transformation(quantized)
    release_freed_memory()
    return quantized


def _collect_statistics(model: ov.Model, weights: Path, points: StatisticPointsContainer, rows: list[Inputs]) -> None:
    """Tell NNCF's collectors what they ask for: a weight as it is, and of others the least and the largest number."""
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    collectors: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for _, point, collector in points.get_tensor_collectors():
        target: Any = point.target_point  # OpenVINO's kind, which has a port
        node, port = nodes[target.target_node_name], target.port_id
        if target.type != TargetType.POST_LAYER_OPERATION:
            output = node.input_value(port)
            node, port = output.get_node(), output.get_index()
        weight = _weight(node)
        if weight is not None:
            _register(collector, weight)
        else:
            collectors[node.get_friendly_name(), port].append(collector)
    for extremes in _extremes(model, weights, list(collectors), rows):
        for place, (low, high, rank) in extremes.items():
            both = np.array([low, high], np.float32).reshape(2, *[1] * (rank - 1))  # all that there is to know of it
            for collector in collectors[place]:
                _register(collector, both)


def _register(collector: Any, values: np.ndarray) -> None:
    """Hand values to a collector; what it would let the graph reduce is reduced here."""
    told = {}
    for reducer in collector.reducers:
        tensor = [Tensor(values)]
        told[hash(reducer)] = reducer._reduce_out_of_place(tensor) if reducer.inplace else tensor
    collector.register_inputs(told)


def _weight(node: ov.Node) -> np.ndarray | None:
    """What a constant holds, in 32 bits; None for what depends on the inputs."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None


def _extremes(
    model: ov.Model, weights: Path, places: list[tuple[str, int]], rows: list[Inputs]
) -> Iterator[dict[tuple[str, int], tuple[float, float, int]]]:
    """Of each row the least and the largest number at each place, and how many dimensions there are."""
    watched = model.clone()
    nodes, ranks, results = {node.get_friendly_name(): node for node in watched.get_ops()}, [], []
    for name, port in places:
        output = nodes[name].output(port)
        ranks.append(len(output.get_partial_shape()))
        axes = np.arange(ranks[-1])
        results += [ops.result(ops.reduce_min(output, axes)), ops.result(ops.reduce_max(output, axes))]
    watched.add_results(results)
    compiled = ov.Core().compile_model(watched, "CPU", F32)
    first = len(model.outputs)
    for found in _run(compiled, weights, rows):
        numbers = [found[first + i].item() for i in range(2 * len(places))]
        yield dict(zip(places, zip(numbers[::2], numbers[1::2], ranks, strict=True), strict=True))


def _quantize_layer_by_layer(
    model: ov.Model, rows: list[Inputs], checks: list[Inputs], expected: list[np.ndarray], budget: float
) -> ov.Model:
    def metric(compiled: ov.CompiledModel, items: Iterable[tuple[Inputs, np.ndarray]]) -> tuple[float, list[float]]:
        """The plain model's, which NNCF divides by, less what is missing of the budget in dB: of all, and of each.

        Numbers for each, for NNCF ranks layers by them rightly; by outputs for each it would start with the harmless.
        """
        items = list(items)
        made = [compiled(inputs)[0].copy() for inputs, _ in items]
        missing = budget - agreement_of(made, [reference for _, reference in items])
        each = [budget - agreement_of([one], [reference]) for one, (_, reference) in zip(made, items, strict=True)]
        return PLAIN_METRIC - max(0.0, missing), [PLAIN_METRIC - max(0.0, one) for one in each]

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(rows),
        nncf.Dataset(list(zip(checks, expected, strict=True)), lambda pair: pair[0]),
        validation_fn=metric,
        max_drop=1e-3,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        ignored_scope=ENDS,
        advanced_quantization_parameters=PARAMETERS,
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=2, num_ranking_workers=1
        ),
    )


def _center_inputs_of_transposed_convolutions(model: ov.Model) -> None:
    """Widen the range of their quantized inputs until it lies around 0, signed bytes from -m to 127/128 m.

    OpenVINO's CPU plugin has no zero points for transposed convolutions: with one, they would run in f32. Without
    AVX-512 they do so in any case, because their sizes are dynamic; they are a small share of the work.
    """
    for node in model.get_ordered_ops():
        quantizer = node.input_value(0).get_node() if node.get_type_name() == "ConvolutionBackpropData" else None
        if quantizer is None or quantizer.get_type_name() != "FakeQuantize":
            continue
        low, high = (quantizer.input_value(i).get_node().get_data().astype(np.float32) for i in (1, 2))
        if (low < 0).any():
            bound = np.maximum(-low, high * 128 / 127)
            for i, value in ((1, -bound), (2, bound * 127 / 128), (3, -bound), (4, bound * 127 / 128)):
                quantizer.input(i).replace_source_output(ops.constant(value.astype(np.float32)).output(0))
    model.validate_nodes_and_infer_types()


@contextlib.contextmanager
def bars_for_terminals_only() -> Iterator[None]:
    """NNCF draws a dozen progress bars with rich; in a notebook or a log they are a page of noise."""
    level = logging.getLogger("nncf").level
    terminal = sys.stdout.isatty()
    logging.getLogger("nncf").setLevel(logging.INFO if terminal else logging.ERROR)
    console = rich.get_console()
    kept = dict(vars(console))  # it belongs to the whole process
    rich.reconfigure(quiet=not terminal, force_jupyter=False)
    try:
        yield
    finally:
        vars(console).update(kept)
        logging.getLogger("nncf").setLevel(level)


def outputs_of(model: ov.Model, weights: Path, rows: list[Inputs]) -> list[np.ndarray]:
    """A model's first output for each row, in single precision."""
    compiled = ov.Core().compile_model(model, "CPU", F32)
    return [results[0].copy() for results in _run(compiled, weights, rows)]


def _run(compiled: ov.CompiledModel, weights: Path, rows: list[Inputs]) -> Iterator[Any]:
    """A model's results for each row; in the first run it packs its weights."""
    for i, row in enumerate(rows):
        with forgetting_mapped_weights(weights) if i == 0 else contextlib.nullcontext():
            results = compiled(row)
        yield results


def agreement_of(made: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return psnr(np.concatenate([value.ravel() for value in made]), np.concatenate([v.ravel() for v in expected]))
