"""Gradio's picture editor, limited to valid pictures and to a bounded amount of them."""

from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from starlette.exceptions import HTTPException

from ov_decidiffusion.web.limits import MAX_UPLOAD
from ov_decidiffusion.web.uploads import UploadError, open_picture

MAX_LAYERS = 4  # the page paints on one
MAX_KEPT = 100_000_000  # total bytes of pictures that were sent but not used yet; the oldest are dropped
KINDS = ("background", "layer", "composite")


def picture_editor(**options: Any) -> gr.ImageEditor:
    """Gradio's ``ImageEditor``, with checks; its pictures arrive one by one, before the call that they belong to.

    (A subclass would make Gradio write a file of types beside this one.)
    """
    editor = gr.ImageEditor(**options)
    original = editor.accept_blobs

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        """Keep an uploaded picture; if it is not one, raise HTTPException 400 with the reason."""
        file = _checked(data)
        _make_room(editor, len(file), data.data["id"])
        original(data)

    editor.accept_blobs = accept_blobs
    return editor


def _make_room(editor: gr.ImageEditor, size: int, name: str) -> None:
    kept = sum(_size(blobs) for blobs in editor.blob_storage.values())
    for older in list(editor.blob_storage):
        if kept + size <= MAX_KEPT:
            break
        if older != name:
            kept -= _size(editor.blob_storage.pop(older))


def _checked(data: AcceptBlobs) -> bytes:
    """The picture of a request, after checking that the page could have sent each of its fields."""
    try:
        kind, index, name = (str(data.data.get(field)) for field in ("type", "index", "id"))
        file = data.files[0][1]
        place = 0 if index in ("", "null", "None") else int(index)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise HTTPException(400, "A picture comes with its type, its index and its id.") from error
    if kind not in KINDS or not 0 <= place < MAX_LAYERS or not 0 < len(name) <= 100 or not isinstance(file, bytes):
        raise HTTPException(400, f"`type` is one of {', '.join(KINDS)}, and `index` from 0 to {MAX_LAYERS - 1}.")
    try:
        open_picture(file, MAX_UPLOAD)
    except UploadError as error:
        raise HTTPException(400, f"The picture {error}.") from error
    return file


def _size(blobs: Any) -> int:
    """The bytes of all pictures sent under one id."""
    return sum(len(one) for one in (blobs.background, blobs.composite, *blobs.layers) if isinstance(one, bytes))
