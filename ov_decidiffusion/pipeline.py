"""OVStableDiffusionPipeline: makes pictures from text, and from a source picture if one is given, with OpenVINO.

This module imports nothing slow: OpenVINO begins to compile while torch and diffusers are still being imported.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from ov_decidiffusion.arguments import (
    OUTPUT_TYPES,
    check_callback,
    check_callback_tensors,
    check_choice,
    check_flag,
    check_path,
    check_prompts,
    shown,
    warn_renamed,
)
from ov_decidiffusion.generation.callbacks import CALLBACK_TENSORS, RunState, call_back
from ov_decidiffusion.generation.config import GenerationConfig
from ov_decidiffusion.generation.surface import (
    DiffusersSurface,
    SafetyChecker,
    check_foreign_loading,
    precision_for,
    without_foreign,
)
from ov_decidiffusion.model_folder.layout import is_checkpoint, tokenizer_dir
from ov_decidiffusion.runtime.loading import check_loading
from ov_decidiffusion.runtime.models import Models

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer

    from ov_decidiffusion.generation.denoise import DenoisingStep
    from ov_decidiffusion.generation.engine import Engine, Pictures
    from ov_decidiffusion.generation.images import PictureLike, StableDiffusionOutput
    from ov_decidiffusion.generation.unet import UNet
    from ov_decidiffusion.schedulers.registry import Scheduler


_COMPILER = "torch._dynamo"
_one_import_at_a_time = threading.Lock()


P = ParamSpec("P")
R = TypeVar("R")


def _takes_fields_of(
    config: Callable[P, GenerationConfig],
) -> Callable[[Callable[[Any, GenerationConfig], R]], Callable[Concatenate[Any, P], R]]:
    """Let a method take a configuration's fields as its arguments, and list them in its signature."""

    def decorate(method: Callable[[Any, GenerationConfig], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def taking_fields(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(self, config(*args, **kwargs))

        own = inspect.signature(method)
        parameters = [own.parameters["self"], *inspect.signature(config).parameters.values()]
        taking_fields.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return taking_fields

    return decorate


def _answers_wrong_names(method: Callable[P, R | tuple]) -> Callable[P, R]:
    """Answer an unknown argument name with the nearest known one, as Python does from 3.13 on.

    The return type omits the tuple that ``return_dict=False`` gives: an overload for it would have to repeat the whole
    list of arguments.
    """
    known = list(inspect.signature(method).parameters)

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Any:
        kwargs = without_foreign(kwargs)  # type: ignore[assignment]
        if len(args) > 2:
            raise TypeError(
                "Only `prompt` may be given without its name, as in pipe(prompt, image=picture, height=512); got "
                f"{len(args) - 2} more: {shown(args[2])}."
            )
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known[1:])}."
                raise TypeError(f"{method.__qualname__}() has no argument `{name}`{meant}")
        return method(*args, **kwargs)

    return checked


class OVStableDiffusionPipeline(DiffusersSurface, RunState):
    """Text-to-image, text-guided image-to-image and inpainting with an OpenVINO model folder.

    Arguments have the names and meanings of diffusers' ``StableDiffusionPipeline``, ``StableDiffusionImg2ImgPipeline``
    and ``StableDiffusionInpaintPipeline``. With the same weights, scheduler and seed, and
    ``inference_precision="f32"``, the pictures are the same too.
    Create one with ``from_pretrained``.

    Attributes:
        scheduler: one of ``SUPPORTED_SCHEDULERS``; assign another to change it.
        defaults: the checkpoint's own ``num_inference_steps``, ``guidance_scale`` and ``guidance_rescale``.
        vae_scale_factor: pixels per latent position, along a side.
        size_factor: both sides of a picture are multiples of this.
        inference_precision: a sentence that says which number format the models compute in, and why.
        quantized_parts: the models that exist in INT8 too; ``quantize_models`` makes them.
        has_tiny_decoder: whether ``decoder="tiny"`` is available.
        models: the compiled models.
        unet: the U-Net, for code that looks inside the loop; it runs in full, or its top level alone.
        origin: the checkpoint that the models were made from, its revision, and the weights' format.
        seconds: seconds spent in each model since the pipeline was loaded.
    """

    _loading: tuple[Any, ...] = ()  # the loading options other than the folder and the device

    def __init__(self, engine: Engine):
        super().__init__()
        self._take(engine)

    def _take(self, engine: Engine) -> None:
        self._engine = engine
        self.models = engine.models
        self.origin, self.defaults = engine.origin, engine.defaults
        self.vae_scaling_factor = engine.vae.scaling_factor
        self.latent_channels = engine.latent_channels
        self.size_factor, self.quantized_parts = engine.models.size_factor, engine.models.quantized_parts
        self.has_tiny_decoder = engine.models.has_tiny_decoder
        self.inference_precision = engine.models.inference_precision

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "CPU",
        inference_precision: str = "auto",
        cache_dir: str | Path | None = None,
        threads: int | None = None,
        ov_config: dict[str, Any] | None = None,
        *,
        ov_cache_dir: str | Path | None = None,
        scheduler: Scheduler | None = None,
        safety_checker: SafetyChecker | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        custom_pipeline: str | None = None,
        requires_safety_checker: bool | None = None,
        export: bool | None = None,
        compile: bool | None = None,
    ) -> OVStableDiffusionPipeline:
        """Load a model folder, or convert a checkpoint first.

        Args:
            model: a folder that ``convert_checkpoint`` made; or a checkpoint's folder or hub id, which is converted to
                ``default_model_dir(model)`` first, unless that was done before.
            device: any OpenVINO device, such as "CPU", "AUTO" or "GPU.0". This project is tested on CPU only; support
                for other devices follows OpenVINO's documentation and is untested.
            inference_precision: the number format to compute in: "f32", "bf16" or "f16". "auto" takes the fastest,
                found by a probe that runs once per machine; the pipeline's ``inference_precision`` says which it is.
                With "f32" pictures are diffusers' own, and the same for any number of threads to 1/255 in a pixel;
                with "bf16" another number of threads can move an edge. OpenVINO's default picks bf16 on processors
                with bf16 instructions, even where that is slower. The autoencoder never computes in f16.
            cache_dir: the former name of ``ov_cache_dir``; in the next release it will mean the hub's cache folder, as
                in diffusers.
            threads: number of threads to compute with; None for all cores.
            ov_config: OpenVINO's own properties by name, passed on unchanged.
            ov_cache_dir: folder in which OpenVINO caches compiled models; None for no cache. The cache saves less than
                a second of loading and takes as much disk space as the models, as ``benchmarks.compare`` shows.
            scheduler, safety_checker: used as if they were assigned to the pipeline.
            revision: a branch, tag or commit of the hub's repository.
            token, local_files_only: see ``convert_checkpoint``.
            torch_dtype: torch.float32 means "f32"; half-precision types mean "auto".
            variant, use_safetensors, custom_pipeline, requires_safety_checker, export,
                compile: arguments of diffusers and Optimum Intel. Values that describe what happens here anyway are
                accepted; others are refused with advice on what to do instead.

        Raises:
            ValueError: a wrong argument, or a folder that lacks a part or is damaged; the message names it.

        Example:
            >>> from ov_decidiffusion import OVStableDiffusionPipeline
            >>> pipe = OVStableDiffusionPipeline.from_pretrained("checkpoints/tiny-decidiffusion")
            >>> pipe.default_size
            (128, 128)
        """
        folder = check_path("model", model, "a folder or a hub id")
        check_foreign_loading(variant, use_safetensors, custom_pipeline, compile)
        inference_precision = precision_for(torch_dtype, inference_precision)
        if cache_dir is not None:
            warn_renamed("cache_dir", "ov_cache_dir")
            ov_cache_dir = cache_dir
        if is_checkpoint(model):
            from ov_decidiffusion.conversion.convert import convert_checkpoint

            check_loading(device, inference_precision, ov_cache_dir, threads, ov_config)
            folder = convert_checkpoint(
                model, revision=revision, token=token, local_files_only=bool(local_files_only)
            ).model_dir
        options = (inference_precision, ov_cache_dir, threads, ov_config)
        pipe = cls(cls._load_engine(folder, device, *options))
        pipe._loading = options
        if scheduler is not None:
            pipe.scheduler = scheduler
        pipe.safety_checker = safety_checker
        return pipe

    @staticmethod
    def _load_engine(folder: Path, *loading: Any) -> Engine:
        models = Models.load(folder, *loading)
        try:
            _import_diffusers()
            from ov_decidiffusion.generation.engine import Engine  # torch and diffusers: models compile meanwhile

            engine = Engine(models, folder)
        finally:
            models.wait()
        return engine

    def to(self, *targets: Any, **_: Any) -> OVStableDiffusionPipeline:
        """Return the pipeline, after loading its models again if another device is named.

        Args:
            targets: a device, see ``from_pretrained``; PyTorch's types change nothing.

        Raises:
            ValueError: there is no such device; the message names those that exist.
        """
        devices = [str(one) for one in targets if isinstance(one, str) or type(one).__name__ == "device"]
        for name in devices:
            device = check_loading(name)[1]
            if device != self.models.device:
                engine = self._load_engine(self.models.folder, device, *self._loading)
                engine.scheduler, engine.progress_bar_config = self.scheduler, self._engine.progress_bar_config
                self.models.close()
                RunState.__init__(self)
                self._take(engine)
        return self

    @property
    def scheduler(self) -> Scheduler:
        """The noise schedule and solver in use; in a callback, the instance that the run uses."""
        return self._engine.scheduler if self._step is None else self._step.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:  # Any: diffusers declares that ``from_config`` may return a tuple
        self._engine.scheduler = scheduler

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer of transformers, for code that inspects prompts; the pipeline itself does not need it."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(tokenizer_dir(self.models.folder), local_files_only=True)

    @property
    def precision(self) -> str:
        """The number format that the models compute in: "f32", "bf16", …"""
        return self.models.precision

    @property
    def number_format(self) -> str:
        """The former name of ``precision``."""
        warn_renamed("number_format", "precision")
        return self.precision

    @property
    def denoiser(self) -> UNet:
        """The former name of ``unet``."""
        warn_renamed("denoiser", "unet")
        return self.unet

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each model so far."""
        return dict(self.models.seconds)

    def find_quantized(self) -> None:
        """Look for INT8 models again, in case ``quantize_models`` made some after this pipeline was loaded."""
        self.models.find_quantized()
        self.quantized_parts = self.models.quantized_parts

    def close(self) -> None:
        """End all runs at their next step, wait for the models and release them; call it before the process ends."""
        self._interrupt = True
        self.models.close()

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set tqdm's options for the progress bar; ``disable=True`` hides it.

        Raises:
            ValueError: tqdm has no such option.
        """
        self._engine.set_progress_bar_config(kwargs)

    @_answers_wrong_names
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        image: PictureLike | Sequence[PictureLike] | None = None,
        mask_image: PictureLike | Sequence[PictureLike] | None = None,
        padding_mask_crop: int | None = None,
        overlay: bool = False,
        strength: float | None = None,
        resize_mode: str = "crop",
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        latents: torch.Tensor | np.ndarray | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_syntax: bool = True,
        preset: str = "exact",
        solver: str | None = None,
        quantized: bool | Sequence[str] | None = None,
        cache_interval: int | None = None,
        cache_power: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_cache_interval: int | None = None,
        decoder: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[OVStableDiffusionPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionOutput | tuple:
        """Generate pictures.

        Args:
            prompt: what to show; one or a list.
            negative_prompt: what to avoid; one for all prompts, or a list of the same length. It acts
                through guidance, so ``guidance_scale`` has to be above 1.
            image: a source picture of any size, or one for each prompt, for image-to-image. PIL pictures of any mode,
                arrays and tensors, as ``to_pictures`` takes them.
            mask_image: a mask whose white area is repainted in ``image``, for inpainting. One, or one for each source,
                of any size, in any form that ``image`` may have; transparent counts as black.
            padding_mask_crop: with ``mask_image``, crop the source to the mask's white area and this many pixels
                around it, and repaint the crop at full size. The crop is then pasted back, so that the picture has
                the source's size.
            overlay: paste the source over the finished picture where the mask is black, so that it is exact there.
            strength: with ``image``, how much of it to redo, above 0 and at most 1: this share of the steps runs.
                None: 0.8, or 1 with ``mask_image``, as in diffusers.
            resize_mode: how to fit a source that has another shape than the picture: "crop" cuts it off evenly,
                "fill" repeats its edges, "stretch" changes its shape.
            num_inference_steps: number of denoising steps, at least 1; None for the checkpoint's own.
            timesteps, sigmas: the schedule itself, as falling timesteps or noise levels, in place of
                ``num_inference_steps``; only for schedulers that accept one.
            guidance_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); guidance is off
                at 1 or below; None for the checkpoint's own.
            guidance_rescale: share in 0…1 by which the contrast that guidance adds is pulled back (Lin et al. 2023,
                arXiv 2305.08891, section 3.4); None for the checkpoint's own.
            eta: for DDIM, the share in 0…1 of its noise that is drawn again at each step (Song et al. 2021, arXiv
                2010.02502, equation 16); other schedulers ignore it.
            height, width: the picture's size in pixels, in multiples of ``size_factor``. None: the checkpoint's
                default, or with ``image`` the size closest to the source's shape that has about the default's area;
                several sources must then have one size.
            num_images_per_prompt: number of pictures for each prompt.
            generator: source of the noise; a list, one for each picture, makes each picture independent of the rest
                of the batch.
            seed: an int makes one generator for the whole batch, a list makes one for each picture; not together
                with ``generator``.
            latents: noise to start from instead of drawn noise, [pictures, 4, height / 8, width / 8]; text-to-image
                only.
            prompt_embeds, negative_prompt_embeds: hidden states [prompts, n, d], as ``encode_prompt`` makes them, in
                place of the prompts.
            prompt_syntax: whether brackets weight words, as ``parse_weights`` says; False takes them literally.
            preset: "exact", "balanced" or "fast". Where ``num_inference_steps`` and the following arguments are None,
                it sets them to the values listed in ``PRESETS``.
            solver: a sampler by its common name, such as "euler a" or "dpm++ 2m karras", in place of ``scheduler`` and
                on its noise schedule. ``SOLVERS`` lists them all. "squeezed" runs only some of the requested steps, as
                ``SQUEEZE_MODES`` says.
            quantized: whether to run the U-Net and the decoder in INT8, or a list of the parts to run in INT8; needs
                ``quantize_models`` first.
            cache_interval: run the full U-Net on the first step, on the last, and on as many between as are needed to
                be at most this many steps apart if spread evenly; the other steps run its top level alone, on the
                deeper levels' latest features (Ma et al. 2023, arXiv 2312.00858). 1 runs the full U-Net on every step.
            cache_power: with a ``cache_interval``, how the full steps are spread: evenly at 1, and closer together at
                the start above it (at most 3); their number stays the same.
            guidance_interval: (low, high), the noise levels sigma = sqrt((1 - abar) / abar) between which guidance
                acts; steps outside cost half (Kynkäänniemi et al. 2024, arXiv 2404.07724). (0, math.inf): always.
            guidance_cache_interval: compute guidance's direction, the conditional minus the unconditional prediction,
                on the first guided step and then on every n-th one; the guided steps between cost half and reuse the
                latest direction, which changes slowly (Lv et al. 2024, arXiv 2410.19355, section 3.3, reuse the
                unconditional prediction). 1 computes it on every guided step.
            decoder: what turns finished latents into pixels: "whole", or "tiny", which is at least ten times as fast
                and loses fine detail, if the folder has one (diffusers' ``AutoencoderTiny``).
            output_type: "pil", "np", "pt" or "latent" (before the decoder).
            return_dict: False returns a tuple, as in diffusers: the pictures, and the flags of ``safety_checker``.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; if it returns
                a dictionary, the run continues with its "latents" and "prompt_embeds". It may set
                ``pipe._interrupt``, which ends the run with the picture as it is, and ``pipe._guidance_scale``.
                diffusers' own callbacks work.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: "latents",
                "prompt_embeds", "negative_prompt_embeds". As in diffusers, "prompt_embeds" of a guided run holds the
                negative prompts' too.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.
            TypeError: there is no such argument; the message says which is nearest.
            FloatingPointError: the models gave NaN or infinity instead of a picture.

        Example:
            >>> owl = pipe("an owl in a forest at night", seed=1).images[0]
            >>> owl.save("owl.png")
            >>> pipe("an owl on a beach", image=owl, strength=0.6, num_inference_steps=4).images[0].size
            (128, 128)
        """
        config = GenerationConfig(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            mask_image=mask_image,
            padding_mask_crop=padding_mask_crop,
            overlay=overlay,
            strength=strength,
            resize_mode=resize_mode,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_syntax=prompt_syntax,
            preset=preset,
            solver=solver,
            quantized=quantized,
            cache_interval=cache_interval,
            cache_power=cache_power,
            guidance_interval=guidance_interval,
            guidance_cache_interval=guidance_cache_interval,
            decoder=decoder,
        )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_callback(callback_on_step_end)
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        names = check_callback_tensors(names, CALLBACK_TENSORS)
        step = None
        with self._calling() as call:
            for step in self._engine.denoise(config):
                call.step = step
                if callback_on_step_end is not None:
                    call_back(callback_on_step_end, self, step, names)
                if self.interrupt:
                    break
        from ov_decidiffusion.generation.images import StableDiffusionOutput

        assert step is not None  # a run has at least one step
        if output_type == "latent":
            images, flags = step.latents, None
        else:
            images, flags = self._checked_for_safety(self.finish(step, output_type))
        return StableDiffusionOutput(images, flags) if return_dict else (images, flags)

    @_answers_wrong_names
    @_takes_fields_of(GenerationConfig)
    def denoise(self, config: GenerationConfig) -> Iterator[DenoisingStep]:
        """Run the denoising loop one step at a time.

        All arguments are checked before the first step runs. To stop generating, stop iterating;
        ``decode_latents(step.latents)`` shows the picture so far.

        Args:
            config: its fields are the method's arguments; see ``__call__``.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.
            TypeError: there is no such argument; the message says which is nearest.

        Example:
            >>> for step in pipe.denoise("a fox in the snow", seed=1, num_inference_steps=4):
            ...     print(step.index, tuple(step.latents.shape))
            0 (1, 4, 16, 16)
            1 (1, 4, 16, 16)
            2 (1, 4, 16, 16)
            3 (1, 4, 16, 16)
            >>> pipe.finish(step)[0].save("fox.png")
        """
        return self._engine.denoise(config)

    @overload
    def finish(self, step: DenoisingStep, output_type: Literal["pil"] = "pil") -> list[Image.Image]: ...
    @overload
    def finish(self, step: DenoisingStep, output_type: Literal["np"]) -> np.ndarray: ...
    @overload
    def finish(self, step: DenoisingStep, output_type: Literal["pt"]) -> torch.Tensor: ...
    @overload
    def finish(self, step: DenoisingStep, output_type: str) -> Pictures: ...
    def finish(self, step: DenoisingStep, output_type: str = "pil") -> Pictures:
        """The pictures of a step, as a call returns them: decoded, with the overlay, and carrying their settings.

        Args:
            step: the last one for finished pictures, or any.
            output_type: "pil", "np" or "pt"; only PIL pictures carry settings.
        """
        return self._engine.finish(step, output_type)

    def latent_preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Previews of latents [b, 4, h, w] without the decoder: instant, right in colour, as coarse as the latents.

        With ``step.predicted`` they show from the first step on where a run is heading.
        """
        return self._engine.latent_preview(latents, self.defaults["latent_preview"])

    def quick_look(self, latents: torch.Tensor) -> list[Image.Image]:
        """The former name of ``latent_preview``."""
        warn_renamed("quick_look", "latent_preview")
        return self.latent_preview(latents)

    def encode_text(self, prompts: str | list[str], prompt_syntax: bool = True) -> torch.Tensor:
        """Hidden states [prompts, 77, d] of the text encoder; a multiple of 77 if a prompt is longer.

        The latest prompts are cached: many pictures of one prompt encode it once.

        Example:
            >>> states = pipe.encode_text("a fox in the snow")
            >>> pipe(prompt_embeds=states, seed=1, num_inference_steps=4).images[0].size
            (128, 128)
        """
        check_flag("prompt_syntax", prompt_syntax)
        return self._engine.encode_prompt(check_prompts(prompts), prompt_syntax)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: Any = None,
        num_images_per_prompt: int | None = None,
        do_classifier_free_guidance: bool | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_syntax: bool = True,
    ) -> Any:
        """Hidden states [pictures, n, d] of the prompts and of the negative prompts, as in diffusers.

        Args:
            prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds, prompt_syntax: see
                ``__call__``.
            do_classifier_free_guidance: whether to return the hidden states of the negative prompt too.
            device: accepted as in diffusers; OpenVINO computes on its own device.
            lora_scale, clip_skip: None; other values are refused.

        Returns:
            The pair; its second is None without guidance. The former use, with a prompt alone, still returns what
            ``encode_text`` returns.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.

        Example:
            >>> wanted, avoided = pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="snow")
            >>> wanted.shape == avoided.shape
            True
        """
        if device is None and num_images_per_prompt is None and do_classifier_free_guidance is None:
            warn_renamed("encode_prompt with a prompt alone", "encode_text")
            return self.encode_text(prompt, prompt_syntax)  # type: ignore[arg-type]
        without_foreign({"cross_attention_kwargs": lora_scale, "clip_skip": clip_skip})
        config = GenerationConfig(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=1 if num_images_per_prompt is None else num_images_per_prompt,
            prompt_syntax=prompt_syntax,
        )
        return self._engine.encode_pair(config, do_classifier_free_guidance is not False)

    def token_ids(self, prompts: str | list[str]) -> np.ndarray:
        """Token ids [prompts, 77] of prompts, with brackets taken literally; longer prompts are cut off."""
        return self._engine.text_encoder.token_ids(check_prompts(prompts, "prompts"))

    def encode_image(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Scaled latents [b, 4, H / 8, W / 8] of pixels [b, 3, H, W] in -1…1, drawn from the encoder's distribution."""
        return self._engine.encode_image(pixels, generator)

    @overload
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: Literal["pil"] = "pil",
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> list[Image.Image]: ...
    @overload
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: Literal["np"],
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> np.ndarray: ...
    @overload
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: Literal["pt"],
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> torch.Tensor: ...
    @overload
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: str,
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> Pictures: ...
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> Pictures:
        """Pictures of latents [b, 4, h, w], decoded one at a time to keep memory low.

        Args:
            output_type: "pil", "np" or "pt".
            quantized: see ``denoise``; only the decoder matters here.
            decoder: "whole", or "tiny" if the folder has one.

        Example:
            >>> latents = pipe("a fox in the snow", output_type="latent", num_inference_steps=4).images
            >>> pipe.decode_latents(latents, "np").shape
            (1, 128, 128, 3)
        """
        return self._engine.decode(latents, output_type, quantized, decoder)

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels of a picture when a call gives no size; assign another to change it.

        Raises:
            ValueError: the assigned size is one that no picture can have.
        """
        return self._engine.default_size

    @default_size.setter
    def default_size(self, size: tuple[int, int]) -> None:
        self._engine.set_default_size(size)

    def enable_vae_tiling(self, tile_size: int | None = None) -> None:
        """Decode pictures larger than a tile piece by piece, which takes the memory of one piece only.

        Args:
            tile_size: the side of a tile in pixels; None for the checkpoint's default size.

        Raises:
            ValueError: ``tile_size`` is below 8 latent positions.
        """
        self._engine.vae.use_tiles(self.default_size[0] if tile_size is None else tile_size)

    def disable_vae_tiling(self) -> None:
        """Decode pictures whole again."""
        self._engine.vae.disable_tiling()


def _import_diffusers() -> None:
    """Import diffusers without PyTorch's compiler, which takes a second and of which it uses one decorator.

    Without the compiler, diffusers uses a decorator that does nothing; only hints for ``torch.compile`` are lost. If
    the process has imported either of them before, nothing changes.
    """
    with _one_import_at_a_time:
        if _COMPILER in sys.modules or "diffusers.utils.torch_utils" in sys.modules:
            return
        sys.modules[_COMPILER] = None  # type: ignore[assignment]  # Python's way to say that there is none
        try:
            import diffusers.utils.torch_utils  # noqa: F401
        finally:
            sys.modules.pop(_COMPILER, None)
