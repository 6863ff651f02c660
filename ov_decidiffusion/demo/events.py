"""The events of the demo's page: each ``wire_...`` function connects a part of it."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageColor

from ov_decidiffusion.demo.page import PAINT, QUALITIES, Page, caption_html, example_source, status_text, steps_of
from ov_decidiffusion.demo.sessions import SavedImage, Session
from ov_decidiffusion.demo.studio import (
    AUTOMATIC,
    LARGE_AREA,
    MAX_AREA,
    Progress,
    Run,
    Studio,
    arguments_of,
    form_values_of,
    is_blank,
    layer_of,
    mask_of,
    seed_of,
)
from ov_decidiffusion.errors import DeciDiffusionError, ModelDirError
from ov_decidiffusion.generation.images import to_rgb
from ov_decidiffusion.generation.metadata import NoSettingsError, settings_of
from ov_decidiffusion.schedulers.registry import SOLVERS
from ov_decidiffusion.web.limits import MAX_SEED
from ov_decidiffusion.web.queue import QueueIsFull
from ov_decidiffusion.web.uploads import open_picture

logger = logging.getLogger(__name__)

AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
STOPPING = (
    """(visitor) => { document.querySelector("#status [role=status]").textContent = "Stopping …"; return visitor; }"""
)
NOTE = """(editor) => editor?.background ? "Using your picture as the starting point." : "" """
IN_TURN: dict[str, Any] = AT_ONCE | {
    "queue": True,
    "concurrency_limit": None,
}  # only queued events can show messages on the page
AGAIN: dict[str, Any] = IN_TURN | {"trigger_mode": "multiple"}  # can be triggered again while it is running
KEPT = ("prompt", "negative_prompt", "preset", "size", "pictures", "seed", "steps", "guidance_scale", "solver")


def refused(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def told_on_the_page(error: Exception) -> gr.Error:
    """An error as a message for the page, without paths or tracebacks."""
    if isinstance(error, ModelDirError):
        logger.error("%s", error)
        return refused("The models cannot be used: the demo's log says why.")
    if isinstance(error, (ValueError, FloatingPointError)):
        return refused(str(error))
    if isinstance(error, QueueIsFull):
        return refused("Too many are waiting already: try again in a minute.")
    logger.error("a picture could not be made", exc_info=error)
    return refused(f"The picture could not be made ({type(error).__name__}).")


def progress_for_page(
    studio: Studio, arguments: dict[str, Any], client: str | None, session: Session
) -> Iterator[Progress]:
    """A run from its start to its end; its errors become messages for the page."""
    try:
        yield from studio.make(arguments, client, session)
    except Exception as error:
        raise told_on_the_page(error) from error


def _pipeline_arguments(filled: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments from the page's fields; ``editor`` holds the source and what was painted on it."""
    editor = filled.pop("editor", None) or {}
    source = editor.get("background")
    if source is not None and is_blank(source):  # the editor's empty canvas
        source = None
    mask = None if source is None else mask_of(editor.get("layers") or [])
    try:
        return arguments_of(source=source, mask=mask, **filled)
    except ValueError as error:
        raise refused(str(error)) from error


def _session_of(studio: Studio, visitor: dict[str, Any] | None, request: gr.Request) -> tuple[str, Session]:
    """The visitor's token and session, from what the browser keeps; a new session if it keeps no known token."""
    token, session = studio.sessions.of((visitor or {}).get("token"))
    studio.visit(request.session_hash, token)
    return token, session


def wire_arrival(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    """A visitor arrives; after a reload, the page shows everything as it was, and a run that is still working."""
    fields = [page.inputs[name] for name in (*KEPT, "locked")]
    with_source = [page.inputs["editor"], page.source_panel]

    def arrive(visitor: dict[str, Any] | None, kept: Any, request: gr.Request):
        token, session = _session_of(studio, visitor, request)
        newest = session.pictures[0] if session.pictures else None
        status = status_text(studio.greeting())
        source = [gr.skip()] * 2 if session.editing is None else _in_editor(*session.editing)
        return {"token": token}, *_kept_values(kept), *source, status, *_shown(page, session, newest).values()

    def rejoin(visitor: dict[str, Any] | None, request: gr.Request):
        token, session = _session_of(studio, visitor, request)
        runs = list(studio.runs.get(token, []))
        yield _busy(page, bool(runs))  # yielding nothing at all would clear the page
        for run in runs:
            yield from _watching(page, studio, run, session, token)

    arrived = [page.visitor, *fields, *with_source, page.status, *_showing(page)]
    demo.load(arrive, [page.visitor, page.kept], arrived, **AT_ONCE).then(
        rejoin, page.visitor, _changing(page), **AGAIN
    )
    names = json.dumps([*KEPT, "locked"])
    keep = f"(...values) => Object.fromEntries({names}.map((name, i) => [name, values[i]]))"
    changed = [one.change for one in fields]
    gr.on(changed, None, fields, page.kept, js=keep, **AT_ONCE)


def _kept_values(kept: Any) -> list[Any]:
    """The values of the fields that a browser kept; values that do not fit their field are skipped."""
    kept = kept if isinstance(kept, dict) else {}
    is_number = (int, float)
    kinds = {name: is_number for name in ("pictures", "seed", "steps", "guidance_scale")} | {"locked": bool}
    values = []
    for name in (*KEPT, "locked"):
        value = kept.get(name)
        fits = isinstance(value, kinds.get(name, str))
        if name == "preset":
            fits = value in QUALITIES
        elif name == "solver":
            fits = value in (AUTOMATIC, *SOLVERS)
        values.append(value if fits else gr.skip())
    return values


def _showing(page: Page) -> list[Any]:
    """The components that ``_shown`` has values for, in its order."""
    return [
        page.result,
        page.slider,
        page.caption,
        page.gallery_column,
        page.gallery,
        page.listed,
        page.current,
        page.buttons,
        page.actions["download"],
    ]


def _shown(
    page: Page, session: Session, one: SavedImage | None, several: tuple[Image.Image, str, str] | None = None
) -> dict[Any, Any]:
    """The page's values to show one picture of a session, and the gallery beside it.

    Args:
        page: the page.
        session: the visitor's session.
        one: the picture; None if there is none yet.
        several: several pictures of one prompt, put together, with their prompt and details; shown in place of ``one``
            until the visitor chooses one.
    """
    pictures = list(session.pictures)
    ids = [kept.id for kept in pictures]
    selected = ids.index(one.id) if one is not None and several is None and one.id in ids else None
    told = [(str(kept.path), kept.arguments.get("prompt") or "a picture") for kept in pictures]
    values: dict[Any, Any] = dict.fromkeys(_showing(page), gr.skip())
    values |= {
        page.gallery_column: gr.Column(visible=bool(pictures)),
        page.gallery: gr.Gallery(told, selected_index=selected),
        page.listed: ids,
        page.current: None,
        page.buttons: gr.Row(visible=False),
    }
    if several is not None:
        picture, prompt, details = several
        values[page.result] = gr.Image(picture, alt_text=f"several pictures: {prompt}", visible=True)
        values[page.caption] = caption_html(prompt, f"{details} · choose one of your pictures")
    elif one is not None:
        prompt = one.arguments.get("prompt") or ""
        values[page.result] = gr.Image(str(one.path), alt_text=prompt or "a picture", visible=True)
        values[page.caption] = caption_html(prompt, one.caption)
        values |= {page.current: one.id, page.buttons: gr.Row(visible=True)}
        values[page.actions["download"]] = gr.DownloadButton(value=str(one.path))
    if several is not None or one is not None:
        values[page.slider] = gr.ImageSlider(visible=False)
    return values


def _changing(page: Page) -> list[Any]:
    """The components that change while pictures are made."""
    return [page.visitor, page.status, *_showing(page), page.inputs["seed"], page.actions["stop"], page.large_size]


def _busy(page: Page, is_busy: bool) -> dict[Any, Any]:
    return {page.actions["stop"]: gr.Button(visible=is_busy)}


def _making(
    page: Page, studio: Studio, arguments: dict[str, Any], visitor: Any, request: gr.Request, seed: int
) -> Iterator[dict[Any, Any]]:
    """The page's changes while pictures are made, or wait in the queue."""
    token, session = _session_of(studio, visitor, request)
    try:
        run = studio.start(arguments, token, session)
    except Exception as error:
        raise told_on_the_page(error) from error
    before, _ = studio.queue.others_of(run.job)
    if before:
        gr.Info("Queued: it starts when your picture before it is done.")
    yield {page.visitor: {"token": token}, page.inputs["seed"]: seed} | _busy(page, True)
    yield from _watching(page, studio, run, session, token)


def _watching(page: Page, studio: Studio, run: Run, session: Session, token: str) -> Iterator[dict[Any, Any]]:
    shows_preview = False
    try:
        for progress in run.watch():
            changed: dict[Any, Any] = {page.status: status_text(progress.status, progress.share)}
            if progress.saved:
                several = None
                if progress.picture is not None:
                    several = (progress.picture, run.prompt, progress.saved[0].caption)
                changed |= _shown(page, session, progress.saved[0], several)
            elif progress.picture is not None and shows_preview:
                changed[page.result] = progress.picture  # alone: each component that changes costs Gradio time
            elif progress.picture is not None:  # a preview, which can neither be downloaded nor edited
                shows_preview = True
                changed |= {
                    page.result: gr.Image(progress.picture, alt_text="a preview", visible=True),
                    page.slider: gr.ImageSlider(visible=False),
                    page.caption: caption_html(run.prompt, "preview"),
                    page.current: None,
                    page.buttons: gr.Row(visible=False),
                }
            yield changed
    except Exception as error:
        raise told_on_the_page(error) from error
    yield _busy(page, studio.queue.has_jobs(token))


def wire_generation(page: Page, studio: Studio) -> None:
    """The buttons Generate, Surprise me, Vary and Stop, and the tiles."""
    names = {component: name for name, component in page.inputs.items() if name != "locked"}
    locked, seed = page.inputs["locked"], page.inputs["seed"]
    outputs = _changing(page)

    def generate(filled: dict[Any, Any], request: gr.Request):
        values = {name: filled[component] for component, name in names.items()}
        if not filled[locked] or values["seed"] is None:
            values["seed"] = random.randint(0, MAX_SEED)
        arguments = _pipeline_arguments(values)
        size, area = filled[page.inputs["size"]], studio.area_of(arguments)
        if LARGE_AREA < area <= MAX_AREA and size != filled[page.large_size]:
            seconds = studio.queue.estimated_seconds(studio.work_of(arguments))
            told = f"{size} is {area:.0f} times the model's own size and takes at least {seconds:.0f} s."
            gr.Warning(f"{told} Press Generate again to make it.")
            yield {page.large_size: size, page.status: status_text("Nothing was made yet.")}
            return
        editing = (arguments["image"], arguments.get("mask_image")) if "image" in arguments else None
        _session_of(studio, filled[page.visitor], request)[1].editing = editing
        yield from _making(page, studio, arguments, filled[page.visitor], request, values["seed"])

    def vary(visitor: Any, picture_id: str | None, preset: str, request: gr.Request):
        one = _picked(_session_of(studio, visitor, request)[1], picture_id)
        own = {name: one.arguments.get(name) for name in ("prompt", "negative_prompt")}
        source = {"background": Image.open(one.path)}
        arguments = _pipeline_arguments(own | {"editor": source, "strength": 0.6, "preset": preset})
        yield from _making(page, studio, arguments, visitor, request, arguments["seed"][0])

    def show_tile(visitor: Any, preset: str, event: gr.SelectData, request: gr.Request):
        _, prompt, number = page.showcase[1:][event.index]
        yield {page.inputs["prompt"]: prompt, page.inputs["negative_prompt"]: ""}
        arguments = _pipeline_arguments({"prompt": prompt, "seed": number, "preset": preset})
        yield from _making(page, studio, arguments, visitor, request, number)

    filled_in = {*names, locked, page.visitor, page.large_size}
    preset, prompt = page.inputs["preset"], page.inputs["prompt"]
    started = [
        page.actions["generate"].click(generate, filled_in, outputs, **AGAIN),
        page.actions["vary"].click(vary, [page.visitor, page.current, preset], outputs, **AGAIN),
    ]
    if "surprise" in page.actions:
        drawn = page.actions["surprise"].click(lambda: _surprise(studio), None, prompt, **AT_ONCE)
        started.append(drawn.then(generate, filled_in, outputs, **AGAIN))
    if page.tiles is not None:
        both = [prompt, page.inputs["negative_prompt"]]
        started.append(page.tiles.select(show_tile, [page.visitor, preset], [*both, *outputs], **AGAIN))

    def nothing_made(visitor: Any, request: gr.Request) -> dict[Any, Any]:
        token, _ = _session_of(studio, visitor, request)
        return {page.status: status_text("Nothing was made.")} | _busy(page, studio.queue.has_jobs(token))

    for event in started:
        event.failure(nothing_made, page.visitor, [page.status, page.actions["stop"]], **AT_ONCE)

    seed.input(None, None, locked, js="() => true", **AT_ONCE)  # typing a seed locks it

    def stop_own(visitor: Any, request: gr.Request) -> None:
        studio.queue.stop(_session_of(studio, visitor, request)[0])

    # The page itself says so: an answer of the server could come after what the run says when it has stopped.
    page.actions["stop"].click(stop_own, page.visitor, None, js=STOPPING, **AT_ONCE)


def _surprise(studio: Studio) -> str:
    """A random combination of an object and a place that a small model knows."""
    known = studio.pipe.defaults["understands"]
    return f"{random.choice(known['objects'])} {random.choice(known['places'])}"


def _picked(session: Session, picture_id: str | None) -> SavedImage:
    one = session.by_id(picture_id)
    if one is None:
        raise refused("This picture is no longer kept: make it again.")
    return one


def wire_choices(page: Page, studio: Studio) -> None:
    """The choices of quality, size and seed, examples, and known words."""
    pipe, inputs = studio.pipe, page.inputs

    for fields in (inputs, *page.compared):
        fields["preset"].input(lambda preset: steps_of(pipe, preset), fields["preset"], fields["steps"], **AT_ONCE)
    inputs["size"].change(studio.size_hint, inputs["size"], page.size_hint, **AT_ONCE)
    page.actions["dice"].click(
        lambda: (random.randint(0, MAX_SEED), True), None, [inputs["seed"], inputs["locked"]], **IN_TURN
    )
    page.actions["theme"].click(None, js="() => window.switchTheme()", **AT_ONCE)
    both = [inputs["prompt"], inputs["negative_prompt"]]
    if page.examples is not None:
        page.examples.click(lambda sample: tuple(sample), page.examples, both, **AT_ONCE)
    places = (pipe.defaults.get("understands") or {}).get("places") or []
    for kind, words in page.known_words.items():
        add = _with_place if kind == "places" else _with_object
        words.click(
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


def wire_offer(page: Page, studio: Studio) -> None:
    """Offer to make the INT8 models when a visitor chooses a faster quality, and say what that takes."""

    def look(preset: str) -> dict[Any, Any]:
        told = "" if preset == "exact" else studio.missing_int8()
        return {page.offer: gr.Row(visible=bool(told)), page.offer_text: told}

    def make() -> Iterator[dict[Any, Any]]:
        try:
            for told in studio.make_int8():
                yield {page.offer_text: told, page.actions["int8"]: gr.Button(interactive=False)}
        except DeciDiffusionError as error:
            raise refused(str(error)) from error
        gr.Info("The INT8 models are ready.")
        yield {page.offer: gr.Row(visible=False), page.actions["int8"]: gr.Button(interactive=True)}

    texts = [page.offer, page.offer_text]
    page.inputs["preset"].input(look, page.inputs["preset"], texts, **AT_ONCE)
    made = page.actions["int8"].click(make, None, [*texts, page.actions["int8"]], **IN_TURN)
    made.failure(lambda: gr.Button(interactive=True), None, page.actions["int8"], **AT_ONCE)


def _split_place(prompt: str, places: list[str]) -> tuple[str, str]:
    """A prompt's object, and the place after it; "" if there is none."""
    for place in sorted(places, key=len, reverse=True):
        if prompt.endswith(place):
            return prompt.removesuffix(place).strip(), place
    return prompt.strip(), ""


def _with_object(prompt: str, word: str, places: list[str]) -> str:
    """The prompt with another object, in the same place."""
    return f"{word} {_split_place(prompt, places)[1]}".strip()


def _with_place(prompt: str, place: str, places: list[str]) -> str:
    """The prompt with the same object, in another place."""
    return f"{_split_place(prompt, places)[0] or 'a rocket'} {place}"


FILLED_IN = ("prompt", "negative_prompt", "strength", "preset", "seed", "size", "steps", "guidance_scale", "solver")


def _fields_to_fill(page: Page) -> list[Any]:
    """The fields for a picture's settings, in the order of ``_values_to_fill``."""
    return [*(page.inputs[name] for name in FILLED_IN), page.inputs["locked"], page.inputs["pictures"]]


def _values_to_fill(picture: Any) -> list[Any]:
    """The values of a picture's settings for the fields; ValueError if it has none."""
    found = form_values_of(picture)
    changed = [found[name] if found[name] is not None else gr.skip() for name in FILLED_IN]
    return [*changed, True if found["seed"] is not None else gr.skip(), 1]


def _in_editor(picture: Image.Image, mask: Image.Image | None = None) -> list[Any]:
    """The values that put a picture into the editor, with a mask painted on it, and open the panel around it."""
    layers = [] if mask is None else [layer_of(mask, ImageColor.getrgb(PAINT)[:3])]
    return [{"background": picture, "layers": layers, "composite": None}, gr.Accordion(open=True)]


def wire_current(page: Page, studio: Studio) -> None:
    """What a visitor can do with a picture of the session: reuse, edit, film, download."""
    inputs = page.inputs
    with_source = [inputs["editor"], page.source_panel]

    def of_current(visitor: Any, picture_id: str | None, request: gr.Request) -> SavedImage:
        return _picked(_session_of(studio, visitor, request)[1], picture_id)

    def again(visitor: Any, picture_id: str | None, request: gr.Request) -> list[Any]:
        one = of_current(visitor, picture_id, request)
        gr.Info("The picture's settings are filled in.")
        source = [None, gr.skip()] if one.source is None else _in_editor(one.source, one.mask)
        return [*_values_to_fill(one.path), *source]

    def seed_again(visitor: Any, picture_id: str | None, request: gr.Request) -> tuple[Any, bool]:
        gr.Info("Its seed is locked for the next pictures.")
        return seed_of(of_current(visitor, picture_id, request).arguments, 0), True

    def edit(visitor: Any, picture_id: str | None, request: gr.Request) -> list[Any]:
        return _in_editor(Image.open(of_current(visitor, picture_id, request).path))

    def film(visitor: Any, picture_id: str | None, request: gr.Request) -> list[Any]:
        one = of_current(visitor, picture_id, request)
        try:
            file = str(studio.film(one))
        except ValueError as error:
            raise refused(str(error)) from error
        told = status_text("Its steps as a film; Download saves the film.")
        return [gr.Image(file, alt_text=f"film: {one.arguments.get('prompt')}"), gr.DownloadButton(value=file), told]

    def select(visitor: Any, listed: list[str], event: gr.SelectData, request: gr.Request):
        _, session = _session_of(studio, visitor, request)
        one = _picked(session, listed[event.index] if event.index < len(listed) else None)
        return {page.status: status_text("Made earlier.")} | _shown(page, session, one)

    def archive(visitor: Any, request: gr.Request) -> gr.DownloadButton:
        _, session = _session_of(studio, visitor, request)
        return gr.DownloadButton(value=str(session.all_in_one()))

    here = [page.visitor, page.current]
    page.gallery.select(select, [page.visitor, page.listed], [page.status, *_showing(page)], **AT_ONCE)
    page.actions["reuse"].click(again, here, [*_fields_to_fill(page), *with_source], **IN_TURN)
    page.actions["reseed"].click(seed_again, here, [inputs["seed"], inputs["locked"]], **IN_TURN)
    page.actions["film"].click(film, here, [page.result, page.actions["download"], page.status], **IN_TURN)
    page.actions["resource"].click(edit, here, with_source, **IN_TURN)
    packed = page.actions["download_all"].click(archive, page.visitor, page.actions["archive"], **IN_TURN)
    packed.then(None, js="() => setTimeout(() => document.querySelector('#archive').click(), 100)", **AT_ONCE)


def wire_incoming(page: Page) -> None:
    """Handle a pasted or dropped picture: one that was made here fills in its settings, any other becomes a source."""
    fields = [*_fields_to_fill(page), page.inputs["editor"], page.source_panel, page.incoming]

    def take_in(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * len(fields)
        try:
            values = _values_to_fill(path)
        except ValueError as unusable:
            if not isinstance(unusable, NoSettingsError):
                gr.Warning(str(unusable))
            try:
                picture = to_rgb(open_picture(Path(path).read_bytes()))
            except Exception as error:
                raise refused("This picture cannot be read: choose a PNG, a JPEG or another picture file.") from error
            gr.Info("Taken as the starting point.")
            return [*[gr.skip()] * (len(fields) - 3), *_in_editor(picture), None]
        if "strength" in settings_of(path):
            gr.Warning("Its settings are filled in. It was made from a picture, which is not in it: give that again.")
            return [*values, gr.skip(), gr.Accordion(open=True), None]
        gr.Info("The picture's settings are filled in.")
        return [*values, None, gr.skip(), None]

    arrival = page.incoming.upload(take_in, page.incoming, fields, **IN_TURN)
    arrival.failure(lambda: None, None, page.incoming, **AT_ONCE)  # otherwise it would keep the file, and take no other


def wire_comparison(page: Page, studio: Studio) -> None:
    """Compare two settings with one prompt and seed."""
    shared = {page.inputs[name]: name for name in ("prompt", "negative_prompt", "size", "seed")}
    sides = [{component: name for name, component in side.items()} for side in page.compared]

    def compare(filled: dict[Any, Any], request: gr.Request):
        token, session = _session_of(studio, filled[page.visitor], request)
        yield {page.visitor: {"token": token}} | _busy(page, True)
        pair, told = [], []
        if filled[page.inputs["seed"]] is None:  # one for both sides
            filled[page.inputs["seed"]] = random.randint(0, MAX_SEED)
        for name, side in zip("AB", sides, strict=True):
            values = {shared[one]: filled[one] for one in shared} | {side[one]: filled[one] for one in side}
            progress = None
            for progress in progress_for_page(studio, _pipeline_arguments(values), token, session):
                yield {page.status: status_text(f"{name}: {progress.status}", progress.share)}
            if progress is None or not progress.saved or progress.stopped:  # Stop ends both sides
                newest = session.pictures[0] if session.pictures else None
                yield _shown(page, session, newest) | _busy(page, studio.queue.has_jobs(token))
                return
            pair.append(str(progress.saved[0].path))
            taken = progress.status.removeprefix("Done after ").rstrip(".")
            told.append(f"{name}: {QUALITIES[values['preset']]}, {taken}")
        yield (
            _shown(page, session, None)
            | {
                page.status: status_text("Done: A is on the left, B on the right."),
                page.slider: gr.ImageSlider(tuple(pair), visible=True),
                page.result: gr.Image(visible=False),
                page.caption: caption_html(filled[page.inputs["prompt"]] or "", " · ".join(told)),
                page.compare_panel: gr.Accordion(open=False),
            }
            | _busy(page, studio.queue.has_jobs(token))
        )

    event = page.actions["compare"].click(
        compare,
        {*shared, *(one for side in sides for one in side), page.visitor},
        [page.visitor, page.status, page.actions["stop"], page.compare_panel, *_showing(page)],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    event.failure(lambda: gr.Button(visible=False), None, page.actions["stop"], **AT_ONCE)
