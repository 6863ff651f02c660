"""The demo's page: what is on it and where. Its events are in ``events``."""

import base64
import html
import json
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
from ov_decidiffusion.web.limits import MAX_STEPS
from ov_decidiffusion.web.uploads import open_picture

LICENSE_NOTE = (
    "Pictures of the real DeciDiffusion are not filtered. Its weights come with the "
    "[use restrictions](https://huggingface.co/Deci/DeciDiffusion-v1-0#uses) of the CreativeML Open RAIL++-M licence."
)
REAL_MODEL = "ov-decidiffusion demo --checkpoint Deci/DeciDiffusion-v1-0"
PAINT = "#ff2d95"
STORAGE = "ov_decidiffusion"  # name and key of the browser storage, which holds a token and no secrets of the server
QUALITIES = {"exact": "Best", "balanced": "Balanced", "fast": "Fast"}  # presets, as the page names them
SMALL_WORDS = ["a", "an", "and", "at", "break", "in", "large", "of", "on", "small", "the", "with"]  # need no hint


@dataclass
class Page:
    """The components that events use; those without a default are set by ``lay_out``."""

    visitor: gr.BrowserState
    kept: gr.BrowserState  # the fields' values, which survive a reload
    inputs: dict[str, Any] = field(default_factory=dict)  # by the names of ``arguments_of``, and "locked", "editor"
    compared: list[dict[str, Any]] = field(default_factory=list)  # the settings of each side
    actions: dict[str, Any] = field(default_factory=dict)  # buttons
    known_words: dict[str, gr.Dataset] = field(default_factory=dict)
    showcase: list[tuple[Image.Image, str, int]] = field(default_factory=list)  # picture, prompt, seed; the large first
    tiles: gr.Gallery | None = None  # the showcase without the large one
    examples: gr.Dataset | None = None  # prompts, if there is no showcase
    note: gr.Markdown = field(init=False)  # under the prompt: says when the next picture starts from a source
    offer: gr.Row = field(init=False)  # the offer to make INT8 models
    offer_text: gr.Markdown = field(init=False)
    size_hint: gr.Markdown = field(init=False)
    source_panel: gr.Accordion = field(init=False)
    compare_panel: gr.Accordion = field(init=False)
    result: gr.Image = field(init=False)
    status: gr.HTML = field(init=False)
    caption: gr.HTML = field(init=False)
    gallery: gr.Gallery = field(init=False)
    gallery_column: gr.Column = field(init=False)
    current: gr.State = field(init=False)  # id of the picture shown
    listed: gr.State = field(init=False)  # ids of the pictures in this page's gallery
    large_size: gr.State = field(init=False)  # a large size that the visitor was warned of
    buttons: gr.Row = field(init=False)  # the buttons for the picture shown
    slider: gr.ImageSlider = field(init=False)
    incoming: gr.File = field(init=False)  # where pasted and dropped files arrive


def make_theme() -> gr.themes.Base:
    """One accent colour and grey, in light and dark; contrasts of 3:1 for edges of controls and 4.5:1 for text.

    No font is loaded from another host.
    """
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    edge, edge_dark = "#7d859e", "#7a83a6"
    colours = {
        "body_background_fill": ("#f3f4f9", "#0e1120"),
        "body_text_color": ("#171a2b", "#eef0fa"),
        "body_text_color_subdued": ("#545b75", "#a9b0cc"),
        "background_fill_primary": ("#ffffff", "#181c30"),
        "background_fill_secondary": ("#f3f4f9", "#12162a"),
        "block_background_fill": ("#ffffff", "#181c30"),
        "block_border_color": ("#c9cede", "#333a58"),
        "block_label_text_color": ("#171a2b", "#eef0fa"),
        "block_title_text_color": ("#171a2b", "#eef0fa"),
        "block_info_text_color": ("#545b75", "#a9b0cc"),
        "border_color_primary": (edge, edge_dark),
        "input_background_fill": ("#ffffff", "#12162a"),
        "input_border_color": (edge, edge_dark),
        "input_placeholder_color": ("#545b75", "#a9b0cc"),
        "checkbox_border_color": (edge, edge_dark),
        "checkbox_label_background_fill": ("#ffffff", "#181c30"),
        "checkbox_label_background_fill_selected": ("#eceafd", "#2b2f57"),
        "checkbox_label_text_color_selected": ("#4338ca", "#c7c3ff"),
        "checkbox_label_border_color": (edge, edge_dark),
        "checkbox_background_color_selected": ("#4338ca", "#6d64ff"),
        "button_primary_background_fill": ("#4338ca", "#8b84ff"),
        "button_primary_background_fill_hover": ("#3730a3", "#a5a0ff"),
        "button_primary_text_color": ("#ffffff", "#0e1120"),
        "button_secondary_background_fill": ("#ffffff", "#181c30"),
        "button_secondary_background_fill_hover": ("#eceafd", "#232746"),
        "button_secondary_border_color": (edge, edge_dark),
        "button_secondary_text_color": ("#171a2b", "#eef0fa"),
        "button_cancel_background_fill": ("#b42318", "#f97066"),
        "button_cancel_background_fill_hover": ("#912018", "#fda29b"),
        "button_cancel_text_color": ("#ffffff", "#0e1120"),
        "link_text_color": ("#4338ca", "#b3aeff"),
        "link_text_color_hover": ("#3730a3", "#d0cdff"),
        "link_text_color_visited": ("#4338ca", "#b3aeff"),
        "color_accent": ("#4338ca", None),
        "color_accent_soft": ("#eceafd", "#2b2f57"),
        "slider_color": ("#4338ca", "#8b84ff"),
    }
    values = {}
    for name, (light, dark) in colours.items():
        values |= {name: light} | ({} if dark is None else {f"{name}_dark": dark})
    return theme.set(**values, input_border_width="1px", block_border_width="1px")


def lay_out(studio: Studio) -> Page:
    """Lay out the page."""
    pipe = studio.pipe
    page = Page(
        gr.BrowserState({"token": None}, storage_key=STORAGE, secret=STORAGE),
        gr.BrowserState({}, storage_key=f"{STORAGE} fields", secret=STORAGE),
        showcase=_showcase_of(pipe),
    )
    with gr.Row(elem_id="head"):
        gr.HTML("<h1>DeciDiffusion</h1><p>Type a scene and watch it appear.</p>", elem_id="title", padding=False)
        page.actions["theme"] = gr.Button("Dark", size="sm", scale=0, min_width=70, elem_id="theme")
    _draw_prompt(page, pipe)
    with gr.Column(elem_id="panels"):
        _draw_qualities(page, pipe)
        _draw_options(page, studio)
        _draw_source(page)
        _draw_comparison(page, pipe)
        _draw_words(page, pipe)
        _draw_about(pipe)
    with gr.Row(equal_height=False, elem_id="stage"):
        with gr.Column(scale=17, min_width=300, elem_id="card"):
            _draw_result(page, pipe)
        with gr.Column(scale=10, min_width=300, elem_id="beside"):
            _draw_beside(page, studio)
    page.incoming = gr.File(label="Pasted or dropped", elem_id="incoming", file_types=["image"], type="filepath")
    return page


def knows_words(pipe: OVStableDiffusionPipeline) -> bool:
    """Whether this is a small model, which knows only some words."""
    return bool(pipe.defaults.get("understands"))


def _showcase_of(pipe: OVStableDiffusionPipeline) -> list[tuple[Image.Image, str, int]]:
    """The checkpoint's own showcase pictures; they are checked like uploaded ones."""
    shown = []
    for one in (pipe.defaults.get("showcase") or [])[:7]:
        picture = open_picture(base64.b64decode(one["webp"]))
        shown.append((picture.convert("RGB"), one["prompt"], one["seed"]))
    return shown


def _draw_prompt(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    first = page.showcase[0][1] if page.showcase else pipe.defaults["example_prompts"][0][0]
    with gr.Row(elem_id="ask"):
        page.inputs["prompt"] = gr.Textbox(
            label="Prompt",
            show_label=False,
            container=False,
            placeholder=f"For example: {first}",
            lines=1,
            max_lines=3,
            autofocus=True,
            scale=10,
            elem_id="prompt",
        )
        if knows_words(pipe):
            page.actions["surprise"] = gr.Button("Surprise me", scale=0, min_width=130, elem_id="surprise")
        page.actions["generate"] = gr.Button("Generate", variant="primary", elem_id="generate", scale=0, min_width=130)
        page.actions["stop"] = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=0, min_width=90)
    known = pipe.defaults.get("understands") or {}
    data = html.escape(json.dumps({"phrases": [*sum(known.values(), [])], "small": SMALL_WORDS}))
    gr.HTML(f'<div id="known" data-words="{data}" aria-live="polite"></div>', elem_id="hints", padding=False)
    page.note = gr.Markdown("", elem_id="note")


def _draw_qualities(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    page.inputs["preset"] = _quality_choice("Quality or speed", "exact", elem_id="quality", container=False)
    with gr.Row(visible=False, elem_id="offer") as page.offer:
        page.offer_text = gr.Markdown("")
        page.actions["int8"] = gr.Button("Make them now", size="sm", scale=0, min_width=140, elem_id="int8")


def _draw_options(page: Page, studio: Studio) -> None:
    pipe = studio.pipe
    with gr.Accordion("Options", open=False, elem_id="options", elem_classes="panel"):
        page.inputs["negative_prompt"] = gr.Textbox(
            label="Negative prompt",
            placeholder="Anything to avoid? For example: clouds",
            lines=1,
            max_lines=2,
            elem_id="negative",
        )
        with gr.Row():
            with gr.Column(min_width=220):
                page.inputs["size"] = gr.Dropdown(
                    studio.size_choices(),
                    value=AUTOMATIC,
                    label="Size",
                    info=f"Pick one, or type for example {pipe.default_size[0]}x{pipe.default_size[1] // 2}",
                    allow_custom_value=True,
                    elem_id="size",
                )
                page.size_hint = gr.Markdown("", elem_id="size-hint")
            page.inputs["pictures"] = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Number of pictures", min_width=220)
        with gr.Row(equal_height=True):
            page.inputs["seed"] = gr.Number(
                0, label="Seed", info="The same seed makes the same picture", precision=0, elem_id="seed"
            )
            with gr.Column(min_width=160):
                page.inputs["locked"] = gr.Checkbox(
                    False, label="Lock seed", info="Unlocked: a new one each time", elem_id="lock"
                )
                page.actions["dice"] = gr.Button("Random seed", size="sm", elem_id="dice")
        with gr.Row():
            page.inputs["steps"] = gr.Slider(
                1,
                MAX_STEPS,
                pipe.defaults["num_inference_steps"],
                step=1,
                label="Steps",
                info="More take longer, with diminishing returns",
                min_width=220,
            )
            page.inputs["guidance_scale"] = gr.Slider(
                1,
                15,
                pipe.defaults["guidance_scale"],
                step=0.5,
                label="Guidance scale",
                info="How closely to follow the prompt; at 1 the negative prompt has no effect",
                min_width=220,
            )
            page.inputs["solver"] = _solver_choice("Sampler", "The preset has its own")


def _draw_source(page: Page) -> None:
    with gr.Accordion("Start from a picture", open=False, elem_id="source", elem_classes="panel") as page.source_panel:
        gr.Markdown(
            "Drop or paste a picture: one that was made here restores its settings, any other becomes the starting "
            "point. Paint over the part that you want to change."
        )
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
        with gr.Row():
            page.inputs["strength"] = gr.Slider(0.05, 1, 0.8, step=0.05, label="How much to change")
            page.actions["example_source"] = gr.Button("Use an example", size="sm", scale=0, min_width=140)
            page.actions["no_source"] = gr.Button("Remove", size="sm", scale=0, min_width=90)


def steps_of(pipe: OVStableDiffusionPipeline, preset: str) -> int:
    """The default number of steps of a preset."""
    return PRESETS[preset].get("num_inference_steps") or pipe.defaults["num_inference_steps"]


def _draw_comparison(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    with gr.Accordion("Compare", open=False, elem_id="comparison", elem_classes="panel") as page.compare_panel:
        gr.Markdown("Same prompt, same seed, two settings.")
        # Compare the best with the fastest preset, or with another sampler if the INT8 models are missing.
        other = ("B", "fast", AUTOMATIC) if pipe.quantized_parts else ("B", "exact", "euler a")
        for side, preset, solver in (("A", "exact", AUTOMATIC), other):
            with gr.Row():
                page.compared.append(
                    {
                        "preset": _quality_choice(f"Quality {side}", preset, min_width=250),
                        "steps": gr.Slider(
                            1, MAX_STEPS, steps_of(pipe, preset), step=1, label=f"Steps {side}", min_width=160
                        ),
                        "guidance_scale": gr.Slider(
                            1,
                            15,
                            pipe.defaults["guidance_scale"],
                            step=0.5,
                            label=f"Guidance scale {side}",
                            min_width=160,
                        ),
                        "solver": _solver_choice(f"Sampler {side}", None, solver),
                    }
                )
        page.actions["compare"] = gr.Button("Compare A with B", variant="primary", elem_id="compare")


def _draw_words(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    """The words that a small model knows, to be clicked."""
    known = pipe.defaults.get("understands") or {}
    if not known:
        return
    things, places = len(known.get("objects") or []), len(known.get("places") or [])
    with gr.Accordion(f"{things} things in {places} places", open=False, elem_id="words", elem_classes="panel"):
        gr.Markdown("This small model draws these, and nothing else. Click one to put it into the prompt.")
        for kind, words in known.items():
            page.known_words[kind] = gr.Dataset(
                components=[page.inputs["prompt"]],
                samples=[[word] for word in words],
                sample_labels=list(words),
                samples_per_page=100,
                label=kind.capitalize(),
                elem_classes="words",
            )


def _draw_about(pipe: OVStableDiffusionPipeline) -> None:
    checkpoint, (width, height) = pipe.origin.get("checkpoint") or "a model folder", pipe.default_size
    told = f"**{checkpoint}** draws at {width}x{height} pixels and computes in {pipe.precision} here."
    if knows_words(pipe):
        told += f" The real DeciDiffusion draws nearly everything at 512x512: start it with `{REAL_MODEL}`."
    with gr.Accordion("About this model", open=False, elem_id="about", elem_classes="panel"):
        gr.Markdown(f"{told}\n\nSaved pictures carry their prompt and settings. {LICENSE_NOTE}")


def _draw_result(page: Page, pipe: OVStableDiffusionPipeline) -> None:
    first, prompt, seed = page.showcase[0] if page.showcase else (None, "", 0)
    page.result = gr.Image(
        first,
        label="Picture",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="result",
        alt_text=prompt or "no picture yet",
        placeholder="Your picture appears here.",
    )
    page.slider = gr.ImageSlider(
        label="A on the left, B on the right",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        elem_id="slider",
        max_height=400,
        buttons=["fullscreen"],
        visible=False,
    )
    with gr.Column(elem_id="under"):
        with gr.Row(elem_id="told"):
            told = caption_html(prompt, f"drawn by this model, seed {seed}") if first else caption_html("", "")
            page.caption = gr.HTML(told, elem_id="caption", padding=False)
            page.status = gr.HTML(status_text("Ready."), elem_id="status", padding=False)
        page.current, page.listed, page.large_size = gr.State(None), gr.State([]), gr.State(None)
        with gr.Row(visible=False, elem_id="actions") as page.buttons:
            for name, label in (
                ("vary", "Vary"),
                ("resource", "Edit"),
                ("film", "Film"),
                ("reuse", "Reuse settings"),
                ("reseed", "Reuse seed"),
            ):
                page.actions[name] = gr.Button(label, size="sm", min_width=60, elem_id=name)
            page.actions["download"] = gr.DownloadButton("Download", size="sm", elem_id="download", min_width=60)


def _draw_beside(page: Page, studio: Studio) -> None:
    pipe = studio.pipe
    if page.showcase[1:]:
        gr.HTML("<h2>Try one</h2>", padding=False)
        page.tiles = gr.Gallery(
            [(picture, prompt) for picture, prompt, _ in page.showcase[1:]],
            label="Try one",
            elem_id="tiles",
            **_GALLERY,
        )
    elif examples := pipe.defaults.get("example_prompts"):
        page.examples = gr.Dataset(
            components=[page.inputs["prompt"], page.inputs["negative_prompt"]],
            samples=[list(example) for example in examples[:3]],
            sample_labels=[text for text, _ in examples[:3]],
            label="Try one",
            elem_id="examples",
        )
    with gr.Column(visible=False, elem_id="mine") as page.gallery_column:
        with gr.Row():
            gr.HTML("<h2>Your pictures</h2>", padding=False)
            page.actions["download_all"] = gr.Button("Download all", size="sm", scale=0, min_width=110)
            page.actions["archive"] = gr.DownloadButton("All", elem_id="archive")
        page.gallery = gr.Gallery(label="Your pictures", elem_id="gallery", **_GALLERY)
        if studio.outputs is not None:
            gr.Markdown(f"Kept in `{studio.outputs}`.", elem_id="outputs")


_GALLERY: dict[str, Any] = {
    "show_label": False,
    "columns": 3,
    "fit_columns": False,
    "height": "auto",
    "allow_preview": False,
    "object_fit": "cover",
    "format": "png",
    "buttons": [],
    "interactive": False,
}


def _quality_choice(label: str, value: str, **options: Any) -> gr.Radio:
    return gr.Radio([(name, preset) for preset, name in QUALITIES.items()], value=value, label=label, **options)


def _solver_choice(label: str, info: str | None, value: str = AUTOMATIC) -> gr.Dropdown:
    choices = [("Automatic", AUTOMATIC), *((sampler_name(name), name) for name in SOLVERS)]
    return gr.Dropdown(choices, value=value, label=label, info=info, min_width=160)


def status_text(text: str, share: float | None = None) -> str:
    """HTML for the status, which screen readers announce, with a progress bar for the share that is done."""
    bar = "" if share is None else f'<progress value="{share:.2f}" aria-hidden="true"></progress>'
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>{bar}'


def caption_html(prompt: str, details: str) -> str:
    """HTML for a picture's prompt, which the page cuts off if it is long, and for further details."""
    safe = html.escape(prompt)
    return f'<p title="{safe}">{safe} <small>{html.escape(details)}</small></p>'


def example_source(side: int) -> Image.Image:
    """A drawn source for image-to-image, side x side pixels: a red house in a meadow, under the sun."""
    unit = side / 32  # drawn at four times the size, on a grid of 128
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
