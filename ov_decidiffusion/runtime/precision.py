"""Choice of the number format by measuring, and whether INT8 models are faster.

By default OpenVINO computes in bfloat16 on every processor with instructions for it. Without matrix units (AMX) that
can be slower than float32, and a device's list of capabilities does not tell the two cases apart; a measurement does.
INT8 is several times as fast with instructions for it (VNNI, AMX), and may gain nothing without.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from platformdirs import user_cache_path

from ov_decidiffusion.runtime.devices import devices_of

INFERENCE_PRECISIONS = ("auto", "f32", "bf16", "f16")
CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}  # our names -> OpenVINO's
WORTH_IT = 0.95  # a lower precision has to save at least 5 % of the time
INT8 = "int8"  # probed too, but never chosen for models that are not quantized


def _memory_file() -> Path | None:
    """The file that stores the probe's results; None for a user without a home folder."""
    with contextlib.suppress(RuntimeError, OSError, KeyError):
        return user_cache_path("ov_decidiffusion") / "precision.json"
    return None


MEMORY_FILE = _memory_file()


def choose_precision(core: ov.Core, device: str) -> tuple[str | None, str]:
    """The fastest ``INFERENCE_PRECISION_HINT`` on a device, and why.

    A CPU is probed once, in about a second; the result is stored for this processor and version of OpenVINO. On other
    devices OpenVINO's own choice applies, which is float16 on GPUs and NPUs.

    Returns:
        "f32", "bf16" or "f16", or None to leave the choice to OpenVINO; and a sentence that says why.
    """
    if not runs_on_cpu(core, device):
        return None, f"{device}: OpenVINO's own choice"
    milliseconds = _milliseconds(core)
    int8 = milliseconds.pop(INT8)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    chosen = fastest if milliseconds[fastest] < WORTH_IT * milliseconds["f32"] else "f32"
    measured = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    what = "is fastest here" if len(milliseconds) > 1 else "is all that this processor has"
    return chosen, f"{chosen} {what} ({measured} in a probe; INT8 models {int8:.1f} ms)"


def int8_speedup(core: ov.Core, device: str, precision: str | None) -> float | None:
    """How many times as fast INT8 was as another precision in the probe; None on devices that are not probed."""
    if not runs_on_cpu(core, device):
        return None
    milliseconds = _milliseconds(core)
    return milliseconds.get(precision or "f32", milliseconds["f32"]) / milliseconds[INT8]


def _milliseconds(core: ov.Core) -> dict[str, float]:
    """The probe's results for this processor, stored or measured now."""
    key = f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}, {os.cpu_count()} threads, OpenVINO {ov.__version__}"
    if isa := os.environ.get("ONEDNN_MAX_CPU_ISA"):  # OpenVINO heeds it
        key += f", {isa}"
    remembered = _remembered()
    milliseconds = remembered.get(key)
    if not isinstance(milliseconds, dict) or not {"f32", INT8} <= set(milliseconds):
        milliseconds = probe(core)
        _remember(remembered | {key: milliseconds})
    return dict(milliseconds)


def runs_on_cpu(core: ov.Core, device: str) -> bool:
    """Whether models run on the CPU only."""
    return all(one.split(".")[0] == "CPU" for one in devices_of(core, device))


def probe(core: ov.Core) -> dict[str, float]:
    """Milliseconds of a piece of a U-Net on the CPU, in each precision that the processor supports, and in INT8."""
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = ["f32", *(name for name, theirs in CAPABILITIES.items() if theirs in capabilities), INT8]
    requests = {}
    for name in names:
        model, sample = _piece_of_unet(quantized=name == INT8)
        hint = "f32" if name == INT8 else name
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": ""}
        with contextlib.nullcontext() if name == "f32" else contextlib.suppress(RuntimeError):
            request = core.compile_model(model, "CPU", options).create_infer_request()
            request.infer([sample])
            requests[name] = request
    best = dict.fromkeys(names, np.inf)
    deadline = time.perf_counter() + 0.6
    while time.perf_counter() < deadline:
        for name, request in requests.items():  # in turn, so that a busy moment affects all alike
            start = time.perf_counter()
            request.infer([sample])
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def _piece_of_unet(channels: int = 640, side: int = 16, quantized: bool = False) -> tuple[ov.Model, np.ndarray]:
    """A convolution, as in a residual block, and a feed-forward layer, as in a transformer; batch 2."""
    rng = np.random.default_rng(0)

    def in_8_bits(value: ov.Node, bound: float, levels: int) -> ov.Node:
        """A FakeQuantize node, as quantizing inserts it: OpenVINO computes the operation after it in INT8."""
        if not quantized:
            return value
        low, high = (ops.constant(np.full([1] * len(value.shape), end, np.float32)) for end in (-bound, bound))
        return ops.fake_quantize(value, low, high, low, high, levels)

    def weight(*shape: int) -> ov.Node:
        numbers = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        return in_8_bits(ops.constant(numbers), float(np.abs(numbers).max()), 255)

    sample = ops.parameter([2, channels, side, side], np.float32, "sample")
    hidden = in_8_bits(sample, 4.0, 256)
    hidden = ops.convolution(hidden, weight(channels, channels, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
    hidden = ops.swish(hidden)
    rows = ops.transpose(ops.reshape(hidden, [2, channels, side * side], False), [0, 2, 1])
    wide = ops.gelu(ops.matmul(in_8_bits(rows, 4.0, 256), weight(4 * channels, channels), False, True), "erf")
    out = ops.matmul(in_8_bits(wide, 4.0, 256), weight(channels, 4 * channels), False, True)
    model = ov.Model([out], [sample], "probe")  # pyright: ignore[reportGeneralTypeIssues]  # OpenVINO has two of them
    return model, rng.standard_normal((2, channels, side, side)).astype(np.float32)


def _remembered() -> dict:
    if MEMORY_FILE is None:
        return {}
    try:
        content = json.loads(MEMORY_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(content: dict) -> None:
    """Store the probe's results; a machine whose cache folder cannot be written to is probed every time."""
    if MEMORY_FILE is None:
        return
    with contextlib.suppress(OSError):
        MEMORY_FILE.parent.mkdir(parents=True, exist_ok=True)
        partial = MEMORY_FILE.with_name(f"{MEMORY_FILE.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(partial, Path(MEMORY_FILE))
