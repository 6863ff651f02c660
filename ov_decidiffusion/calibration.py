"""INT8 models by NNCF, from statistics that are collected here, in a fraction of the memory that NNCF would need.

NNCF decides where numbers are rounded to 8 bits, and inserts that into the graph. It needs the smallest and the largest
number at each of these places. NNCF itself would collect them through 1,600 outputs of the full-size U-Net, including
its weights, all of which OpenVINO then holds in 32 bits: 14 GB. Here weights are examined one by one, and for every
other place the running graph outputs two numbers.
"""

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import rich
from nncf.common.factory import build_graph
from nncf.common.graph.transformations.commands import TargetType
from nncf.quantization.algorithms.post_training.algorithm import PostTrainingQuantization
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from nncf.tensor import Tensor
from openvino import opset13 as ops
from openvino._offline_transformations import compress_quantize_weights_transformation

from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.errors import NotEnoughMemory
from ov_decidiffusion.runtime.devices import make_core
from ov_decidiffusion.runtime.memory import check_memory, forgetting_mapped_weights, release_freed_memory

logger = logging.getLogger(__name__)

Inputs = dict[str, np.ndarray]

PLAIN_METRIC = 100.0
SPARE = 0.5  # dB that NNCF has to reach beyond the budget, since ranges are changed after it
RANKING_MEMORY = (1e9, 8.5)  # bytes needed, and a factor for the weights in 16 bits: 13 GB at full size
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
# The first and the last convolutions stay in full precision, since latents and pixels themselves would be rounded. They
# are a tenth of a percent of the work, and make 8 dB of difference for the embedded checkpoint's decoder.
ENDS = nncf.IgnoredScope(
    patterns=[r".*model\.conv_in/.*", r".*model\.conv_out/.*", r".*decoder\.conv_(in|out)/.*", r".*post_quant_conv.*"],
    validate=False,
)
PARAMETERS = nncf.AdvancedQuantizationParameters(
    # Weights use half of their range, -64 to 63. Processors without VNNI (AVX2, the first with AVX-512) add pairs of
    # 8-bit products in 16 bits, which would overflow with the whole range. Processors with VNNI add in 32 bits, and
    # lose next to nothing.
    overflow_fix=nncf.OverflowFix.ENABLE,
    # Bias correction and SmoothQuant gain nothing here: without them the embedded checkpoint's U-Net comes 1.5 dB
    # closer. The smallest and largest numbers of all runs, instead of their means, gain 4 dB more.
    disable_bias_correction=True,
    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


@dataclass
class Recorded:
    """The inputs that a part was run on.

    Attributes:
        rows: inputs for the calibration.
        checks: inputs left out of the calibration, to check with.
        expected: the plain model's outputs for ``checks``.
    """

    rows: list[Inputs] = field(default_factory=list)
    checks: list[Inputs] = field(default_factory=list)
    expected: list[np.ndarray] = field(default_factory=list)


Run = Callable[[Inputs, bool], np.ndarray]  # inputs, and whether to calibrate with them -> the model's first output
Feed = Callable[[Run], Recorded]  # runs a part on all its inputs


def quantize_within_budget(model: ov.Model, weights: Path, feed: Feed, budget: float) -> tuple[ov.Model, float]:
    """Quantize as many weights and activations to INT8 as the budget allows.

    If full INT8 misses the budget, NNCF ranks the layers by the harm that each does, and restores them to full
    precision one by one until the budget is met. That compiles the model once per layer, and takes three times the
    memory; if so much is not free, the full INT8 model is returned.

    Args:
        model: the plain model.
        weights: the file with the model's weights.
        feed: runs the model on the inputs for calibrating and checking.
        budget: the agreement to keep, in dB.

    Returns:
        the model, and its agreement with the plain one on inputs left out of the calibration, in dB.
    """
    with bars_for_terminals_only():
        statistics = Statistics(model, weights)
        recorded = feed(statistics.run)
        quantized = statistics.quantize()
        _center_inputs_of_transposed_convolutions(quantized)
        agreement = agreement_with_plain(quantized, weights, recorded)
        if agreement >= budget:
            return quantized, agreement
        try:
            check_memory(int(RANKING_MEMORY[0] + RANKING_MEMORY[1] * _size(weights)), "Ranking its layers", "")
        except NotEnoughMemory as error:
            logger.warning("INT8 misses its budget, and cannot be improved layer by layer: %s", error)
            return quantized, agreement
        del quantized, statistics
        quantized = _quantize_layer_by_layer(model, recorded, budget + SPARE)
    _center_inputs_of_transposed_convolutions(quantized)
    return quantized, agreement_with_plain(quantized, weights, recorded)


class Statistics:
    """Runs a model, and collects the statistics that NNCF needs meanwhile.

    Args:
        model: the model; it is not changed.
        weights: the file with its weights.
    """

    def __init__(self, model: ov.Model, weights: Path):
        self._model, self._weights = model, weights
        self._algorithm = PostTrainingQuantization(
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=ENDS,
            advanced_parameters=PARAMETERS,
        )
        self._graph = build_graph(model)
        self._points = self._algorithm.get_statistic_points(model, self._graph)
        self._collectors: dict[tuple[str, int], list[Any]] = {}  # by node and output, in the order of computation
        self._ranks: list[int] = []
        self._compiled: ov.CompiledModel | None = None
        self._sort_collectors()

    def _sort_collectors(self) -> None:
        """Collect the statistics of weights at once, and list the collectors of everything else."""
        nodes = {node.get_friendly_name(): node for node in self._model.get_ops()}
        for _, point, collector in self._points.get_tensor_collectors():
            target: Any = point.target_point  # of OpenVINO's class, which has a port
            node, port = nodes[target.target_node_name], target.port_id
            if target.type != TargetType.POST_LAYER_OPERATION:
                output = node.input_value(port)
                node, port = output.get_node(), output.get_index()
            weight = _weight(node)
            if weight is not None:
                _register(collector, weight)
            else:
                self._collectors.setdefault((node.get_friendly_name(), port), []).append(collector)
        order = {node.get_friendly_name(): i for i, node in enumerate(self._model.get_ordered_ops())}
        self._collectors = dict(sorted(self._collectors.items(), key=lambda entry: order[entry[0][0]]))

    def _compile(self) -> ov.CompiledModel:
        """Compile the model with two outputs for each place, its smallest and its largest number; its own comes last.

        In this order OpenVINO reduces each tensor before it goes on; otherwise it would keep all tensors to the end.
        """
        watched = self._model.clone()
        nodes, results = {node.get_friendly_name(): node for node in watched.get_ops()}, []
        for name, port in self._collectors:
            output = nodes[name].output(port)
            self._ranks.append(len(output.get_partial_shape()))
            axes = np.arange(self._ranks[-1])
            results += [ops.result(ops.reduce_min(output, axes)), ops.result(ops.reduce_max(output, axes))]
        results.append(watched.outputs[0].get_node())
        model = ov.Model(  # pyright: ignore[reportGeneralTypeIssues]  # OpenVINO has two classes of this name
            results, watched.get_parameters(), "watched"
        )
        return make_core().compile_model(model, "CPU", F32)

    def run(self, inputs: Inputs, calibrate: bool) -> np.ndarray:
        """The model's first output; ``calibrate`` says whether this run counts for the statistics."""
        packs_weights = self._compiled is None
        self._compiled = self._compiled or self._compile()
        with forgetting_mapped_weights(self._weights) if packs_weights else contextlib.nullcontext():
            found = self._compiled(inputs)
        for i, collectors in enumerate(self._collectors.values() if calibrate else ()):
            both = np.array([found[2 * i].item(), found[2 * i + 1].item()], np.float32)
            both = both.reshape(2, *[1] * (self._ranks[i] - 1))  # all that NNCF needs of the tensor
            for collector in collectors:
                _register(collector, both)
        return found[2 * len(self._collectors)].copy()

    def quantize(self) -> ov.Model:
        """The model in INT8. ``run`` cannot be called afterwards."""
        self._compiled = None
        release_freed_memory()
        quantized = self._algorithm.apply(self._model, self._graph, self._points)
        compress_quantize_weights_transformation(quantized)
        release_freed_memory()
        return quantized


def _register(collector: Any, values: np.ndarray) -> None:
    """Pass values to a collector; reductions that it expects the graph to make are made here."""
    told = {}
    for reducer in collector.reducers:
        tensor = [Tensor(values)]
        told[hash(reducer)] = reducer._reduce_out_of_place(tensor) if reducer.inplace else tensor
    collector.register_inputs(told)


def _weight(node: ov.Node) -> np.ndarray | None:
    """The values of a constant, in 32 bits; None for what depends on the inputs."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None


def _quantize_layer_by_layer(model: ov.Model, recorded: Recorded, budget: float) -> ov.Model:
    def metric(compiled: ov.CompiledModel, items: Iterable[tuple[Inputs, np.ndarray]]) -> tuple[float, list[float]]:
        """``PLAIN_METRIC`` minus the dB that are missing to the budget: for all outputs together, and for each.

        NNCF divides by the plain model's metric. It needs a number for each output: given the outputs themselves, it
        would rank layers wrongly, and restore harmless ones first.
        """
        items = list(items)
        made = [compiled(inputs)[0].copy() for inputs, _ in items]
        missing = budget - agreement_of(made, [reference for _, reference in items])
        each = [budget - agreement_of([one], [reference]) for one, (_, reference) in zip(made, items, strict=True)]
        return PLAIN_METRIC - max(0.0, missing), [PLAIN_METRIC - max(0.0, one) for one in each]

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(recorded.rows),
        nncf.Dataset(list(zip(recorded.checks, recorded.expected, strict=True)), lambda pair: pair[0]),
        validation_fn=metric,
        max_drop=1e-3,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(recorded.rows),
        ignored_scope=ENDS,
        advanced_quantization_parameters=PARAMETERS,
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=2, num_ranking_workers=1
        ),
    )


def _center_inputs_of_transposed_convolutions(model: ov.Model) -> None:
    """Widen the range of their quantized inputs until it is centred at 0: signed bytes from -m to 127/128 m.

    OpenVINO's CPU plugin has no zero points for transposed convolutions: with one, they would run in f32. Without
    AVX-512 they do so anyway, because their sizes are dynamic; they are a small share of the work.
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
    """Hide NNCF's progress bars outside terminals: a dozen of them are a page of noise in a notebook or a log."""
    level = logging.getLogger("nncf").level
    terminal = sys.stdout.isatty()
    logging.getLogger("nncf").setLevel(logging.INFO if terminal else logging.ERROR)
    console = rich.get_console()
    kept = dict(vars(console))  # the console is shared by the whole process
    rich.reconfigure(quiet=not terminal, force_jupyter=False)
    try:
        yield
    finally:
        vars(console).update(kept)
        logging.getLogger("nncf").setLevel(level)


def agreement_with_plain(model: ov.Model, weights: Path, recorded: Recorded) -> float:
    """How closely a model, run in single precision, agrees with the plain one on the inputs to check with, in dB."""
    run = plain_run(model, weights)
    return agreement_of([run(row, False) for row in recorded.checks], recorded.expected)


def plain_run(model: ov.Model, weights: Path) -> Run:
    """A function that runs a model in single precision."""
    compiled, runs = make_core().compile_model(model, "CPU", F32), itertools.count()

    def run(inputs: Inputs, calibrate: bool = False) -> np.ndarray:
        with contextlib.nullcontext() if next(runs) else forgetting_mapped_weights(weights):  # the first run packs them
            return compiled(inputs)[0].copy()

    return run


def agreement_of(made: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return psnr(np.concatenate([value.ravel() for value in made]), np.concatenate([v.ravel() for v in expected]))
