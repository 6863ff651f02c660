"""The demo as an interface for programs: the same limits as the page, typed and documented."""

from typing import Any

import gradio as gr

from ov_decidiffusion.demo_events import refused, seen_by_visitor
from ov_decidiffusion.presets import PRESETS
from ov_decidiffusion.studio import AS_USUAL, Studio, arguments_of

TEXT_TO_IMAGE = (
    "A picture of a prompt, and the settings that make it again. `size` is written like 512x384, `solver` is a "
    "sampler's name, `seed` None draws one."
)
IMAGE_TO_IMAGE = f"{TEXT_TO_IMAGE} It starts from a picture, of which `strength` (0 to 1) is redone."
INPAINT = f"{IMAGE_TO_IMAGE} Only what is white in the mask is made anew."


def offer_api(studio: Studio) -> None:
    """The page as an interface for programs: the same limits, typed and documented."""
    with gr.Row(visible=False):
        prompt = gr.Textbox(label="prompt")
        negative = gr.Textbox(label="negative_prompt")
        numbers = {
            "seed": gr.Number(None, label="seed", precision=0),
            "steps": gr.Number(None, label="num_inference_steps", precision=0),
            "guidance_scale": gr.Number(None, label="guidance_scale"),
        }
        words = {
            "preset": gr.Radio(list(PRESETS), value="exact", label="preset"),
            "solver": gr.Textbox(AS_USUAL, label="solver"),
            "size": gr.Textbox(AS_USUAL, label="size"),
        }
        source = gr.Image(label="image", type="pil", image_mode=None)
        mask = gr.Image(label="mask_image", type="pil", image_mode=None)
        strength = gr.Number(0.8, label="strength")
        made = gr.Image(label="picture", type="filepath", format="png")
        settings = gr.JSON(label="settings")

    settings_of_all = numbers | words

    def offer(name: str, description: str, fields: dict[str, Any]) -> None:
        def call(*values: Any, request: gr.Request):
            given = dict(zip(fields, values, strict=True))
            try:
                arguments = arguments_of(**given)
            except ValueError as error:
                raise refused(str(error)) from error
            _, sitting = studio.sittings.of(request.session_hash)
            kept = [
                one for seen in seen_by_visitor(studio, arguments, request.session_hash, sitting) for one in seen.kept
            ]
            if not kept:
                raise refused("Stopped before there was a picture.")
            return str(kept[0].path), kept[0].arguments

        gr.Button(visible=False).click(
            call,
            list(fields.values()),
            [made, settings],
            api_name=name,
            api_description=description,
            concurrency_limit=None,
        )

    text = {"prompt": prompt, "negative_prompt": negative}
    offer("text_to_image", TEXT_TO_IMAGE, text | settings_of_all)
    offer("image_to_image", IMAGE_TO_IMAGE, {"source": source} | text | {"strength": strength} | settings_of_all)
    offer("inpaint", INPAINT, {"source": source, "mask": mask} | text | {"strength": strength} | settings_of_all)
