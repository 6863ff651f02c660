"""OpenVINO model folder -> compiled models that run on a device."""

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ov_decidiffusion.model_folder.configs import check_configs, unet_factor, vae_factor
from ov_decidiffusion.model_folder.integrity import check_model_dir, explaining, read_json
from ov_decidiffusion.model_folder.layout import (
    ANY_SIZE_FORMAT,
    CONVERSION_REPORT,
    PARTS,
    QUANTIZATION_FORMAT,
    QUANTIZATION_REPORT,
    TINY_DECODER,
    config_file,
    graph_file,
    quantized_sibling,
    weights_file,
)
from ov_decidiffusion.runtime.devices import needs_static_shapes, precision_hint
from ov_decidiffusion.runtime.loading import Target, choose_target
from ov_decidiffusion.runtime.memory import check_memory, forgetting_mapped_weights, free_memory, trim_heap
from ov_decidiffusion.runtime.precision import WORTH_IT, int8_speedup, runs_on_cpu
from ov_decidiffusion.runtime.processes import LOCALE, ProcessBound
from ov_decidiffusion.runtime.transformations import (
    cross_attention_model,
    cut_shallow_model,
    expose_deep_features,
    fix_shapes,
    merge_upsampling,
    split_group_norms,
)

logger = logging.getLogger(__name__)

LARGE = 200e6  # bytes of the U-Net's weights; below it, saving memory is not worth a thirtieth of a second
TOP_LEVEL = "unet_top_level"  # cut out of the U-Net when first needed
ATTENTION = "unet_attention"
ANY_SIZE_UNET = "unet_any_size"  # the U-Net for latents with a side that is odd at some level; a little slower
FIRST = ("unet", "text_encoder", "vae_decoder")  # compiled at once, the slowest first; the encoder when needed
CUT_OUT = {TOP_LEVEL: cut_shallow_model, ATTENTION: cross_attention_model}
FULL_UNETS = ("unet", ANY_SIZE_UNET)
OF_THE_UNET = (*FULL_UNETS, *CUT_OUT)


@dataclass(frozen=True)
class FolderContents:
    """What a model folder holds.

    Attributes:
        folder: its absolute path, so that later compilations find it after the working directory has changed.
        unet_config, vae_config: the settings in the models' ``config.json``.
        quantized_folder: the folder of its INT8 models; it need not exist.
        quantized_parts: the models that exist in INT8 too.
        has_tiny_decoder: whether the folder has a tiny decoder.
        size_factor: both sides of a picture are multiples of it, in pixels.
    """

    folder: Path
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    quantized_folder: Path
    quantized_parts: frozenset[str]
    has_tiny_decoder: bool
    size_factor: int


def read_contents(folder: Path) -> FolderContents:
    """Read what a model folder holds.

    Raises:
        ValueError: it lacks a part, or its settings are damaged; the message names them.
    """
    check_model_dir(folder)
    folder = folder.absolute()
    unet_config, vae_config = (read_json(config_file(folder, part)) for part in ("unet", "vae_decoder"))
    check_configs(unet_config, vae_config)
    quantized = quantized_sibling(folder)
    parts, has_tiny_decoder = _quantized_parts(quantized, folder), weights_file(folder, TINY_DECODER).is_file()
    report = folder / CONVERSION_REPORT
    written = read_json(report).get("format", 1) if report.is_file() else ANY_SIZE_FORMAT
    any_size = isinstance(written, int) and written >= ANY_SIZE_FORMAT
    size_factor = vae_factor(vae_config) * (1 if any_size else unet_factor(unet_config))
    return FolderContents(folder, unet_config, vae_config, quantized, parts, has_tiny_decoder, size_factor)


class Models(ProcessBound):
    """The compiled models of a folder; those of its INT8 sibling are compiled when first needed.

    Create it with ``load``, and call ``wait`` before running anything.

    Args:
        contents: what the folder holds.
        target: what the models are compiled for.

    Attributes:
        folder: the model folder.
        inference_precision: a sentence that says which number format the models compute in, and why.
        precision: the number format that the models compute in: "f32", "bf16", …
        device: OpenVINO's name of the device that they are compiled for.
        static_shapes: whether the device takes pictures of one size only, one at a time.
        unet_config, vae_config, quantized_parts, has_tiny_decoder, size_factor: see ``FolderContents``.
        is_large: whether the U-Net has the size of a real model.
        seconds: seconds spent in each model so far.
    """

    def __init__(self, contents: FolderContents, target: Target):
        super().__init__()
        self.folder, self._quantized_folder = contents.folder, contents.quantized_folder
        self.unet_config, self.vae_config = contents.unet_config, contents.vae_config
        self.quantized_parts, self.has_tiny_decoder = contents.quantized_parts, contents.has_tiny_decoder
        self.size_factor = contents.size_factor
        self._core, self._config = target.core, target.config
        self.device = target.device
        self._precision, self.inference_precision = target.precision, target.reason
        self.static_shapes = needs_static_shapes(target.device)
        self.seconds: dict[str, float] = defaultdict(float)
        self._compiled: dict[tuple[str, bool], ov.CompiledModel] = {}  # by name, and whether it is the INT8 model
        self._packed: set[tuple[str, bool]] = set()  # those that have run
        self._caching: set[bool] = set()  # for the plain U-Net (False) and the INT8 one: those that give deep features
        self._compiling: dict[str, Future[ov.CompiledModel]] = {}
        self._reading: list[Future[ov.Model]] = []
        self._latest_part: str | None = None  # the part whose model ran last
        self._long_prompts = self._closed = False
        self.is_large = self._weights("unet", False).stat().st_size > LARGE

    @classmethod
    def load(
        cls,
        folder: Path,
        device: Any = "CPU",
        inference_precision: str = "auto",
        cache_dir: str | Path | None = None,
        threads: int | None = None,
        ov_config: dict[str, Any] | None = None,
    ) -> "Models":
        """Check everything, and begin to compile in threads; for the arguments see the pipeline's ``from_pretrained``.

        Raises:
            ValueError: a wrong argument, or a folder that lacks a part; the message names it.
        """
        contents = read_contents(folder)
        models = cls(contents, choose_target(device, inference_precision, cache_dir, threads, ov_config))
        models._begin()
        return models

    def missing_int8(self) -> str:
        """A text that says what the faster presets lack here, and what making it takes; "" if they lack nothing."""
        if self.quantized_parts or not self.int8_pays:
            return ""
        takes = "some minutes and 5 GB of memory" if self.is_large else "about half a minute"
        return f"need INT8 models. They are made once, which takes {takes}."

    def find_quantized(self) -> None:
        """Look for INT8 models again, in case some were made after these models were loaded."""
        contents = read_contents(self.folder)
        self._quantized_folder, self.quantized_parts = contents.quantized_folder, contents.quantized_parts

    def _begin(self) -> None:
        """Begin to compile. Compiling releases Python's lock, so that the caller can import slow modules meanwhile."""
        begin = ThreadPoolExecutor(len(FIRST) + 1, "compile").submit
        first = [name for name in FIRST if name not in self.quantized_parts]  # others may run in INT8
        self._compiling = {name: begin(self._compile, name, False) for name in first}
        parts = (*PARTS, TINY_DECODER) if self.has_tiny_decoder else PARTS
        self._reading = [begin(self._read, name, False) for name in parts if name not in first]

    @property
    def precision(self) -> str:
        """The number format that the models compute in: "f32", "bf16", …"""
        return self._precision or "the device's own"

    @functools.cached_property
    def int8_pays(self) -> bool:
        """Whether INT8 models are faster here than the plain ones, judging by a probe."""
        self.refuse_forks()
        speedup = int8_speedup(self._core, self.device, self._precision)
        pays = speedup is None or speedup > 1 / WORTH_IT
        if not pays:
            logger.warning(
                "INT8 is %.2f times as fast as %s on this processor: presets do without it.",
                speedup,
                self.precision,
            )
        return pays

    def wait(self) -> None:
        """Wait until the first models are compiled, and those that are compiled later have been read once.

        Raises:
            ValueError: a model is damaged.
        """
        with self._in_turn():
            begun: list[Future[Any]] = [*self._compiling.values(), *self._reading]
            wait(begun)  # for all of them, so that no thread still works on the files after an error
            for name, compiling in self._compiling.items():
                self._compiled[name, False] = compiling.result()
            for reading in self._reading:
                reading.result()
            self._compiling, self._reading = {}, []

    def run(
        self,
        name: str,
        inputs: dict[str, np.ndarray],
        outputs: int | None = 1,
        quantized: bool = False,
        rows_at_once: int | None = None,
    ) -> list[np.ndarray]:
        """Run a model and return copies of its outputs.

        Args:
            name: the model.
            inputs: arrays by the names of the model's inputs.
            outputs: number of outputs to return, the first ones; None for all.
            quantized: run the INT8 model.

        Args:
            rows_at_once: split a longer batch into parts of at most this many rows; None runs it whole.

        Raises:
            RuntimeError: the process was forked after loading, or ``close`` was called.
            ValueError: the inputs do not fit, or OpenVINO fails otherwise.
        """
        with self._in_turn():
            account = name
            if name == "unet" and not quantized and self._has_odd_sides(inputs["sample"]):
                name = ANY_SIZE_UNET
            model = self._get(name, quantized)
            packs_weights = (name, quantized) not in self._packed
            self._release_other_parts(model_part(name))
            start = time.perf_counter()
            try:
                with forgetting_mapped_weights(self._weights(name, quantized)) if packs_weights else nullcontext():
                    results = _run_in_parts(model, inputs, outputs, 1 if self.static_shapes else rows_at_once)
            except RuntimeError:  # the model's one infer request may fail on every later call too
                self._forget(name, quantized)
                with explaining(self._folder_of(quantized), f"running {name}"):
                    raise
            self.seconds[account] += time.perf_counter() - start
            self._packed.add((name, quantized))
            return results

    def compiled(self, name: str, quantized: bool = False) -> ov.CompiledModel:
        """A compiled model, for code that needs its properties or its graph; compiles it if necessary."""
        with self._in_turn():
            return self._get(name, quantized)

    def profiled(self, name: str) -> ov.CompiledModel:
        """A copy of a model that records the time of each of its nodes."""
        self.refuse_forks()
        return self._compile(name, False, None, {"PERF_COUNT": True})

    def _get(self, name: str, quantized: bool) -> ov.CompiledModel:
        if self._closed:
            raise RuntimeError("This pipeline was closed.")
        if (name, quantized) not in self._compiled:
            change = CUT_OUT.get(name)
            if name in FULL_UNETS:
                if self.is_large:  # otherwise two large ones would be in memory
                    self._drop({*FULL_UNETS} - {name}, quantized)
                if quantized in self._caching:
                    change = expose_deep_features
            self._compiled[name, quantized] = self._compile(name, quantized, change)
        return self._compiled[name, quantized]

    def close(self) -> None:
        """Wait for the current run, and drop all models; later runs are refused."""
        with self._running:
            self._closed = True
            self._compiled.clear()

    def rows_at_once(self, rows: int, size: tuple[int, int], decoded: tuple[int, int]) -> int:
        """How many rows of a run the U-Net computes at a time: all of them, or as many as there is free memory for.

        Args:
            rows, size, decoded: see ``estimated_memory``.

        Raises:
            NotEnoughMemory: there is too little for one row.
        """
        free = free_memory()
        for parts in range(1, rows + 1):
            at_once = -(-rows // parts)
            if self.estimated_memory(at_once, size, decoded) <= free:
                return at_once
        check_memory(self.estimated_memory(1, size, decoded))
        return 1

    def estimated_memory(self, rows: int, size: tuple[int, int], decoded: tuple[int, int]) -> int:
        """About how many bytes a run needs, not counting the weights.

        The U-Net computes all rows at once, in memory for about twenty tensors of its widest kind, and the decoder one
        picture, in about six of its widest kind; in measurements both needed less.

        Args:
            rows: number of pictures, twice that with guidance.
            size: (width, height) in pixels.
            decoded: (width, height) in pixels that the decoder, or the encoder, computes at a time.
        """
        positions = size[0] * size[1] // vae_factor(self.vae_config) ** 2
        unet = 20 * rows * positions * self.unet_config["block_out_channels"][0]
        decoder = 6 * decoded[0] * decoded[1] * self.vae_config["block_out_channels"][0]
        return 4 * max(unet, decoder)

    def _forget(self, name: str, quantized: bool) -> None:
        """Drop a model, so that it is compiled again when it is next needed."""
        self._drop(OF_THE_UNET if model_part(name) == "unet" else (name,), quantized)

    def _drop(self, names: Iterable[str], quantized: bool) -> None:
        for name in names:
            self._compiled.pop((name, quantized), None)
            self._packed.discard((name, quantized))

    def _has_odd_sides(self, latents: np.ndarray) -> bool:
        """Whether latents [b, 4, h, w] have a side that is odd at one of the U-Net's levels."""
        return any(side % unet_factor(self.unet_config) for side in latents.shape[2:])

    def _release_other_parts(self, part: str) -> None:
        """Free the working memory of the previous part's models if they are large: it adds up over the parts."""
        if part == TINY_DECODER:  # it needs little, and runs between steps of others
            return
        if self._latest_part not in (None, part) and self.is_large:
            for (name, _), model in self._compiled.items():
                if model_part(name) == self._latest_part:
                    model.release_memory()
            trim_heap()
        self._latest_part = part

    def allow_long_prompts(self) -> None:
        """Let the U-Net take any number of hidden states, not only the folder's 77; it is compiled again when needed.

        Raises:
            ValueError: the device takes one shape only.
        """
        if self.static_shapes:
            raise ValueError("On this device a prompt has 77 hidden states: give `prompt_embeds` of that length.")
        with self._in_turn():
            if not self._long_prompts:
                self._long_prompts = True
                for quantized in (False, True):
                    self._drop((*FULL_UNETS, ATTENTION), quantized)

    def prepare_caching(self, quantized: bool = False) -> None:
        """Compile the U-Net's top level, and let the full U-Net return its deep features from now on.

        Raises:
            ValueError: the U-Net cannot be split below its top level.
        """
        with self._in_turn():
            if quantized not in self._caching:
                top_level = self._compile(TOP_LEVEL, quantized, cut_shallow_model)
                self._drop(FULL_UNETS, quantized)  # to be compiled again when the size is known
                self._compiled[TOP_LEVEL, quantized] = top_level
                self._caching.add(quantized)

    def _weights(self, name: str, quantized: bool) -> Path:
        """The file with a model's weights."""
        return weights_file(self._folder_of(quantized), model_part(name))

    def _folder_of(self, quantized: bool) -> Path:
        return self._quantized_folder if quantized else self.folder

    def _compile(
        self,
        name: str,
        quantized: bool,
        change: Callable[[ov.Model], ov.Model] | None = None,
        options: dict[str, Any] | None = None,
    ) -> ov.CompiledModel:
        with explaining(self._folder_of(quantized), f"compiling {name}"):
            return self._compile_unexplained(name, quantized, change, options or {})

    def _read(self, name: str, quantized: bool) -> ov.Model:
        with explaining(self._folder_of(quantized), f"reading {name}"):
            return self._core.read_model(graph_file(self._folder_of(quantized), model_part(name)))

    def _compile_unexplained(
        self, name: str, quantized: bool, change: Callable[[ov.Model], ov.Model] | None, options: dict[str, Any]
    ) -> ov.CompiledModel:
        model = self._read(name, quantized)
        if model_part(name) == "unet":
            _allow_fractional_timesteps(model)
            if self._long_prompts:
                _allow_long_prompts(model)
        if change is not None:
            model = change(model)
        hint = precision_hint(name, self.device, self._precision)
        if runs_on_cpu(self._core, self.device):
            merge_upsampling(model, to_skips="keep" if name in (ANY_SIZE_UNET, ATTENTION) else "double")
            if quantized and hint.get("INFERENCE_PRECISION_HINT") == "f32":  # in 16 bits its squares are too coarse
                split_group_norms(model)
        if self.static_shapes:
            fix_shapes(model, self.unet_config, self.vae_config)
        with LOCALE.kept():
            return self._core.compile_model(model, self.device, self._config | hint | options)


def model_part(name: str) -> str:
    """The part of the folder that a model comes from."""
    return "unet" if name in OF_THE_UNET else name


def _quantized_parts(folder: Path, source: Path) -> frozenset[str]:
    """The parts of a folder that compute in INT8; none if the folder is missing or belongs to another conversion."""
    reports = [folder / QUANTIZATION_REPORT, folder / CONVERSION_REPORT, source / CONVERSION_REPORT]
    if not all(report.is_file() for report in reports):
        return frozenset()
    quantization, copied, conversion = map(read_json, reports)
    if copied.get("fingerprint") != conversion.get("fingerprint"):
        logger.warning("%s was made from another checkpoint than %s: not used.", folder, source)
        return frozenset()
    if quantization.get("mode") != "int8":  # only its weights are stored in fewer bits
        return frozenset()
    if quantization.get("format") != QUANTIZATION_FORMAT:
        logger.warning("%s is of an older format: not used. `quantize_models` makes it again.", folder)
        return frozenset()
    with explaining(folder, f"reading {QUANTIZATION_REPORT}"):
        return frozenset(part["name"] for part in quantization["parts"] if part["quantized"])


def _run_in_parts(
    model: ov.CompiledModel, inputs: dict[str, np.ndarray], outputs: int | None, rows: int | None
) -> list[np.ndarray]:
    """Run a batch, at most ``rows`` rows at a time; inputs of one row belong to all rows."""
    batch = max(len(value) for value in inputs.values())
    if rows is None or rows >= batch:
        return _run(model, inputs, outputs)
    parts = []
    for i in range(0, batch, rows):
        part = {key: value[i : i + rows] if len(value) == batch else value for key, value in inputs.items()}
        parts.append(_run(model, part, outputs))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _run(model: ov.CompiledModel, inputs: dict[str, np.ndarray], outputs: int | None) -> list[np.ndarray]:
    results = model(inputs, share_inputs=True, share_outputs=True)
    return [results[i].copy() for i in range(len(results) if outputs is None else outputs)]


def _allow_fractional_timesteps(model: ov.Model) -> None:
    """Let the U-Net take fractional timesteps, for some schedulers; the folder's takes whole ones, for other tools."""
    timestep = model.input("timestep").get_node()
    timestep.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def _allow_long_prompts(model: ov.Model) -> None:
    """Let the U-Net take more hidden states, for long prompts; the folder's takes 77, for other tools."""
    text = model.input("encoder_hidden_states")
    model.reshape({text.any_name: ov.PartialShape([-1, -1, text.partial_shape[2]])})
