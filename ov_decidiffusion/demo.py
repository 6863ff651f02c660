"""The interactive demo: a Gradio page over the pipeline's public call."""

import random
import re
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.exceptions import ComponentProcessingError
from PIL import Image, ImageDraw
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.presets import PRESETS

MAX_SEED = 2**31 - 1
LICENSE_NOTE = (
    "Pictures of the real DeciDiffusion are not filtered; its weights come with the "
    "[use restrictions](https://huggingface.co/Deci/DeciDiffusion-v1-0#uses) of the CreativeML Open RAIL++-M licence."
)
# The browser itself then refuses to ask any other host for anything.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'self' http://localhost:* http://127.0.0.1:* vscode-webview:"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD = "30mb"
MAX_WAITING = 32  # pictures in the queue


class _StayLocal(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response


class DemoBlocks(gr.Blocks):
    """Gradio's Blocks whose ``launch`` listens on localhost and loads nothing from other hosts by default."""

    def launch(self, **kwargs: Any) -> Any:
        """Gradio's ``launch``; every argument can be given as usual."""
        fonts = ["system-ui", "sans-serif"]
        mono = ["ui-monospace", "monospace"]
        middleware = [Middleware(_StayLocal)]
        if kwargs.get("server_name", "127.0.0.1") in LOOPBACK and not kwargs.get("share"):
            # A page elsewhere whose name was made to point to this machine would send its own name as Host.
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK)))
        defaults = {
            "server_name": "127.0.0.1",
            "share": False,
            "show_error": True,
            "ssr_mode": False,
            "theme": gr.themes.Soft(font=fonts, font_mono=mono),
            "app_kwargs": {"middleware": middleware},
            "max_file_size": MAX_UPLOAD,
            "footer_links": [],
        }
        return super().launch(**(defaults | kwargs))

    async def preprocess_data(self, block_fn: Any, *arguments: Any, **options: Any) -> Any:
        """Gradio's, whose message for what it cannot read tells the server's paths, and whose log is a traceback."""
        try:
            return await super().preprocess_data(block_fn, *arguments, **options)
        except gr.Error as error:  # a refusal in gradio's own words
            error.print_exception = False
            raise
        except ComponentProcessingError as error:
            place = re.search(r"component at index (\d+)", str(error))
            component = block_fn.inputs[int(place[1])] if place else None
            if isinstance(component, gr.Image):
                message = "The source picture cannot be read: choose a PNG, a JPEG or another picture file."
            else:
                message = f"{getattr(component, 'label', None) or 'An input'} has a value that cannot be used."
            raise gr.Error(message, print_exception=False) from None

    def close(self, verbose: bool = True) -> None:
        """Gradio's ``close``; pictures that are being made end at their next step."""
        if getattr(self, "stops", None) is not None:
            self.stops.all = True
        super().close(verbose=verbose)


def example_source(side: int) -> Image.Image:
    """A drawn picture to start image-to-image from: a yellow disc on blue, side x side pixels."""
    picture = Image.new("RGB", (4 * side, 4 * side), (50, 80, 220))
    ImageDraw.Draw(picture).ellipse(
        [int(0.9 * side), int(0.9 * side), int(3.1 * side), int(3.1 * side)], (245, 215, 60)
    )
    return picture.resize((side, side), Image.Resampling.LANCZOS)


class _Stops:
    """Which browser sessions have asked to give up the picture that they wait for."""

    def __init__(self):
        self._sessions: set[str] = set()
        self.all = False  # the demo is being closed

    def want(self, request: gr.Request) -> None:
        self._sessions.add(request.session_hash)

    def forget(self, request: gr.Request) -> None:
        self._sessions.discard(request.session_hash)

    def wanted(self, request: gr.Request) -> bool:
        return self.all or request.session_hash in self._sessions


def make_demo(pipe: OVStableDiffusionPipeline) -> DemoBlocks:
    """Build the page: one tab for text-to-image, one for image-to-image.

    Args:
        pipe: the pipeline to generate with.

    Returns:
        the page; ``launch()`` serves it on localhost, ``close()`` ends it.
    """

    stops = _Stops()

    def text_to_image(
        prompt,
        negative_prompt,
        preset,
        seed,
        steps,
        guidance_scale,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ):
        arguments = _arguments(prompt, negative_prompt, preset, seed, steps, guidance_scale)
        return _generate(pipe, arguments, progress, lambda: stops.wanted(request))

    def image_to_image(
        image,
        prompt,
        negative_prompt,
        strength,
        preset,
        seed,
        steps,
        guidance_scale,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ):
        if image is None:
            raise gr.Error("Choose a source picture first: upload one, or click an example.", print_exception=False)
        arguments = _arguments(prompt, negative_prompt, preset, seed, steps, guidance_scale)
        arguments |= {"image": image, "strength": strength}
        return _generate(pipe, arguments, progress, lambda: stops.wanted(request))

    with DemoBlocks(title="DeciDiffusion on OpenVINO", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(f"# DeciDiffusion on OpenVINO\nWords, or words and a picture, to pictures. {LICENSE_NOTE}")
        with gr.Tab("Text to image"):
            _tab(pipe, text_to_image, stops, None)
        with gr.Tab("Image to image"):
            _tab(pipe, image_to_image, stops, example_source(pipe.default_size[0]))
        demo.unload(stops.want)  # whoever leaves needs no picture
    demo.stops = stops
    return demo.queue(api_open=False, max_size=MAX_WAITING)


def _tab(pipe: OVStableDiffusionPipeline, generate: Callable, stops: _Stops, source: Image.Image | None) -> None:
    """One tab's inputs, buttons, result and examples; with ``source`` it asks for a picture too."""
    examples = pipe.defaults.get("example_prompts", [])
    with gr.Row():
        with gr.Column():
            inputs = []
            if source is not None:
                inputs.append(
                    gr.Image(
                        label="Source picture", type="pil", image_mode=None, sources=["upload", "clipboard"], height=256
                    )
                )
            inputs.append(gr.Textbox(label="Prompt", lines=2, placeholder="What should the picture show?"))
            inputs.append(gr.Textbox(label="Negative prompt", placeholder="What should it keep away from?"))
            if source is not None:
                inputs.append(
                    gr.Slider(0.1, 1, 0.8, step=0.05, label="Strength", info="How much of the source to redo")
                )
            with gr.Row():
                button = gr.Button("Generate", variant="primary", scale=3)
                stop_button = gr.Button("Stop", scale=1)
            with gr.Accordion("Settings", open=True):
                preset = _preset_choice(pipe)
                seed = gr.Number(-1, label="Seed", info="-1 draws one", precision=0, minimum=-1, maximum=MAX_SEED)
                steps = gr.Slider(1, 100, pipe.defaults["num_inference_steps"], step=1, label="Steps")
                guidance = gr.Slider(1, 15, pipe.defaults["guidance_scale"], step=0.5, label="Guidance scale")
            preset.change(
                lambda name: _steps_of(pipe, name), preset, steps, show_progress="hidden", api_visibility="private"
            )
            inputs += [preset, seed, steps, guidance]
        with gr.Column():
            result = gr.Image(
                label="Picture",
                type="pil",
                format="png",
                interactive=False,
                height=512,
                buttons=["download", "fullscreen"],
            )
            used = gr.Markdown()
    # One picture at a time, over both tabs: two at once would only slow each other down.
    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    # First forgotten, then generated: a wish to stop counts for the pictures asked for before it.
    button.click(stops.forget, **at_once).then(
        generate, inputs, [result, used], show_progress_on=result, concurrency_limit=1, concurrency_id="pipeline"
    )
    stop_button.click(stops.want, **at_once)
    if examples:
        rows = [[source, text, negative] if source is not None else [text, negative] for text, negative in examples]
        gr.Examples(rows, inputs[: len(rows[0])], cache_examples=False)


def _preset_choice(pipe: OVStableDiffusionPipeline) -> gr.Radio:
    """The presets that work with what there is."""
    if pipe.quantized_parts:
        return gr.Radio(list(PRESETS), value="exact", label="Preset", info="Faster, a little further from exact")
    hint = "Faster ones need INT8 models: start with --quantize, or call quantize_models"
    return gr.Radio(["exact"], value="exact", label="Preset", info=hint)


def _steps_of(pipe: OVStableDiffusionPipeline, preset: str) -> int:
    """Where the slider goes when a preset is chosen."""
    return PRESETS[preset].get("num_inference_steps") or pipe.defaults["num_inference_steps"]


def _arguments(
    prompt: str, negative_prompt: str, preset: str, seed: float, steps: float, guidance_scale: float
) -> dict[str, Any]:
    if not (prompt or "").strip():
        raise gr.Error("Write a prompt first: what should the picture show?", print_exception=False)
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt or None,
        "preset": preset,
        "seed": random.randint(0, MAX_SEED) if seed is None or seed < 0 else int(seed),
        "num_inference_steps": int(steps),
        "guidance_scale": float(guidance_scale),
    }


def _generate(
    pipe: OVStableDiffusionPipeline, arguments: dict[str, Any], progress: gr.Progress, stopping: Callable[[], bool]
) -> tuple[Any, str]:
    """The picture and what is said of it; where it was stopped, the page keeps the picture that it had."""
    try:
        if stopping():  # while another picture was made
            return gr.skip(), "stopped"
        progress(0, desc="encoding the prompt")
        for step in pipe.denoise(**arguments):
            if stopping():
                return gr.skip(), f"stopped after step {step.index + 1} of {step.total}"
            progress((step.index + 1, step.total + 1), desc="denoising", unit="steps")
        progress((step.total, step.total + 1), desc="decoding", unit="steps")
        picture = pipe.decode_latents(step.latents, quantized=step.quantized)[0]
    except (ValueError, FloatingPointError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    return picture, f"seed {arguments['seed']}"
