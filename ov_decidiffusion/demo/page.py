"""The demo's page: what is on it and where. What happens is in ``demo_events``."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from ov_decidiffusion.demo.editor import picture_editor
from ov_decidiffusion.demo.studio import AUTOMATIC, MAX_PICTURES, Studio
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.generation.webui_text import sampler_name
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.schedulers.registry import SOLVERS
from ov_decidiffusion.web.limits import MAX_SEED, MAX_STEPS

LICENSE_NOTE = (
    "Pictures of the real DeciDiffusion are not filtered; its weights come with the "
    "[use restrictions](https://huggingface.co/Deci/DeciDiffusion-v1-0#uses) of the CreativeML Open RAIL++-M licence."
)
REAL_MODEL = "python -m ov_decidiffusion --checkpoint Deci/DeciDiffusion-v1-0"
PAINT = "#ff2d95"
WELCOME = "Your picture appears here: click an example, or write a prompt, and press Enter."
STORAGE = "ov_decidiffusion"  # the name and the key of what the browser keeps; it holds a token and no secret of ours


@dataclass
class Page:
    """The components that something happens to; those without a value are there once the page is laid out."""

    visitor: gr.BrowserState
    inputs: dict[str, Any] = field(default_factory=dict)  # by the names of ``arguments_of``, and "locked", "editor"
    compared: list[dict[str, Any]] = field(default_factory=list)  # settings of each side
    actions: dict[str, Any] = field(default_factory=dict)  # buttons
    understood: dict[str, gr.Dataset] = field(default_factory=dict)
    examples: gr.Dataset | None = None
    note: gr.Markdown = field(init=False)  # under the buttons: what else the next picture starts from
    source_accordion: gr.Accordion = field(init=False)
    result: gr.Image = field(init=False)
    status: gr.HTML = field(init=False)
    caption: gr.Markdown = field(init=False)
    gallery: gr.Gallery = field(init=False)
    current: gr.State = field(init=False)  # number of the picture shown, in the session
    buttons: gr.Row = field(init=False)  # what to do with the picture shown
    slider: gr.ImageSlider = field(init=False)
    compared_caption: gr.Markdown = field(init=False)
    incoming: gr.File = field(init=False)  # where pasted and dropped files arrive


def make_theme() -> gr.themes.Base:
    """Gradio's soft theme, in colours that are easy to read in light and dark, with no font of another host."""
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(
        block_label_text_color="*primary_700",
        block_label_text_color_dark="white",
        block_title_text_color="*primary_700",
        block_title_text_color_dark="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="*neutral_700",
        button_cancel_background_fill_hover="*neutral_800",
        button_cancel_text_color="white",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_background_fill_selected_dark="*primary_600",
    )


def lay_out(studio: Studio) -> Page:
    """Draw the page."""
    pipe = studio.pipe
    page = Page(gr.BrowserState({"token": None}, storage_key=STORAGE, secret=STORAGE))
    gr.Markdown(header_of(pipe), elem_id="header")
    with gr.Row(equal_height=False, elem_id="columns"):
        with gr.Column(scale=5, min_width=320):
            _draw_prompt(page, pipe)
            _draw_examples(page, pipe)
            _draw_basics(page, studio)
            _draw_words(page, pipe)
            _draw_source(page)
            _draw_more(page, pipe)
        with gr.Column(scale=6, min_width=320, elem_id="stage"):
            with gr.Tab("Picture"):
                _draw_result(page)
            with gr.Tab("Compare"):
                _draw_comparison(page, pipe)
    _draw_foot(page)
    return page


def header_of(pipe: OVStableDiffusionPipeline) -> str:
    """Which model is loaded, and how to load the real one."""
    checkpoint, (width, height) = pipe.origin.get("checkpoint") or "a model folder", pipe.default_size
    facts = f"**{checkpoint}**, {width}x{height} pixels, computing in {pipe.precision}"
    if not pipe.defaults.get("understands"):
        return f"# DeciDiffusion on OpenVINO\n{facts}."
    return (
        f"# DeciDiffusion on OpenVINO\n{facts}: a small model that draws what is listed below, and nothing else. "
        f"The real one draws nearly everything: `{REAL_MODEL}`"
    )


def _draw_prompt(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    examples = pipe.defaults.get("example_prompts") or [["a lighthouse on a cliff", ""]]
    page.inputs["prompt"] = gr.Textbox(
        label="Prompt",
        placeholder=f"What should the picture show? For example: {examples[0][0]}",
        lines=2,
        max_lines=2,
        autofocus=True,
        elem_id="prompt",
    )
    page.inputs["negative_prompt"] = gr.Textbox(
        label="Negative prompt", placeholder="What should it keep away from?", lines=1, max_lines=2, elem_id="negative"
    )
    with gr.Row(elem_id="go"):
        page.actions["generate"] = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        page.actions["stop"] = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=1)
    page.note = gr.Markdown("", elem_id="note")


def _draw_basics(page: Page, studio: Studio) -> None:
    pipe = studio.pipe
    page.inputs["preset"] = _preset_choice(pipe)
    with gr.Row():
        page.inputs["size"] = gr.Dropdown(
            studio.size_choices(),
            value=AUTOMATIC,
            label="Size",
            info=f"Or write your own, in multiples of {pipe.size_factor}; automatic takes the source's shape",
            allow_custom_value=True,
            min_width=230,
            elem_id="size",
        )
        page.inputs["pictures"] = gr.Slider(
            1, MAX_PICTURES, 1, step=1, label="Pictures", info="Each from a seed of its own", min_width=230
        )
    with gr.Row(equal_height=True):
        page.inputs["seed"] = gr.Number(
            0,
            label="Seed",
            info="The same one makes the same picture",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            elem_id="seed",
        )
        with gr.Column(min_width=150):
            page.inputs["locked"] = gr.Checkbox(
                False, label="Keep this seed", info="Else each picture gets a new one", elem_id="lock"
            )
            page.actions["dice"] = gr.Button("Draw a seed", size="sm", elem_id="dice")


def _draw_examples(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    prompt, negative = page.inputs["prompt"], page.inputs["negative_prompt"]
    if examples := pipe.defaults.get("example_prompts"):
        page.examples = gr.Dataset(
            components=[prompt, negative],
            samples=[list(example) for example in examples],
            sample_labels=[text for text, _ in examples],
            label="Examples",
            elem_id="examples",
        )


def _draw_words(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    """What a small model knows, to be clicked."""
    prompt = page.inputs["prompt"]
    for kind, words in (pipe.defaults.get("understands") or {}).items():
        with gr.Accordion(f"What it understands: {kind}", open=False):
            page.understood[kind] = gr.Dataset(
                components=[prompt],
                samples=[[word] for word in words],
                sample_labels=list(words),
                samples_per_page=100,
                label=kind,
                show_label=False,
                elem_classes="words",
            )


def _draw_source(page: Page) -> None:
    with gr.Accordion("Start from a picture", open=False, elem_id="source") as page.source_accordion:
        page.inputs["editor"] = picture_editor(
            label="Source picture",
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=("upload", "webcam", "clipboard"),
            brush=gr.Brush(colors=[PAINT], default_color=PAINT, color_mode="fixed"),
            eraser=gr.Eraser(),
            layers=False,
            transforms=(),
            height=380,
            placeholder="Choose a picture.",
            elem_id="editor",
        )
        gr.Markdown("Drop or paste a picture, or take one with the camera. Paint on it what is to be made anew.")
        with gr.Row():
            page.inputs["strength"] = gr.Slider(
                0.05, 1, 0.8, step=0.05, label="Strength", info="How much of the source, or of what is painted, to redo"
            )
            page.actions["example_source"] = gr.Button("Use an example", size="sm", scale=0, min_width=140)
            page.actions["no_source"] = gr.Button("Remove", size="sm", scale=0, min_width=90)


def steps_of(pipe: OVStableDiffusionPipeline, preset: str) -> int:
    """How many steps a preset takes, where nobody says otherwise."""
    return PRESETS[preset].get("num_inference_steps") or pipe.defaults["num_inference_steps"]


def _draw_more(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    with gr.Accordion("More settings", open=False, elem_id="more"):
        if not pipe.quantized_parts:
            gr.Markdown("Faster presets need INT8 models: start the demo with `--quantize`.")
        page.inputs["steps"] = gr.Slider(
            1,
            MAX_STEPS,
            pipe.defaults["num_inference_steps"],
            step=1,
            label="Steps",
            info="More take longer, and help less and less",
        )
        page.inputs["guidance_scale"] = gr.Slider(
            1,
            15,
            pipe.defaults["guidance_scale"],
            step=0.5,
            label="Guidance scale",
            info="How closely to follow the prompt; at 1 the negative prompt does nothing",
        )
        page.inputs["solver"] = _solver_choice("Sampler", "The way from noise to picture; the preset has its own")


def _draw_result(page: Page) -> None:
    page.status = gr.HTML(status_text("Ready."), elem_id="status", padding=False)
    page.result = gr.Image(
        label="Picture",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="result",
        alt_text="no picture yet",
        placeholder="Your picture appears here.",
    )
    page.caption = gr.Markdown(WELCOME, elem_id="caption")
    page.current = gr.State(None)
    with gr.Row(visible=False, elem_id="actions") as page.buttons:
        page.actions["download"] = gr.DownloadButton("Download", size="sm", elem_id="download", min_width=90)
        page.actions["reuse"] = gr.Button("Use these settings", size="sm", min_width=130)
        page.actions["reseed"] = gr.Button("Use its seed", size="sm", min_width=100)
        page.actions["resource"] = gr.Button("Start from it", size="sm", min_width=100)
        page.actions["vary"] = gr.Button("Vary", size="sm", min_width=70)
    page.gallery = gr.Gallery(
        label="Pictures of this session",
        show_label=False,
        columns=6,
        fit_columns=False,
        height="auto",
        allow_preview=False,
        object_fit="contain",
        format="png",
        buttons=[],
        interactive=False,
        elem_id="gallery",
        visible=False,
    )


def _draw_comparison(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    gr.Markdown("One prompt and one seed through two settings. Prompt, size and seed are those of the form.")
    with gr.Row():
        # Beside exact stands the fastest preset, or where there is one preset only another sampler.
        other = ("B", "fast", AUTOMATIC) if pipe.quantized_parts else ("B", "exact", "euler a")
        for side, preset, solver in (("A", "exact", AUTOMATIC), other):
            with gr.Column(min_width=150):
                page.compared.append(
                    {
                        "preset": _preset_choice(pipe, f"Preset {side}", preset),
                        "steps": gr.Slider(1, MAX_STEPS, steps_of(pipe, preset), step=1, label=f"Steps {side}"),
                        "guidance_scale": gr.Slider(
                            1, 15, pipe.defaults["guidance_scale"], step=0.5, label=f"Guidance scale {side}"
                        ),
                        "solver": _solver_choice(f"Sampler {side}", None, solver),
                    }
                )
    page.actions["compare"] = gr.Button("Compare", variant="primary", elem_id="compare")
    page.compared_caption = gr.Markdown("", elem_id="compared")
    page.slider = gr.ImageSlider(
        label="A on the left, B on the right",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        elem_id="slider",
        buttons=["fullscreen"],
        visible=False,
    )


def _draw_foot(page: Page) -> None:
    page.incoming = gr.File(label="Pasted or dropped", elem_id="incoming", file_types=["image"], type="filepath")
    gr.Markdown(
        "A picture that was made here, dropped anywhere on this page, fills its settings in; any other becomes the "
        f"source. So does one that is pasted. Enter and Ctrl+Enter generate. {LICENSE_NOTE}",
        elem_id="foot",
    )


def _preset_choice(pipe: OVStableDiffusionPipeline, label: str = "Preset", value: str = "exact") -> gr.Radio:
    """The presets that work with what there is."""
    if pipe.quantized_parts:
        return gr.Radio(list(PRESETS), value=value, label=label, info="Faster, a little further from exact")
    return gr.Radio(["exact"], value="exact", label=label, visible=False)


def _solver_choice(label: str, info: str | None, value: str = AUTOMATIC) -> gr.Dropdown:
    choices = [("automatic", AUTOMATIC), *((sampler_name(name), name) for name in SOLVERS)]
    return gr.Dropdown(choices, value=value, label=label, info=info)


def status_text(text: str) -> str:
    """What is going on, for eyes and for screen readers."""
    return f'<p role="status" aria-live="polite">{text}</p>'


def example_source(side: int) -> Image.Image:
    """A drawn picture to start image-to-image from, side x side pixels: a red house in a meadow, under the sun."""
    unit = side / 32  # drawn four times as large, on a grid of 128
    picture = Image.new("RGB", (4 * side, 4 * side), (120, 190, 245))
    draw = ImageDraw.Draw(picture)

    def at(*numbers: float) -> list[float]:
        return [number * unit for number in numbers]

    draw.ellipse(at(92, 14, 112, 34), (250, 215, 70))
    draw.ellipse(at(-60, 70, 100, 220), (70, 160, 75))
    draw.ellipse(at(30, 82, 220, 260), (95, 185, 85))
    draw.rectangle(at(36, 58, 84, 100), (205, 70, 60))
    draw.polygon(at(28, 60, 60, 32, 92, 60), (110, 60, 50))
    draw.rectangle(at(54, 78, 66, 100), (90, 55, 45))
    for left in (41, 70):
        draw.rectangle(at(left, 66, left + 9, 75), (250, 235, 170))
    return picture.resize((side, side), Image.Resampling.LANCZOS)
