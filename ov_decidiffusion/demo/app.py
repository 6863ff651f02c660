"""The interactive demo: a Gradio page on top of the pipeline's public methods, served to this machine."""

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.exceptions import ComponentProcessingError
from gradio.utils import get_upload_folder, ipython_check
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ov_decidiffusion.demo.api import offer_api
from ov_decidiffusion.demo.events import (
    wire_arrival,
    wire_choices,
    wire_comparison,
    wire_current,
    wire_generation,
    wire_incoming,
    wire_offer,
)
from ov_decidiffusion.demo.page import lay_out, make_theme
from ov_decidiffusion.demo.sessions import IDLE_SECONDS
from ov_decidiffusion.demo.studio import Studio
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.web.guards import known_names_only
from ov_decidiffusion.web.limits import LOOPBACK, MAX_UPLOAD
from ov_decidiffusion.web.queue import Queue
from ov_decidiffusion.web.uploads import UploadError, open_picture

logger = logging.getLogger(__name__)

TITLE = "DeciDiffusion on OpenVINO"
MAX_QUEUED = 128  # calls that Gradio holds; the queue in front of the pipeline is shorter
MAX_UPLOADS = 300_000_000  # total bytes of the visitors' uploaded files
MAX_SESSIONS = 200  # sessions whose values Gradio keeps, about 0.2 MB each; every call of a new client starts one
# With it, the browser itself refuses to request anything from another host.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'self' http://localhost:* http://127.0.0.1:* vscode-webview:"
)
DATA = Path(__file__).parents[1] / "data"
# Gradio would fetch these addresses for anyone, and pass them on as if they were the page's own.
ELSEWHERE = re.compile(r"/(file[=/]\s*https?:|proxy=)", re.IGNORECASE)


def _page_options() -> dict[str, Any]:
    """Gradio's options for the page, however it is served."""
    return {
        "show_error": True,
        "ssr_mode": False,
        "enable_monitoring": False,
        "theme": make_theme(),
        "css_paths": [DATA / "demo.css"],
        "head": f"<script>{(DATA / 'demo.js').read_text(encoding='utf-8')}</script>",
        "max_file_size": MAX_UPLOAD,
        "footer_links": [],
        "run_history": False,  # it would send pictures to the hub, with the token of the user who started the demo
    }


class _StayLocal:
    """Tells the browser what the page may load, and refuses to fetch anything from elsewhere for it.

    (Starlette's own middleware for changing responses hides when a client has disconnected.)
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        uploads = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload")
        if uploads and "GRADIO_TEMP_DIR" in os.environ:  # our own folder; the default one has other programs' files too
            await asyncio.to_thread(_make_room_for_uploads, Path(get_upload_folder()))
        refuses = scope["type"] == "http" and ELSEWHERE.search(scope["path"])
        app = PlainTextResponse("Nothing is fetched from elsewhere.", 403) if refuses else self.app
        await app(scope, receive, with_policy)


def _make_room_for_uploads(folder: Path) -> None:
    """Delete the oldest uploads beyond ``MAX_UPLOADS`` in total; others are kept for an hour."""
    found = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if file.is_file():
                found.append((file.stat().st_mtime, file.stat().st_size, file))
    together = sum(size for _, size, _ in found)
    for _, size, file in sorted(found, key=lambda one: one[0]):
        if together <= MAX_UPLOADS - MAX_UPLOAD:
            break
        file.unlink(missing_ok=True)
        together -= size


class DemoBlocks(gr.Blocks):
    """Gradio's Blocks, whose ``launch`` by default listens on localhost and loads nothing from other hosts.

    In a notebook, launching another one closes the previous one.
    """

    studio: Studio
    _in_notebook: "DemoBlocks | None" = None

    def launch(self, *, allowed_hosts: Sequence[str] = (), **kwargs: Any) -> Any:
        """Gradio's ``launch``; every argument can be given as usual.

        Args:
            allowed_hosts: host names under which a proxy passes requests on to the page; this machine's own names
                always work.
        """
        if ipython_check():
            if DemoBlocks._in_notebook not in (None, self):
                DemoBlocks._in_notebook.close(verbose=False)
            DemoBlocks._in_notebook = self
        middleware = [Middleware(_StayLocal)]
        local = kwargs.get("server_name", "127.0.0.1") in LOOPBACK and not kwargs.get("share")
        if local or allowed_hosts:
            middleware += known_names_only(allowed_hosts)
        defaults = _page_options() | {
            "server_name": "127.0.0.1",
            "share": False,
            "app_kwargs": {"middleware": middleware},
            "max_threads": MAX_QUEUED,
            "state_session_capacity": MAX_SESSIONS,
            "height": 1000,
        }
        if getattr(self, "studio", None) is not None:
            self.studio.warm_up()
        return super().launch(**(defaults | kwargs))

    async def preprocess_data(self, block_fn: Any, *arguments: Any, **options: Any) -> Any:
        """Gradio's method, made safe. Gradio's own error messages reveal the server's paths, and it logs tracebacks; it
        also fetches files from any address, and reads pictures of any size."""
        try:
            for file in _files_in(arguments):
                _check_file(file)
            return await super().preprocess_data(block_fn, *arguments, **options)
        except gr.Error as error:  # a refusal that is fit to be shown
            error.print_exception = False
            raise
        except ComponentProcessingError as error:
            place = re.search(r"component at index (\d+)", str(error))
            component = block_fn.inputs[int(place[1])] if place else None
            if isinstance(component, (gr.Image, gr.ImageEditor)):
                message = "The source picture cannot be read: choose a PNG, a JPEG or another picture file."
            else:
                message = f"{getattr(component, 'label', None) or 'An input'} has a value that cannot be used."
            raise gr.Error(message, print_exception=False) from None
        except OSError as error:
            logger.error("an upload could not be kept: %s", error)
            raise gr.Error("Files cannot be kept here now.", print_exception=False) from None
        except Exception:  # a program's call that does not follow the API
            message = "The inputs are not accepted; a file has to be uploaded first."
            raise gr.Error(message, print_exception=False) from None

    def close(self, verbose: bool = True) -> None:
        """Gradio's ``close``; running pictures end at their next step, and all pictures are deleted."""
        if getattr(self, "studio", None) is not None:
            self.studio.close()
        super().close(verbose=verbose)


def _files_in(value: Any) -> Iterator[str]:
    """The paths or addresses of the files among the inputs."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        if isinstance(value.get("url"), str) and value["url"].lstrip().lower().startswith("data:"):
            yield value["url"]  # Gradio reads it in place of the file
        value = list(value.values())
    for one in value if isinstance(value, (list, tuple)) else ():
        yield from _files_in(one)


def _check_file(file: str) -> None:
    """Refuse addresses, and pictures that are too large; Gradio itself refuses files that were not uploaded.

    Raises:
        gr.Error: the message says what is accepted.
    """
    if file.lower().lstrip().startswith(("http:", "https:", "data:")):
        raise gr.Error("Upload the file itself: addresses are not fetched.")
    if Path(file).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        try:
            open_picture(Path(file).read_bytes())
        except UploadError as error:
            raise gr.Error(f"This picture {error}.") from error


def make_demo(
    pipe: OVStableDiffusionPipeline,
    queue: Queue | None = None,
    outputs: Path | None = None,
    offers_int8: bool = True,
) -> DemoBlocks:
    """Build the page.

    Args:
        pipe: the pipeline to generate with.
        queue: the queue in front of the pipeline, if a server's clients wait in it too.
        outputs: a folder where pictures are kept after the demo has ended; None keeps none.
        offers_int8: whether visitors may start making the INT8 models that the faster presets use.

    Returns:
        the page; ``launch()`` serves it on localhost, ``close()`` ends it.
    """
    studio = Studio(pipe, queue, outputs, offers_int8)
    # Otherwise Gradio builds a table of all calls at each call, for a page that nobody sees, and keeps its memory.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(sys.maxsize))

    def leave(request: gr.Request) -> None:
        studio.leave(request.session_hash)

    with DemoBlocks(title=TITLE, analytics_enabled=False, delete_cache=(600, IDLE_SECONDS)) as demo:
        page = lay_out(studio)
        wire_arrival(demo, page, studio)
        wire_generation(page, studio)
        wire_choices(page, studio)
        wire_offer(page, studio)
        wire_current(page, studio)
        wire_incoming(page)
        wire_comparison(page, studio)
        offer_api(studio)
        demo.unload(leave)
    demo.studio = studio
    return demo.queue(api_open=False, max_size=MAX_QUEUED)


def mount_demo(
    app: FastAPI, pipe: OVStableDiffusionPipeline, password: str | None = None, queue: Queue | None = None
) -> DemoBlocks:
    """Serve the page at ``/demo`` of a server's application, in addition to its own paths; ``/`` redirects there.

    Args:
        app: the server's application.
        pipe: the pipeline to generate with.
        password: the page's password for the user "demo"; None lets in everybody whom the server lets in.
        queue: the queue that the server's clients wait in.
    """
    demo = make_demo(pipe, queue, offers_int8=password is None)
    app.get("/", include_in_schema=False)(lambda: RedirectResponse("/demo"))
    demo.state_session_capacity = MAX_SESSIONS
    app.add_middleware(_StayLocal)
    auth = None if password is None else ("demo", password)
    gr.mount_gradio_app(app, demo, path="/demo", auth=auth, **_page_options())
    return demo
