"""OVStableDiffusionPipeline: text, and a picture where one is wanted, to pictures, on OpenVINO."""

import copy
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers import SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from ov_decidiffusion.checkpoint import DEFAULTS_1_0, DEFAULTS_FILE, read_json
from ov_decidiffusion.images import fit_size, make_image_processor, to_rgb
from ov_decidiffusion.schedulers import check_scheduler, make_scheduler

logger = logging.getLogger(__name__)

INFERENCE_PRECISIONS = ("f32", "bf16", "f16")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_TOKENS = 77
MODELS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


@dataclass
class StableDiffusionOutput(BaseOutput):
    """``images``: PIL pictures, or an array [b, H, W, 3] in 0…1 (np), or a tensor [b, 3, H, W] (pt, latent)."""

    images: list[Image.Image] | np.ndarray | torch.Tensor


@dataclass
class DenoisingStep:
    """One step of ``denoise``. Assign to ``latents`` to go on from other ones."""

    index: int  # from 0
    total: int
    timestep: torch.Tensor
    latents: torch.Tensor  # [b, 4, h, w], after the step


class OVStableDiffusionPipeline:
    """Text-to-image and text-guided image-to-image with an OpenVINO model folder.

    Argument names and meanings are those of diffusers' ``StableDiffusionPipeline`` and
    ``StableDiffusionImg2ImgPipeline``; with the same weights, scheduler and seed the pictures are theirs too.
    Make one with ``from_pretrained``.

    Attributes:
        scheduler: any of diffusers' ``KarrasDiffusionSchedulers``; assign another to change it.
        defaults: the checkpoint's own ``num_inference_steps``, ``guidance_scale`` and ``guidance_rescale``.
        vae_scale_factor: pixels to one latent position, along a side.
        size_factor: pictures' sides are multiples of this.
        default_size: (width, height) in pixels of a picture when nothing else is asked for.
    """

    def __init__(
        self,
        models: dict[str, ov.CompiledModel],
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        unet_config: dict[str, Any],
        vae_config: dict[str, Any],
        defaults: dict[str, Any],
    ):
        self._models = models
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.defaults = defaults
        self.vae_scaling_factor = vae_config["scaling_factor"]
        self.vae_scale_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.latent_channels = unet_config["in_channels"]
        self.size_factor = self.vae_scale_factor * _unet_factor(unet_config)
        side = unet_config["sample_size"] * self.vae_scale_factor
        self.default_size = (side, side)
        self.image_processor = make_image_processor(self.vae_scale_factor)
        self._progress_bar_config: dict[str, Any] = {}
        self._running = threading.Lock()  # a compiled model has one infer request; a demo runs in another thread

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        device: str = "CPU",
        inference_precision: str = "f32",
        cache_dir: str | Path | None = None,
    ) -> "OVStableDiffusionPipeline":
        """Load a folder that ``convert_checkpoint`` made.

        Args:
            model_dir: the OpenVINO model folder.
            device: any OpenVINO device string, such as "CPU", "AUTO" or "GPU.0". CPU is what this project is
                tested on; other devices are written to OpenVINO's documentation and untested.
            inference_precision: what the models compute in, "f32", "bf16" or "f16". OpenVINO's own default picks
                bf16 on processors that have its instructions, even where that is slower.
            cache_dir: where OpenVINO keeps compiled models so that the next start is quicker; None keeps none.

        Raises:
            ValueError: a wrong argument, or a folder that lacks a part; the message names it.
        """
        folder = Path(model_dir).expanduser()
        _check_model_dir(folder)
        if inference_precision not in INFERENCE_PRECISIONS:
            allowed = ", ".join(INFERENCE_PRECISIONS)
            raise ValueError(f"`inference_precision` must be one of {allowed}, got {inference_precision!r}.")
        core = ov.Core()
        _check_device(core, device)
        config = {"INFERENCE_PRECISION_HINT": inference_precision, "PERFORMANCE_HINT": "LATENCY"}
        if cache_dir is not None:
            config["CACHE_DIR"] = str(cache_dir)
        models = {}
        for name in MODELS:
            model = core.read_model(folder / name / "openvino_model.xml")
            if name == "unet":
                _allow_fractional_timesteps(model)
            models[name] = core.compile_model(model, device, config)
        own_scheduler = folder / "ov_scheduler" / "scheduler_config.json"
        scheduler_file = own_scheduler if own_scheduler.is_file() else folder / "scheduler" / "scheduler_config.json"
        defaults_file = folder / DEFAULTS_FILE
        return cls(
            models,
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            make_scheduler(read_json(scheduler_file)),
            read_json(folder / "unet" / "config.json"),
            read_json(folder / "vae_decoder" / "config.json"),
            DEFAULTS_1_0 | (read_json(defaults_file) if defaults_file.is_file() else {}),
        )

    @property
    def scheduler(self) -> SchedulerMixin:
        """The noise schedule and solver in use."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        check_scheduler(scheduler)
        self._scheduler = scheduler

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of the progress bar, as tqdm takes them; ``disable=True`` hides it."""
        self._progress_bar_config = kwargs

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["OVStableDiffusionPipeline", int, torch.Tensor, dict], dict] | None = None,
    ) -> StableDiffusionOutput:
        """Generate pictures.

        Args:
            prompt: what to show; one or a list.
            negative_prompt: what to keep away from; one for all prompts, or a list of the same length. It acts
                through guidance, so ``guidance_scale`` has to be above 1.
            image: a source picture, or one for each prompt, of any size and mode; makes it image-to-image.
            strength: with ``image``, how much of it to redo, above 0 and at most 1: that share of the steps runs.
            num_inference_steps: denoising steps, at least 1; None for the checkpoint's own.
            guidance_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); it is off at
                1 or below; None for the checkpoint's own.
            guidance_rescale: share, 0…1, by which guidance's contrast is pulled back (Lin et al. 2023, arXiv
                2305.08891, section 3.4); None for the checkpoint's own.
            height, width: in pixels, multiples of ``size_factor``. None: the checkpoint's default, or with
                ``image`` its own size, scaled down to the default's area; several must then be of one size.
            num_images_per_prompt: pictures to make of each prompt.
            generator: source of the noise; a list of them, one a picture, makes each picture independent of the
                batch.
            seed: an int makes one generator for the whole batch, a list makes one for each picture; not together
                with ``generator``.
            latents: noise to start from instead of drawn noise, [pictures, 4, height / 8, width / 8]; text-to-image
                only.
            output_type: "pil", "np", "pt" or "latent" (before the decoder).
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": latents})`` after each
                step; if it returns a dictionary, its "latents" are gone on from.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        steps = self.denoise(
            prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            latents=latents,
        )
        for step in steps:
            if callback_on_step_end is not None:
                replaced = callback_on_step_end(self, step.index, step.timestep, {"latents": step.latents})
                step.latents = (replaced or {}).get("latents", step.latents)
        if output_type == "latent":
            return StableDiffusionOutput(images=step.latents)
        return StableDiffusionOutput(images=self.decode_latents(step.latents, output_type))

    def denoise(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        latents: torch.Tensor | None = None,
    ) -> Iterator[DenoisingStep]:
        """The denoising loop, a step at a time; arguments as in the plain call.

        Everything is checked before the first step runs. Stop iterating to stop generating;
        ``decode_latents(step.latents)`` shows how far it is.
        """
        prompts = _check_prompts(prompt)
        negatives = _check_negative_prompts(negative_prompt, len(prompts))
        num_inference_steps = self._or_default("num_inference_steps", num_inference_steps)
        guidance_scale = self._or_default("guidance_scale", guidance_scale)
        guidance_rescale = self._or_default("guidance_rescale", guidance_rescale)
        _check_whole("num_inference_steps", num_inference_steps, 1)
        _check_whole("num_images_per_prompt", num_images_per_prompt, 1)
        _check_range("guidance_rescale", guidance_rescale, 0, 1)
        _check_range("guidance_scale", guidance_scale, 0, None)
        pictures = len(prompts) * num_images_per_prompt
        generator = _make_generator(generator, seed, pictures)
        images = None
        if image is not None:
            _check_range("strength", strength, 0, 1)
            if latents is not None:
                raise ValueError("`latents` starts text-to-image; it cannot be given together with `image`.")
            images = _check_images(image, len(prompts))
        width, height = self._size(width, height, images)
        if latents is not None:
            expected = self._latent_shape(pictures, width, height)
            if tuple(latents.shape) != expected:
                raise ValueError(f"`latents` must have the shape {expected}, got {tuple(latents.shape)}.")
        # A scheduler counts its steps; a copy for each run lets loops interleave.
        scheduler = copy.deepcopy(self.scheduler)
        timesteps = _set_timesteps(scheduler, num_inference_steps, strength if images is not None else None)
        guided = guidance_scale > 1
        return self._denoise(
            prompts, negatives if guided else None, images, (width, height), num_images_per_prompt,
            scheduler, timesteps, guidance_scale, guidance_rescale, generator, latents,
        )  # fmt: skip

    @torch.no_grad()
    def _denoise(
        self,
        prompts: list[str],
        negatives: list[str] | None,
        images: list[Image.Image] | None,
        size: tuple[int, int],
        num_images_per_prompt: int,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        guidance_scale: float,
        guidance_rescale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> Iterator[DenoisingStep]:
        text = self.encode_prompt(prompts).repeat_interleave(num_images_per_prompt, dim=0)
        pictures = len(text)
        if negatives is not None:
            unconditional = self.encode_prompt(negatives).repeat_interleave(num_images_per_prompt, dim=0)
            text = torch.cat([unconditional, text])
        if images is not None:
            clean = self._image_latents(images, size, pictures, generator)
            noise = randn_tensor(clean.shape, generator=generator)
            latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(pictures))
        else:
            if latents is None:
                latents = randn_tensor(self._latent_shape(pictures, *size), generator=generator)
            latents = latents.float() * scheduler.init_noise_sigma
        extra = _extra_step_arguments(scheduler, generator)
        for index, timestep in enumerate(tqdm(timesteps, **{"desc": "denoising", **self._progress_bar_config})):
            batch = torch.cat([latents, latents]) if negatives is not None else latents
            batch = scheduler.scale_model_input(batch, timestep)
            prediction = self.predict(batch, timestep, text)
            if negatives is not None:
                prediction = _guide(prediction, guidance_scale, guidance_rescale)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            step = DenoisingStep(index, len(timesteps), timestep, latents)
            yield step
            latents = step.latents

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """One run of the U-Net: latents [b, 4, h, w], a timestep and hidden states [b, 77, d] in, [b, 4, h, w] out."""
        inputs = {
            "sample": sample.numpy(),
            "timestep": timestep.reshape(1).float().numpy(),
            "encoder_hidden_states": text.numpy(),
        }
        return self._run("unet", inputs)

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Hidden states [prompts, 77, d] of the text encoder; what does not fit into 77 tokens is left out."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        length = min(self.tokenizer.model_max_length, MAX_TOKENS)
        ids = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        for text, full in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(full) > length:
                lost = self.tokenizer.decode(full[length - 1 : -1])
                logger.warning("A prompt holds at most %d tokens; this is left out of %r: %s", length - 2, text, lost)
        return self._run("text_encoder", {"input_ids": ids.input_ids.astype(np.int64)})

    def encode_image(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Scaled latents [b, 4, H / 8, W / 8] of pixels [b, 3, H, W] in -1…1, drawn from the encoder's distribution."""
        moments = self._run("vae_encoder", {"sample": pixels.numpy()})
        if isinstance(generator, list):
            drawn = [DiagonalGaussianDistribution(moments[i : i + 1]).sample(one) for i, one in enumerate(generator)]
            return torch.cat(drawn) * self.vae_scaling_factor
        return DiagonalGaussianDistribution(moments).sample(generator) * self.vae_scaling_factor

    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Pictures of latents [b, 4, h, w], decoded one at a time to keep memory low."""
        scaled = latents / self.vae_scaling_factor
        decoded = [self._run("vae_decoder", {"latent_sample": one[None].numpy()}) for one in scaled]
        return self.image_processor.postprocess(torch.cat(decoded), output_type=output_type)

    def _run(self, name: str, inputs: dict[str, np.ndarray]) -> torch.Tensor:
        with self._running:
            results = self._models[name](inputs, share_inputs=True, share_outputs=False)
            return torch.from_numpy(results[0])

    def _or_default(self, name: str, value: float | None) -> float:
        return self.defaults[name] if value is None else value

    def _latent_shape(self, pictures: int, width: int, height: int) -> tuple[int, int, int, int]:
        return (pictures, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def _size(self, width: int | None, height: int | None, images: list[Image.Image] | None) -> tuple[int, int]:
        own_width, own_height = self.default_size
        if images is not None and (width is None or height is None):
            if len({image.size for image in images}) > 1:
                raise ValueError("`image` holds pictures of different sizes: give `height` and `width`.")
            own_width, own_height = fit_size(*images[0].size, own_width * own_height, self.size_factor)
        width, height = own_width if width is None else width, own_height if height is None else height
        for name, value in (("width", width), ("height", height)):
            _check_whole(name, value, 1)
            if value % self.size_factor:
                below = max(1, value // self.size_factor) * self.size_factor
                raise ValueError(
                    f"`{name}` must be a multiple of {self.size_factor}, got {value}; the nearest are {below} and "
                    f"{below + self.size_factor}."
                )
        return int(width), int(height)

    def _image_latents(
        self,
        images: list[Image.Image],
        size: tuple[int, int],
        pictures: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Latents of the source pictures, one for each picture to make."""
        pixels = self.image_processor.preprocess(images, width=size[0], height=size[1])
        if isinstance(generator, list):  # every picture draws its own
            pixels = pixels.repeat_interleave(pictures // len(pixels), dim=0)
        clean = self.encode_image(pixels, generator)
        return clean.repeat_interleave(pictures // len(clean), dim=0)


def _set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, strength: float | None) -> torch.Tensor:
    """The timesteps to run; in image-to-image, the first ones are left out."""
    scheduler.set_timesteps(num_inference_steps)
    if strength is None:
        return scheduler.timesteps
    steps = scheduler.num_inference_steps
    running = min(int(steps * strength), steps)
    if running < 1:
        raise ValueError(
            f"`strength` {strength} of {steps} steps leaves no step to run: use at least "
            f"{math.ceil(1000 / steps) / 1000}, or take more steps."
        )
    begin = (steps - running) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def _guide(prediction: torch.Tensor, guidance_scale: float, guidance_rescale: float) -> torch.Tensor:
    """Classifier-free guidance on a batch [unconditional, conditional], and its rescaling."""
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale > 0:
        dims = list(range(1, guided.ndim))
        contrast = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guidance_rescale * (guided * contrast) + (1 - guidance_rescale) * guided
    return guided


def _extra_step_arguments(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _unet_factor(config: dict[str, Any]) -> int:
    if "configurations" in config:
        return 2 ** sum(config["configurations"]["add_downsample"])
    return 2 ** (len(config["block_out_channels"]) - 1)


def _check_model_dir(folder: Path) -> None:
    needed = [f"{name}/openvino_model{suffix}" for name in MODELS for suffix in (".xml", ".bin")]
    needed += ["unet/config.json", "vae_decoder/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        what = "does not exist" if not folder.exists() else f"lacks {', '.join(missing)}"
        raise ValueError(f"`model_dir` {folder} {what}: make it with convert_checkpoint.")


def _check_device(core: ov.Core, device: str) -> None:
    available = core.available_devices
    families = {name.split(".")[0] for name in available} | {"AUTO", "MULTI", "HETERO", "BATCH"}
    if device.split(":")[0].split(".")[0] not in families:
        raise ValueError(f"`device` must be AUTO or one of {', '.join(available)} on this machine, got {device!r}.")


def _allow_fractional_timesteps(model: ov.Model) -> None:
    """The folder's U-Net takes whole timesteps, as other tools feed it; some schedulers have fractional ones."""
    timestep = model.input("timestep").get_node()
    timestep.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def _check_prompts(prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
    return list(prompts)


def _check_negative_prompts(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    negatives = _check_prompts(negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"`negative_prompt` has {len(negatives)} entries, but `prompt` has {count}.")
    return negatives


def _check_images(image: Image.Image | list[Image.Image], prompts: int) -> list[Image.Image]:
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) not in (1, prompts):
        raise ValueError(f"`image` must be one picture or one for each of the {prompts} prompts, got {len(images)}.")
    return [to_rgb(one) for one in images]


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def _check_range(name: str, value: Any, low: float, high: float | None) -> None:
    allowed = f"a number of at least {low}" if high is None else f"a number from {low} to {high}"
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not number or not value >= low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def _make_generator(
    generator: torch.Generator | list[torch.Generator] | None, seed: int | list[int] | None, pictures: int
) -> torch.Generator | list[torch.Generator] | None:
    """One generator for the batch, or a list of one a picture; no global seed is touched."""
    if seed is not None:
        if generator is not None:
            raise ValueError("Give `seed` or `generator`, not both.")
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
        for value in seeds:
            _check_whole("seed", value, 0)
        made = [torch.Generator().manual_seed(int(value)) for value in seeds]
        generator = made if isinstance(seed, (list, tuple)) else made[0]
    if isinstance(generator, (list, tuple)) and len(generator) != pictures:
        raise ValueError(
            f"A list of seeds or generators needs one for each of the {pictures} pictures, got {len(generator)}."
        )
    return list(generator) if isinstance(generator, tuple) else generator
