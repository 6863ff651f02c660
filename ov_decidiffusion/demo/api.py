"""The demo's API for programs, typed and documented, with the same limits as the page."""

from typing import Any

import gradio as gr
from PIL import Image

from ov_decidiffusion.demo.events import progress_for_page, refused
from ov_decidiffusion.demo.studio import AUTOMATIC, Studio, arguments_of
from ov_decidiffusion.generation.images import check_masks, to_pictures
from ov_decidiffusion.generation.presets import PRESETS

TEXT_TO_IMAGE = (
    "Makes a picture of a prompt, and returns it with the settings that make it again. A seed of -1 draws one, 0 steps "
    "mean the preset's own number, `solver` is a sampler's name, `size` is written like 512x384."
)
IMAGE_TO_IMAGE = f"{TEXT_TO_IMAGE} It starts from a picture, and `strength` (0 to 1) says how much of it is redone."
INPAINT = f"{IMAGE_TO_IMAGE} Only the white area of the mask is repainted."

STOP = "Stops this client's running call, which then returns the picture so far, and its waiting calls."

# The arguments of every endpoint, in their order, by their names in ``arguments_of``.
WORDS = ("prompt", "negative_prompt")
HOW = ("seed", "steps", "guidance_scale", "preset", "solver", "size")


class Endpoints:
    """The functions that programs call. Their parameters' names are those of the API.

    Args:
        studio: the studio behind the page.
    """

    def __init__(self, studio: Studio):
        self._studio = studio

    def text_to_image(
        self,
        prompt: str,
        negative_prompt: str,
        seed: float,
        num_inference_steps: float,
        guidance_scale: float,
        preset: str,
        solver: str,
        size: str,
        request: gr.Request,
    ):
        how = (seed, num_inference_steps, guidance_scale, preset, solver, size)
        return self._make(request, (prompt, negative_prompt), how)

    def image_to_image(
        self,
        image: Image.Image,
        prompt: str,
        negative_prompt: str,
        strength: float,
        seed: float,
        num_inference_steps: float,
        guidance_scale: float,
        preset: str,
        solver: str,
        size: str,
        request: gr.Request,
    ):
        how = (seed, num_inference_steps, guidance_scale, preset, solver, size)
        if image is None:
            raise refused("`image` is missing: /text_to_image needs none.")
        return self._make(request, (prompt, negative_prompt), how, source=image, strength=strength)

    def inpaint(
        self,
        image: Image.Image,
        mask_image: Image.Image,
        prompt: str,
        negative_prompt: str,
        strength: float,
        seed: float,
        num_inference_steps: float,
        guidance_scale: float,
        preset: str,
        solver: str,
        size: str,
        request: gr.Request,
    ):
        how = (seed, num_inference_steps, guidance_scale, preset, solver, size)
        try:
            mask = check_masks(mask_image, to_pictures(image))[0]
        except ValueError as error:
            raise refused(str(error)) from error
        return self._make(request, (prompt, negative_prompt), how, source=image, mask=mask, strength=strength)

    def stop(self, request: gr.Request) -> None:
        self._studio.queue.stop(request.session_hash)

    def _make(
        self, request: gr.Request, words: tuple[str, str], how: tuple[float, float, float, str, str, str], **source: Any
    ) -> tuple[str, dict[str, Any]]:
        """Make a picture for any of the three; ``words`` and ``how`` have the order of ``WORDS`` and ``HOW``."""
        filled: dict[str, Any] = dict(zip(WORDS, words, strict=True)) | dict(zip(HOW, how, strict=True)) | source
        seed = filled["seed"]
        filled |= {"seed": None if seed is None or seed < 0 else seed, "steps": filled["steps"] or None}
        client = request.session_hash
        try:
            arguments = arguments_of(**filled)
        except ValueError as error:
            raise refused(str(error)) from error
        session = self._studio.sessions.of_program(client)
        run = progress_for_page(self._studio, arguments, client, session)
        saved = [one for progress in run for one in progress.saved]
        if not saved:
            raise refused("Stopped before there was a picture.")
        return str(saved[0].path), saved[0].arguments


def offer_api(studio: Studio) -> None:
    """Add ``/text_to_image``, ``/image_to_image``, ``/inpaint`` and ``/stop``, for ``gradio_client`` and plain HTTP."""
    endpoints = Endpoints(studio)
    with gr.Row(visible=False):
        image = gr.Image(label="image", type="pil", image_mode=None)
        mask_image = gr.Image(label="mask_image", type="pil", image_mode=None)
        words = [gr.Textbox(label="prompt"), gr.Textbox("", label="negative_prompt")]
        strength = gr.Number(0.8, label="strength")
        how = [
            gr.Number(-1, label="seed", precision=0),
            gr.Number(0, label="num_inference_steps", precision=0),
            gr.Number(studio.pipe.defaults["guidance_scale"], label="guidance_scale"),
            gr.Radio(list(PRESETS), value="exact", label="preset"),
            gr.Textbox(AUTOMATIC, label="solver"),
            gr.Textbox(AUTOMATIC, label="size"),
        ]
        made = [gr.Image(label="picture", type="filepath", format="png"), gr.JSON(label="settings")]
    for function, inputs, description in (
        (endpoints.text_to_image, [*words, *how], TEXT_TO_IMAGE),
        (endpoints.image_to_image, [image, *words, strength, *how], IMAGE_TO_IMAGE),
        (endpoints.inpaint, [image, mask_image, *words, strength, *how], INPAINT),
    ):
        gr.Button(visible=False).click(
            function,
            inputs,
            made,
            api_name=function.__name__,
            api_description=description,
            concurrency_limit=None,
        )
    gr.Button(visible=False).click(
        endpoints.stop, api_name="stop", api_description=STOP, queue=False, show_progress="hidden"
    )
