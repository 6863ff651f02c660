"""What diffusers' users expect of a pipeline besides its call: its parts, their settings, and familiar methods.

A method for something that OpenVINO does anyway warns once; one for something unsupported raises, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_decidiffusion.arguments import check_path, shown
from ov_decidiffusion.generation.callbacks import CALLBACK_TENSORS

if TYPE_CHECKING:
    import torch
    from diffusers.image_processor import VaeImageProcessor


SafetyChecker = Callable[..., tuple[Any, list[bool]]]

# Arguments of diffusers' calls that this pipeline lacks: neutral values, which are accepted, and advice for the others.
FOREIGN_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "cross_attention_kwargs": ((), "it goes with LoRA weights, which have to be merged before a conversion"),
    "ip_adapter_image": ((), "an IP-Adapter needs a U-Net that was converted with it"),
    "ip_adapter_image_embeds": ((), "an IP-Adapter needs a U-Net that was converted with it"),
    "clip_skip": ((0,), "the converted text encoder gives its last layer only"),
    "callback": ((), "give `callback_on_step_end`"),
    "callback_steps": ((1,), "`callback_on_step_end` is called after each step"),
    "masked_image_latents": ((), "give `image` and `mask_image`: this U-Net has no inputs for a masked picture"),
}
# Read-only attributes, each with what to do instead of assigning it.
READ_ONLY = {
    "vae": "convert a checkpoint that has it",
    "unet": "convert a checkpoint that has it in flexible_unet/",
    "text_encoder": "convert a checkpoint that has it",
    "tokenizer": "convert a checkpoint that has it",
    "feature_extractor": "assign `safety_checker`, which is given the pictures themselves",
    "image_processor": "give pictures, arrays or tensors as they are",
    "mask_processor": "give masks as they are",
    "vae_scale_factor": "it is the autoencoder's",
    "components": "assign the scheduler or the safety checker itself",
    "config": "assign the scheduler or the safety checker itself",
    "device": "call `to`",
    "dtype": "load with `inference_precision`",
}


def without_foreign(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments without those that only diffusers has, if their values are neutral.

    Raises:
        ValueError: one asks for something unsupported; the message says what to do.
    """
    for name in arguments.keys() & FOREIGN_ARGUMENTS:
        neutral, instead = FOREIGN_ARGUMENTS[name]
        if arguments[name] is not None and not any(arguments[name] == value for value in neutral):
            raise ValueError(f"`{name}` is not offered here, got {shown(arguments[name])}: {instead}.")
    return {name: value for name, value in arguments.items() if name not in FOREIGN_ARGUMENTS}


def precision_for(torch_dtype: Any, inference_precision: str) -> str:
    """The precision for a PyTorch type: float32 is "f32", and half-precision types take the fastest ("auto")."""
    name = str(torch_dtype).removeprefix("torch.")
    if torch_dtype is None or inference_precision != "auto":
        return inference_precision
    if name not in ("float32", "float16", "bfloat16", "auto"):
        raise ValueError(f"`torch_dtype` must be torch.float32, float16 or bfloat16, got {shown(torch_dtype)}.")
    return "f32" if name == "float32" else "auto"


def check_foreign_loading(variant: Any, use_safetensors: Any, custom_pipeline: Any, compile: Any) -> None:
    """Accept arguments of other libraries' ``from_pretrained`` if they hold anyway, and refuse the others.

    Raises:
        ValueError: says what to do instead.
    """
    if variant not in (None, "fp16"):
        raise ValueError(f"`variant` must be None or 'fp16', which is found automatically, got {shown(variant)}.")
    if use_safetensors is False:
        raise ValueError("`use_safetensors=False` is not accepted: call convert_checkpoint with allow_pickles=True.")
    if compile is False:
        raise ValueError("`compile=False` is not accepted: models compile in the background while Python imports.")
    if custom_pipeline is not None:
        _taken("custom_pipeline", "no code of a checkpoint is run here, and none is needed")


class DiffusersSurface:
    """diffusers' attributes and methods, for a pipeline that has an ``_engine``."""

    _engine: Any
    _safety_checker: SafetyChecker | None = None
    _callback_tensor_inputs = [*CALLBACK_TENSORS]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_ONLY:
            raise AttributeError(f"`{name}` of an OpenVINO pipeline cannot be assigned: {READ_ONLY[name]}.")
        super().__setattr__(name, value)

    @property
    def unet(self) -> Any:
        """The U-Net with its ``config``, for code that looks inside the loop; runs in full, or its top level alone."""
        return self._engine.unet

    @property
    def vae(self) -> Any:
        """The autoencoder with its ``config``."""
        return self._engine.vae

    @property
    def text_encoder(self) -> Any:
        """The text encoder with its ``config``."""
        return self._engine.text_encoder

    @property
    def feature_extractor(self) -> None:
        """None: a ``safety_checker`` is given the pictures themselves."""
        return None

    @property
    def image_processor(self) -> VaeImageProcessor:
        """diffusers' image processor that the pipeline uses."""
        return self._engine.image_processor

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """diffusers' image processor for masks, which makes them grey and then black or white."""
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(
            vae_scale_factor=self._engine.vae.scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position, along a side."""
        return self._engine.vae.scale_factor

    @property
    def components(self) -> dict[str, Any]:
        """The parts by diffusers' names."""
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Any:
        """The classes of the parts, in the form of ``model_index.json``."""
        from diffusers.configuration_utils import FrozenDict

        parts = {name: (type(part).__module__, type(part).__name__) for name, part in self.components.items()}
        return FrozenDict({"_class_name": type(self).__name__, "requires_safety_checker": False, **parts})

    @property
    def device(self) -> torch.device:
        """Where this pipeline's tensors are: in the CPU's memory, whichever device OpenVINO computes on."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type that the models compute in; tensors passed in and out are float32."""
        import torch

        return {"bf16": torch.bfloat16, "f16": torch.float16}.get(self._engine.models.precision, torch.float32)

    @property
    def safety_checker(self) -> SafetyChecker | None:
        """None, or a callable that checks all finished pictures.

        It is called as ``checker(images=array, clip_input=None)`` with an array [b, H, W, 3] in 0…1. It returns the
        pictures to show and a flag for each; the flags become ``nsfw_content_detected`` of the call's result.
        """
        return self._safety_checker

    @safety_checker.setter
    def safety_checker(self, checker: SafetyChecker | None) -> None:
        if checker is not None and not callable(checker):
            raise ValueError(f"`safety_checker` must be None or a callable, got {shown(checker)}.")
        self._safety_checker = checker

    def _checked_for_safety(self, images: Any) -> tuple[Any, list[bool] | None]:
        """Finished pictures as the safety checker returns them, and its flags."""
        if self._safety_checker is None:
            return images, None
        import numpy as np
        import torch

        processor = self.image_processor
        if isinstance(images, torch.Tensor):
            array = processor.pt_to_numpy(images)
        else:
            array = processor.pil_to_numpy(images) if isinstance(images, list) else images
        shown_images, flags = self._safety_checker(images=array.copy(), clip_input=None)
        flags = [bool(flag) for flag in flags]
        if len(flags) != len(array):
            raise ValueError(f"`safety_checker` gave {len(flags)} flags for {len(array)} pictures.")
        replaced = np.asarray(shown_images, np.float32)
        if isinstance(images, torch.Tensor):
            return processor.numpy_to_pt(replaced), flags
        if not isinstance(images, list):
            return replaced, flags
        others = processor.numpy_to_pil(replaced)  # used only for flagged pictures: the rest keep their settings
        return [other if flag else image for image, other, flag in zip(images, others, flags, strict=True)], flags

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """A progress bar like the pipeline's own, around an iterable or for a total."""
        from ov_decidiffusion.progress import progress_bar

        return progress_bar(iterable, total=total, **self._engine.progress_bar_config)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Save a complete copy of the model folder, which ``from_pretrained`` can load.

        Raises:
            ValueError: the target exists already.
        """
        from ov_decidiffusion.model_folder.writing import building, copy_folder, is_free, only_one

        target = check_path("save_directory", save_directory)
        with only_one(target):
            if not is_free(target):
                raise ValueError(f"`save_directory` {target} exists: choose a new folder.")
            with building(target) as partial:
                copy_folder(self._engine.models.folder, partial)

    @classmethod
    def from_pipe(cls, pipeline: Any, **_: Any) -> Any:
        """The pipeline itself: one class does text-to-image, image-to-image and inpainting.

        Raises:
            TypeError: the pipeline is from another library.
        """
        if not isinstance(pipeline, cls):
            raise TypeError(f"Load an OpenVINO pipeline with from_pretrained; {type(pipeline).__name__} is none.")
        return pipeline

    def maybe_free_model_hooks(self) -> None:
        """Does nothing: there are no hooks."""

    def enable_attention_slicing(self, slice_size: Any = None) -> None:
        """Changes nothing: OpenVINO's attention never holds the whole attention matrix."""
        _taken("enable_attention_slicing", "OpenVINO's attention needs no slices")

    def disable_attention_slicing(self) -> None:
        """Changes nothing; see ``enable_attention_slicing``."""

    def enable_vae_slicing(self) -> None:
        """Changes nothing: pictures are decoded one at a time anyway."""
        _taken("enable_vae_slicing", "pictures are decoded one at a time anyway")

    def disable_vae_slicing(self) -> None:
        """Changes nothing; see ``enable_vae_slicing``."""

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Changes nothing: the models stay on OpenVINO's device."""
        _taken("enable_model_cpu_offload", "the models stay on OpenVINO's device")

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Changes nothing; see ``enable_model_cpu_offload``."""
        _taken("enable_sequential_cpu_offload", "the models stay on OpenVINO's device")

    def enable_xformers_memory_efficient_attention(self, *_: Any, **__: Any) -> None:
        """Changes nothing; see ``enable_attention_slicing``."""
        _taken("enable_xformers_memory_efficient_attention", "OpenVINO has its own attention")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Changes nothing; see ``enable_attention_slicing``."""

    def fuse_qkv_projections(self, *_: Any, **__: Any) -> None:
        """Changes nothing: OpenVINO fuses operations when it compiles, where that pays."""
        _taken("fuse_qkv_projections", "OpenVINO fuses operations when it compiles, where that pays")

    def unfuse_qkv_projections(self, *_: Any, **__: Any) -> None:
        """Changes nothing; see ``fuse_qkv_projections``."""

    def enable_freeu(self, *_: Any, **__: Any) -> None:
        """Refused: FreeU changes the skips inside the U-Net.

        Raises:
            NotImplementedError: says why.
        """
        raise NotImplementedError("FreeU changes the skips inside the U-Net, which the converted one does not expose.")

    def load_lora_weights(self, *_: Any, **__: Any) -> None:
        """Refused: converted weights cannot be changed.

        Raises:
            NotImplementedError: says what to do.
        """
        raise NotImplementedError(
            "LoRA weights cannot be added to converted models: merge them into the checkpoint with diffusers "
            "(`fuse_lora`, `save_pretrained`), and convert that."
        )

    def load_ip_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: an IP-Adapter adds layers to the U-Net.

        Raises:
            NotImplementedError: says why.
        """
        raise NotImplementedError("An IP-Adapter adds layers to the U-Net, which the converted one does not have.")

    def load_textual_inversion(self, *_: Any, **__: Any) -> None:
        """Refused: the vocabulary is the converted text encoder's.

        Raises:
            NotImplementedError: says what to do.
        """
        raise NotImplementedError(
            "New words cannot be added to a converted text encoder: add them to the checkpoint's tokenizer and text "
            "encoder with transformers, and convert that."
        )


_said: set[str] = set()


def _taken(name: str, why: str) -> None:
    """Warn once that a method or an argument changes nothing."""
    if name not in _said:
        _said.add(name)
        warnings.warn(f"`{name}` changes nothing: {why}.", UserWarning, stacklevel=3)
