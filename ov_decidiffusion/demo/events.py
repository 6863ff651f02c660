"""What happens on the demo's page: each function wires a part of it."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageColor

from ov_decidiffusion.demo.page import PAINT, Page, example_source, status_text, steps_of
from ov_decidiffusion.demo.sessions import SavedImage, Session
from ov_decidiffusion.demo.studio import (
    Progress,
    Studio,
    arguments_of,
    form_values_of,
    is_blank,
    layer_of,
    mask_of,
    seed_of,
)
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.generation.images import to_rgb
from ov_decidiffusion.generation.metadata import NoSettingsError, settings_of
from ov_decidiffusion.web.limits import MAX_SEED
from ov_decidiffusion.web.queue import QueueIsFull
from ov_decidiffusion.web.uploads import open_picture

logger = logging.getLogger(__name__)

AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
STOP = "Stops what this client has running, which ends in the picture so far, and what it has waiting."
NOTE = """(editor) => editor?.background
    ? "Starts from the source picture below, as far as its strength says." : "" """
IN_TURN = AT_ONCE | {"queue": True, "concurrency_limit": None}  # only what gradio queues can say something on the page


def refused(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def progress_for_page(
    studio: Studio, arguments: dict[str, Any], client: str | None, session: Session
) -> Iterator[Progress]:
    """A run for the page: what is wrong is told there, in words."""
    try:
        yield from studio.make(arguments, client, session)
    except ModelDirError as error:
        logger.error("%s", error)
        raise refused("The models cannot be used here: whoever started the demo sees why.") from error
    except (ValueError, FloatingPointError) as error:
        raise refused(str(error)) from error
    except QueueIsFull as error:
        raise refused("Too many are waiting already: try again in a minute.") from error
    except Exception as error:  # neither a path nor a traceback for the page
        logger.exception("a picture could not be made")
        raise refused(f"The picture could not be made ({type(error).__name__}).") from error


def _pipeline_arguments(filled: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments from the page's fields; ``editor`` is the source with what was painted on it."""
    editor = filled.pop("editor", None) or {}
    source = editor.get("background")
    if source is not None and is_blank(source):  # the editor's empty canvas
        source = None
    mask = None if source is None else mask_of(editor.get("layers") or [])
    try:
        return arguments_of(source=source, mask=mask, **filled)
    except ValueError as error:
        raise refused(str(error)) from error


def _session_of(studio: Studio, visitor: dict[str, Any] | None) -> tuple[str, Session]:
    """The session of what a browser keeps, and its token; a new one where it keeps nothing, or nothing known."""
    return studio.sessions.of((visitor or {}).get("token"))


def wire_arrival(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    """A visitor comes, or comes back after a reload."""

    def arrive(visitor: dict[str, Any] | None):
        token, session = _session_of(studio, visitor)
        return {"token": token}, *_shown(session, 0 if session.pictures else None)

    demo.load(arrive, page.visitor, [page.visitor, *_showing(page)], **AT_ONCE)


def _showing(page: Page) -> list[Any]:
    """What ``_shown`` has values for."""
    return [page.result, page.caption, page.gallery, page.current, page.buttons, page.actions["download"]]


def _shown(session: Session, number: int | None, several: tuple[Image.Image, str, int] | None = None) -> list[Any]:
    """One picture of a session on the stage, with the gallery below.

    Args:
        number: in the session; None where there is none.
        several: pictures of one prompt as one, and their number, to show in its place until one is chosen.
    """
    gallery = [(str(one.path), one.caption) for one in session.pictures]
    if number is None or number >= len(session.pictures):
        return [
            gr.skip(),
            gr.skip(),
            gr.Gallery(gallery, visible=bool(gallery)),
            None,
            gr.Row(visible=False),
            gr.skip(),
        ]
    if several is not None:
        picture, prompt, count = several
        shown = gr.Gallery(gallery, visible=True, selected_index=None)
        told = f"{count} pictures of “{prompt}”: choose one below."
        return [
            gr.Image(picture, alt_text=f"{count} pictures: {prompt}"),
            told,
            shown,
            None,
            gr.Row(visible=False),
            gr.skip(),
        ]
    one = session.pictures[number]
    picture = gr.Image(str(one.path), alt_text=one.arguments.get("prompt") or "a picture")
    return [
        picture,
        one.caption,
        gr.Gallery(gallery, visible=True, selected_index=number),
        number,
        gr.Row(visible=True),
        gr.DownloadButton(value=str(one.path)),
    ]


def _working(page: Page) -> list[Any]:
    """The buttons that change while pictures are made."""
    return [page.actions[name] for name in ("stop", "generate", "compare", "vary")]


def _busy(page: Page, is_busy: bool) -> dict[Any, Any]:
    """What those buttons are then, and otherwise."""
    stop, *others = _working(page)
    return {stop: gr.Button(visible=is_busy)} | {button: gr.Button(interactive=not is_busy) for button in others}


def _making(
    page: Page, studio: Studio, arguments: dict[str, Any], visitor: Any, client: str | None, seed: int
) -> Iterator[dict[Any, Any]]:
    """What changes on the page while pictures are made."""
    token, session = _session_of(studio, visitor)
    asked = f"{arguments['prompt']} {arguments.get('negative_prompt') or ''}"
    if unknown := studio.words_not_known(asked):
        named = ", ".join(unknown[:8])
        gr.Warning(f"This small model does not know: {named}. What it understands is listed on the left.")
    yield {page.visitor: {"token": token}, page.inputs["seed"]: seed} | _busy(page, True)
    for progress in progress_for_page(studio, arguments, client, session):
        changed: dict[Any, Any] = {page.status: status_text(progress.status)}
        if progress.picture is not None and not progress.saved:
            changed[page.result] = gr.Image(progress.picture, alt_text="a preview")
            changed[page.caption] = f"*Preview of “{arguments['prompt']}”*"
        if progress.saved:
            several = None if progress.picture is None else (progress.picture, arguments["prompt"], len(progress.saved))
            changed |= dict(zip(_showing(page), _shown(session, 0, several), strict=True))
        yield changed


def wire_generation(page: Page, studio: Studio) -> None:
    """Generate, Stop, and Vary."""
    names = {component: name for name, component in page.inputs.items() if name != "locked"}
    locked, seed = page.inputs["locked"], page.inputs["seed"]
    working = _working(page)
    outputs = [page.visitor, page.status, *_showing(page), seed, *working]

    def generate(filled: dict[Any, Any], request: gr.Request):
        values = {name: filled[component] for component, name in names.items()}
        if not filled[locked]:
            values["seed"] = random.randint(0, MAX_SEED)
        yield from _making(
            page, studio, _pipeline_arguments(values), filled[page.visitor], request.session_hash, values["seed"]
        )

    def vary(visitor: Any, number: int | None, request: gr.Request):
        _, session = _session_of(studio, visitor)
        one = _picked(session, number)
        arguments = _pipeline_arguments(
            {
                "prompt": one.arguments.get("prompt"),
                "negative_prompt": one.arguments.get("negative_prompt"),
                "editor": {"background": Image.open(one.path)},
                "strength": 0.6,
            }
        )
        yield from _making(page, studio, arguments, visitor, request.session_hash, arguments["seed"][0])

    started = [
        gr.on(
            [page.actions["generate"].click],
            generate,
            {*names, locked, page.visitor},
            outputs,
            trigger_mode="once",
            **IN_TURN,
        ),
        page.actions["vary"].click(
            vary,
            [page.visitor, page.current],
            outputs,
            **IN_TURN,
        ),
    ]
    for event in started:
        event.then(lambda: _busy(page, False), None, working, **AT_ONCE)
        event.failure(
            lambda: {page.status: status_text("Nothing was made.")} | _busy(page, False),
            None,
            [page.status, *working],
            **AT_ONCE,
        )

    seed.input(None, None, locked, js="() => true", **AT_ONCE)  # who types a seed wants that one

    def stop(request: gr.Request) -> None:
        studio.queue.stop(request.session_hash)

    for_programs_too = {"api_visibility": "public", "api_name": "stop", "api_description": STOP}
    page.actions["stop"].click(stop, **AT_ONCE | for_programs_too)


def _picked(session: Session, number: int | None) -> SavedImage:
    if number is None or number >= len(session.pictures):
        raise refused("This picture is no longer kept: make it again.")
    return session.pictures[number]


def wire_choices(page: Page, studio: Studio) -> None:
    """Presets, seeds, examples and words."""
    pipe, inputs = studio.pipe, page.inputs

    for fields in (inputs, *page.compared):
        fields["preset"].input(lambda preset: steps_of(pipe, preset), fields["preset"], fields["steps"], **AT_ONCE)
    page.actions["dice"].click(
        lambda: (random.randint(0, MAX_SEED), True), None, [inputs["seed"], inputs["locked"]], **IN_TURN
    )
    both = [inputs["prompt"], inputs["negative_prompt"]]
    if page.examples is not None:
        page.examples.click(lambda sample: tuple(sample), page.examples, both, **AT_ONCE)
    places = (pipe.defaults.get("understands") or {}).get("places") or []
    for kind, words in page.understood.items():
        add = _with_place if kind == "places" else _with_object
        page.understood[kind].click(
            lambda sample, prompt, add=add: add(prompt or "", sample[0], places), [words, both[0]], both[0], **AT_ONCE
        )
    example = example_source(pipe.default_size[0])
    target = (pipe.defaults.get("image_example") or [""])[-1]
    page.actions["example_source"].click(
        lambda prompt: ({"background": example, "layers": [], "composite": None}, prompt or target),
        inputs["prompt"],
        [inputs["editor"], inputs["prompt"]],
        **AT_ONCE,
    )
    inputs["editor"].change(None, inputs["editor"], page.note, js=NOTE, api_visibility="private")
    page.actions["no_source"].click(lambda: None, None, inputs["editor"], **AT_ONCE)


def _split_place(prompt: str, places: list[str]) -> tuple[str, str]:
    """A prompt's object, and the place behind it, "" where there is none."""
    for place in sorted(places, key=len, reverse=True):
        if prompt.endswith(place):
            return prompt.removesuffix(place).strip(), place
    return prompt.strip(), ""


def _with_object(prompt: str, word: str, places: list[str]) -> str:
    """Another object in the prompt's place."""
    return f"{word} {_split_place(prompt, places)[1]}".strip()


def _with_place(prompt: str, place: str, places: list[str]) -> str:
    """The prompt's object in another place."""
    return f"{_split_place(prompt, places)[0] or 'a fox'} {place}"


def wire_current(page: Page, studio: Studio) -> None:
    """What to do with a picture of this session, and with one that arrives from outside."""
    inputs = page.inputs
    fields = ["prompt", "negative_prompt", "strength", "preset", "seed", "size", "steps", "guidance_scale", "solver"]
    filled_fields = [*(inputs[name] for name in fields), inputs["locked"]]
    with_source = [inputs["editor"], page.source_accordion]

    def values_of(picture: Any) -> list[Any]:
        found = form_values_of(picture)
        changed = [found[name] if found[name] is not None else gr.skip() for name in fields]
        return [*changed, True if found["seed"] is not None else gr.skip()]

    def again(visitor: Any, number: int | None) -> list[Any]:
        one = of_current(visitor, number)
        gr.Info("The picture's settings are filled in.")
        layers = [] if one.mask is None else [layer_of(one.mask, ImageColor.getrgb(PAINT)[:3])]
        editor = None if one.source is None else {"background": one.source, "layers": layers, "composite": None}
        return [*values_of(one.path), editor, gr.Accordion(open=True) if one.source is not None else gr.skip()]

    def seed_again(visitor: Any, number: int | None) -> tuple[Any, bool]:
        gr.Info("Its seed is kept for the next pictures, until you untick it.")
        return seed_of(of_current(visitor, number).arguments, 0), True

    def of_current(visitor: Any, number: int | None) -> Any:
        return _picked(_session_of(studio, visitor)[1], number)

    def select(visitor: Any, event: gr.SelectData):
        session = _session_of(studio, visitor)[1]
        return [status_text("Made earlier."), *_shown(session, event.index)]

    def source_from(picture: Image.Image) -> list[Any]:
        return [{"background": picture, "layers": [], "composite": None}, gr.Accordion(open=True)]

    def take_in(path: str | None):
        if path is None:
            return [gr.skip()] * (len(filled_fields) + 3)
        try:
            values = values_of(path)
        except ValueError as unusable:
            if not isinstance(unusable, NoSettingsError):
                gr.Warning(str(unusable))
            try:
                picture = to_rgb(open_picture(Path(path).read_bytes()))
            except Exception as error:
                raise refused("This picture cannot be read: choose a PNG, a JPEG or another picture file.") from error
            gr.Info("Taken as the source picture.")
            return [*[gr.skip()] * len(filled_fields), *source_from(picture), None]
        if "strength" in settings_of(path):
            gr.Warning("Its settings are filled in. It was made from a picture, which is not in it: give that again.")
            return [*values, gr.skip(), gr.Accordion(open=True), None]
        gr.Info("The picture's settings are filled in.")
        return [*values, None, gr.skip(), None]

    here = [page.visitor, page.current]
    page.gallery.select(select, page.visitor, [page.status, *_showing(page)], **AT_ONCE)
    page.actions["reuse"].click(again, here, [*filled_fields, *with_source], **IN_TURN)
    page.actions["reseed"].click(seed_again, here, [inputs["seed"], inputs["locked"]], **IN_TURN)
    page.actions["resource"].click(
        lambda *at: source_from(Image.open(of_current(*at).path)), here, with_source, **IN_TURN
    )
    arrival = page.incoming.upload(take_in, page.incoming, [*filled_fields, *with_source, page.incoming], **IN_TURN)
    arrival.failure(lambda: None, None, page.incoming, **AT_ONCE)  # else it kept the file and took no other


def wire_comparison(page: Page, studio: Studio) -> None:
    """One prompt and seed through two settings."""
    shared = {page.inputs[name]: name for name in ("prompt", "negative_prompt", "size", "seed")}
    sides = [{component: name for name, component in side.items()} for side in page.compared]

    def compare(filled: dict[Any, Any], request: gr.Request):
        token, session = _session_of(studio, filled[page.visitor])
        yield {page.visitor: {"token": token}}  # a new one, where the pictures of the old one were deleted
        pair, told = [], []
        if filled[page.inputs["seed"]] is None:  # one for both sides
            filled[page.inputs["seed"]] = random.randint(0, MAX_SEED)
        for name, side in zip("AB", sides, strict=True):
            values = {shared[one]: filled[one] for one in shared} | {side[one]: filled[one] for one in side}
            progress = None
            for progress in progress_for_page(studio, _pipeline_arguments(values), request.session_hash, session):
                now = f"{name}: {progress.status}"
                yield {page.status: status_text(now), page.compared_caption: now}
            if progress is None or not progress.saved:
                return
            if progress.stopped:  # both sides
                yield dict(zip(_showing(page), _shown(session, 0), strict=True))
                return
            pair.append(str(progress.saved[0].path))
            told.append(f"**{name}**: {progress.status.removeprefix('Done after ').rstrip('.')}")
        yield {page.slider: gr.ImageSlider(tuple(pair), visible=True), page.compared_caption: ", ".join(told)} | dict(
            zip(_showing(page), _shown(session, 0), strict=True)
        )

    stop = page.actions["stop"]
    event = (
        page.actions["compare"]
        .click(lambda: gr.Button(visible=True), None, stop, **AT_ONCE)
        .then(
            compare,
            {*shared, *(one for side in sides for one in side), page.visitor},
            [page.visitor, page.status, page.slider, page.compared_caption, *_showing(page)],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
    )
    event.then(lambda: gr.Button(visible=False), None, stop, **AT_ONCE)
    event.failure(lambda: gr.Button(visible=False), None, stop, **AT_ONCE)
