"""OVStableDiffusionPipeline: text, and a picture where one is wanted, to pictures, on OpenVINO.

Nothing here is imported that takes long: OpenVINO begins to compile while torch and diffusers are still on their way.
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
    """Let a method take a configuration's fields as its arguments, and show them in its signature."""

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
    """Answer a wrong argument's name with the nearest right one; Python does so from 3.13 on.

    To type checkers the result is never the tuple that ``return_dict=False`` asks for: that it depends on an argument
    could only be said by writing the whole list of arguments once more.
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

    Argument names and meanings are those of diffusers' ``StableDiffusionPipeline``, ``StableDiffusionImg2ImgPipeline``
    and ``StableDiffusionInpaintPipeline``; with the same weights, scheduler and seed, and
    ``inference_precision="f32"``, the pictures are theirs too.
    Make one with ``from_pretrained``.

    Attributes:
        scheduler: one of ``SUPPORTED_SCHEDULERS``; assign another to change it.
        defaults: the checkpoint's own ``num_inference_steps``, ``guidance_scale`` and ``guidance_rescale``.
        vae_scale_factor: pixels to one latent position, along a side.
        size_factor: pictures' sides are multiples of this.
        inference_precision: what the models compute in, and why, as a sentence.
        quantized_parts: the models that there are in INT8 too; ``quantize_models`` makes them.
        has_tiny_decoder: whether ``decoder="tiny"`` can be asked for.
        models: the compiled models.
        unet: the U-Net, full and its top level alone, for those who look inside the loop.
        origin: the checkpoint that the models were made of, its revision, and the format of the weights.
        seconds: spent in each model since the pipeline was loaded.
    """

    _loading: tuple[Any, ...] = ()  # what it was loaded with beside folder and device

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
                ``default_model_dir(model)`` first, unless that is done already.
            device: any OpenVINO device, such as "CPU", "AUTO" or "GPU.0". CPU is what this project is tested on; other
                devices are written to OpenVINO's documentation and untested.
            inference_precision: what the models compute in, "f32", "bf16" or "f16". "auto" takes the fastest,
                found by a probe that is run once on a machine; ``inference_precision`` of the pipeline says which.
                With "f32" pictures are diffusers' own, and the same for any number of threads to 1/255 in a pixel;
                with "bf16" another number of threads can move an edge. OpenVINO's default picks bf16 on processors
                that have its instructions, even where that is slower. The autoencoder never computes in f16.
            cache_dir: the former name of ``ov_cache_dir``; in the next release it will be the hub's folder, as in
                diffusers.
            threads: how many to compute with; None for all cores.
            ov_config: OpenVINO's own properties by name, passed on as they are.
            ov_cache_dir: where OpenVINO keeps compiled models; None keeps none. It spares less than a second of a
                start and takes as much room as the models, as ``benchmarks.compare`` shows.
            scheduler, safety_checker: to use, as if they were assigned.
            revision: of a hub id: branch, tag or commit.
            token, local_files_only: as of ``convert_checkpoint``.
            torch_dtype: float32 is "f32"; halves are "auto".
            variant, use_safetensors, custom_pipeline, requires_safety_checker, export,
                compile: of diffusers and Optimum Intel. Values that hold here anyway are taken; others are refused
                with what to do instead.

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
        """The pipeline, its models loaded again for another device where one is named.

        Args:
            targets: a device as of ``from_pretrained``; PyTorch's types change nothing.

        Raises:
            ValueError: there is no such device; the message names those that there are.
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
        """The noise schedule and solver in use; in a callback, the very one of the run."""
        return self._engine.scheduler if self._step is None else self._step.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:  # Any: what diffusers' ``from_config`` says it gives may be a tuple
        self._engine.scheduler = scheduler

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """transformers' own, for those who look into prompts; the pipeline itself does not need it."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(tokenizer_dir(self.models.folder), local_files_only=True)

    @property
    def precision(self) -> str:
        """What the models compute in: "f32", "bf16", …"""
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
        """Look for INT8 models again, for some that ``quantize_models`` made since this was loaded."""
        self.models.find_quantized()
        self.quantized_parts = self.models.quantized_parts

    def close(self) -> None:
        """End all runs at their next step, wait for the models, and let go of them: before a process ends."""
        self._interrupt = True
        self.models.close()

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of the progress bar, as tqdm takes them; ``disable=True`` hides it.

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
            image: a source picture, or one for each prompt, of any size; makes it image-to-image. PIL pictures of any
                mode, arrays and tensors as ``to_pictures`` takes them.
            mask_image: makes it inpainting: its white area is repainted in ``image``. One, or one for each source, of
                any size, in any form that ``image`` may have; transparent is black.
            padding_mask_crop: with ``mask_image``: work on what lies around the white at most so many pixels away, at
                full size, and lay the source around it; the picture then has the source's size.
            overlay: lay the source over the finished picture where the mask is black, so that it is exact there.
            strength: with ``image``, how much of it to redo, above 0 and at most 1: that share of the steps runs.
                None: 0.8, and all of it with ``mask_image``, as in diffusers.
            resize_mode: how a source of another shape than the picture's is brought to it: "crop" cuts it off evenly,
                "fill" repeats its edges, "stretch" changes its shape.
            num_inference_steps: denoising steps, at least 1; None for the checkpoint's own.
            timesteps, sigmas: the steps themselves, by number or noise level, falling, for schedulers that take them;
                in place of ``num_inference_steps``.
            guidance_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); it is off at
                1 or below; None for the checkpoint's own.
            guidance_rescale: share, 0…1, by which guidance's contrast is pulled back (Lin et al. 2023, arXiv
                2305.08891, section 3.4); None for the checkpoint's own.
            eta: of DDIM, 0…1: the share of its noise that is drawn again at each step (Song et al. 2021, arXiv
                2010.02502, equation 16); others ignore it.
            height, width: in pixels, multiples of ``size_factor``. None: the checkpoint's default, or with ``image``
                the size closest to its shape that has about the default's area; several must then be of one size.
            num_images_per_prompt: pictures to make of each prompt.
            generator: source of the noise; a list of them, one a picture, makes each picture independent of the
                batch.
            seed: an int makes one generator for the whole batch, a list makes one for each picture; not together
                with ``generator``.
            latents: noise to start from instead of drawn noise, [pictures, 4, height / 8, width / 8]; text-to-image
                only.
            prompt_embeds, negative_prompt_embeds: hidden states [prompts, n, d], as ``encode_prompt`` makes them, in
                place of the prompts.
            prompt_syntax: brackets weigh words, as ``parse_weights`` says; False takes them literally.
            preset: "exact", "balanced" or "fast": values, listed in ``PRESETS``, for those of the following arguments
                and ``num_inference_steps`` that are None.
            solver: a sampler by the name that people know, such as "euler a" or "dpm++ 2m karras" (``SOLVERS`` has
                them all), in place of ``scheduler``, on its noise schedule. "squeezed" runs some of the steps asked
                for only, as ``SQUEEZE_MODES`` says.
            quantized: run the U-Net and the decoder in INT8, or only the parts named; needs ``quantize_models``.
            cache_interval: run the whole U-Net on the first step, on the last, and between them on as many as lie
                at most n apart if spread evenly; the others run its top level on the deeper levels' last features
                (Ma et al. 2023, arXiv 2312.00858). 1 runs everything on every step.
            cache_power: with a ``cache_interval``, how the whole steps lie: 1 evenly, above it (at most 3) as many,
                but closer together at the start.
            guidance_interval: (low, high), the noise levels sigma = sqrt((1 - abar) / abar) between which guidance
                acts; outside, steps cost half (Kynkäänniemi et al. 2024, arXiv 2404.07724). (0, math.inf): always.
            guidance_cache_interval: compute guidance's direction, the prediction for the prompt minus the one against
                it, on the first guided step and on every so many; the others cost half and go on with the last one,
                which changes slowly (Lv et al. 2024, arXiv 2410.19355, section 3.3, reuse the one against it). 1
                computes it always.
            decoder: what makes pixels of finished latents: "whole", or "tiny", which is at least ten times as fast and
                loses fine detail, where the folder has one (diffusers' ``AutoencoderTiny``).
            output_type: "pil", "np", "pt" or "latent" (before the decoder).
            return_dict: False gives a tuple, as in diffusers: the pictures, and what ``safety_checker`` says of them.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; if it returns
                a dictionary, the run continues with its "latents" and "prompt_embeds". It may set
                ``pipe._interrupt``, which ends the run with the picture as it is, and ``pipe._guidance_scale``.
                diffusers' own callbacks work.
            callback_on_step_end_tensor_inputs: the tensors that it is given: "latents", "prompt_embeds",
                "negative_prompt_embeds". As in diffusers, "prompt_embeds" of a guided run has both.

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
        """The denoising loop, a step at a time.

        Everything is checked before the first step runs. Stop iterating to stop generating;
        ``decode_latents(step.latents)`` shows how far it is.

        Args:
            config: given as arguments, which are those of a call of the pipeline.

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
        """The pictures of a step, as the call gives them: decoded, with what a mask keeps, and their settings in them.

        Args:
            step: the last one for finished pictures, or any.
            output_type: "pil", "np" or "pt"; only PIL pictures carry settings.
        """
        return self._engine.finish(step, output_type)

    def latent_preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents [b, 4, h, w] in no time: right in colour, and as coarse as the latents.

        With ``step.predicted`` they show what becomes of a run from its first step on.
        """
        return self._engine.latent_preview(latents, self.defaults["latent_preview"])

    def quick_look(self, latents: torch.Tensor) -> list[Image.Image]:
        """The former name of ``latent_preview``."""
        warn_renamed("quick_look", "latent_preview")
        return self.latent_preview(latents)

    def encode_text(self, prompts: str | list[str], prompt_syntax: bool = True) -> torch.Tensor:
        """Hidden states [prompts, 77, d] of the text encoder; a multiple of 77 where a prompt is longer.

        The latest prompts are remembered: many pictures of one prompt encode it once.

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
        """diffusers' pair: hidden states [pictures, n, d] for the prompts, and against them (None without guidance).

        Args:
            prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds, prompt_syntax: as of
                a call of the pipeline.
            do_classifier_free_guidance: whether to return the hidden states of the negative prompt too.
            device: where diffusers computes; OpenVINO has its own.
            lora_scale, clip_skip: None; others are refused.

        Returns:
            The pair. Its former use, with a prompt alone, still gives what ``encode_text`` gives.

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
        """Whole numbers [prompts, 77] of prompts as they stand, brackets too; of a longer one the beginning."""
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
            quantized: as of ``denoise``; only the decoder counts here.
            decoder: "whole", or "tiny" where the folder has one.

        Example:
            >>> latents = pipe("a fox in the snow", output_type="latent", num_inference_steps=4).images
            >>> pipe.decode_latents(latents, "np").shape
            (1, 128, 128, 3)
        """
        return self._engine.decode(latents, output_type, quantized, decoder)

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels of a picture when nothing else is asked for; assign another to change it.

        Raises:
            ValueError: assigned a size that no picture can have.
        """
        return self._engine.default_size

    @default_size.setter
    def default_size(self, size: tuple[int, int]) -> None:
        self._engine.set_default_size(size)

    def enable_vae_tiling(self, tile_size: int | None = None) -> None:
        """Decode pictures larger than a tile piece by piece, in the memory that one piece takes.

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
    """Import diffusers without PyTorch's compiler, which it asks for one decorator, and which takes a second.

    Where there is no compiler, diffusers uses a decorator that does nothing; only hints for ``torch.compile`` are
    lost. A process that imported either before keeps them as they are.
    """
    with _one_import_at_a_time:
        if _COMPILER in sys.modules or "diffusers.utils.torch_utils" in sys.modules:
            return
        sys.modules[_COMPILER] = None  # type: ignore[assignment]  # Python's way to say that there is none
        try:
            import diffusers.utils.torch_utils  # noqa: F401
        finally:
            sys.modules.pop(_COMPILER, None)
