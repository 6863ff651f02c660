"""A server for OpenAI's clients: pictures from prompts, and edits of pictures, over HTTP.

The interface follows OpenAI's public API reference, "Images". OpenVINO Model Server's additional fields work too
(``num_inference_steps``, ``guidance_scale``, ``negative_prompt``, ``rng_seed``), and so does its path ``/v3``.
"""

import asyncio
import base64
import hmac
import io
import logging
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import prometheus_client as prometheus
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image, ImageOps
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ov_decidiffusion.arguments import check_range, check_whole, shown
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.generation.images import fit_size, resize, to_rgb, upright, with_alpha
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.server.batching import Batcher, ImageJob
from ov_decidiffusion.server.schemas import ApiError, ImageRequest, answer_errors_as_openai_does, no_such_model
from ov_decidiffusion.web.guards import check_api_key, known_names_only
from ov_decidiffusion.web.limits import MAX_SEED, MAX_STEPS, MAX_UPLOAD, QUALITY
from ov_decidiffusion.web.queue import Queue, QueueIsFull
from ov_decidiffusion.web.uploads import UploadError, open_picture

logger = logging.getLogger(__name__)

MAX_PICTURES = 10  # for one request, as in OpenAI's interface
MAX_WAITING, MAX_BATCH, MAX_TIMEOUT = 100_000, 1000, 86_400  # requests, pictures, seconds
PIECE_SECONDS = 60  # the longest pause before the next piece of a request
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
LONGEST = {"jpeg": 65_500, "webp": 16_383}  # the longest side in pixels that a format allows
PREFIXES = ("/v1", "/v3")
READER = ThreadPoolExecutor(1, "reader")  # one at a time: a large picture takes seconds and 0.5 GB
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
Source = tuple[Image.Image, Image.Image | None]  # a picture, and a mask that is white where it is repainted


class Metrics:
    """The metrics of ``/metrics``, in Prometheus's format."""

    def __init__(self, queue: Queue):
        self.registry = prometheus.CollectorRegistry()
        named = {"namespace": "ov_decidiffusion", "registry": self.registry}
        self.answers = prometheus.Counter("answers", "Requests for pictures, by status", ["status"], **named)
        self.pictures = prometheus.Counter("pictures", "Pictures made", **named)
        buckets = (0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320)
        self.seconds = prometheus.Histogram("seconds", "Seconds from request to answer", buckets=buckets, **named)
        waiting = prometheus.Gauge("waiting", "Requests in the queue", **named)
        waiting.set_function(lambda: queue.waiting)


class LimitedBody:
    """Refuses bodies that are too large, whether they announce their size or not."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if told.isdigit() and int(told) > MAX_UPLOAD:
            too_large = self._refused()
            await JSONResponse(too_large.body, too_large.status)(scope, receive, send)
            return
        seen, complete = 0, False

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:  # the next message is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), PIECE_SECONDS)
            except TimeoutError:
                raise HTTPException(408, "The rest of the request did not arrive in time.") from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > MAX_UPLOAD:
                refused = self._refused()
                raise HTTPException(refused.status, refused.body["error"]["message"])  # FastAPI lets it through
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)

    @staticmethod
    def _refused() -> ApiError:
        return ApiError(f"The request is larger than {MAX_UPLOAD // 10**6} MB.", 413)


class Handlers:
    """The handlers of all paths.

    Args:
        pipe: the pipeline to generate with.
        queue: the queue in front of it.
        max_batch, timeout: see ``create_app``.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, queue: Queue, max_batch: int, timeout: float):
        self._pipe, self._timeout = pipe, timeout
        self.batcher = Batcher(pipe, queue, max_batch)
        self._metrics = Metrics(queue)
        self._model = str(pipe.origin.get("checkpoint") or "decidiffusion").rsplit("/", 1)[-1]
        self._began = int(time.time())

    async def generations(self, request: Request, body: ImageRequest) -> Any:
        return await self._pictures(request, body, [])

    async def edits(self, request: Request) -> Any:
        body, sources = await _read_form(request, self._pipe)
        return await self._pictures(request, body, sources)

    def models(self) -> Any:
        return {"object": "list", "data": [self.one_model(self._model)]}

    def one_model(self, name: str) -> Any:
        if name != self._model:
            raise no_such_model(name, self._model)
        return {"id": self._model, "object": "model", "created": self._began, "owned_by": "ov_decidiffusion"}

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "model": self._model, "waiting": self.batcher.queue.waiting}

    def metrics(self) -> PlainTextResponse:
        text = prometheus.generate_latest(self._metrics.registry).decode()
        return PlainTextResponse(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _pictures(self, request: Request, body: ImageRequest, sources: list[Source]) -> dict[str, Any]:
        start, output_format = time.perf_counter(), body.output_format or "png"
        try:
            job = self.batcher.make_job(secrets.token_hex(8), *rows_of(self._pipe, self._model, body, sources))
            pictures = await _finished(self.batcher, job, request, self._timeout)
            data = await asyncio.to_thread(_encoded, pictures, body, job)
        except ApiError as error:
            self._metrics.answers.labels(str(error.status)).inc()
            raise
        self._metrics.answers.labels("200").inc()
        self._metrics.pictures.inc(len(pictures))
        self._metrics.seconds.observe(time.perf_counter() - start)
        return {"created": int(time.time()), "data": data, "output_format": output_format}


def create_app(
    pipe: OVStableDiffusionPipeline,
    api_key: str | None = None,
    max_waiting: int = 64,
    max_batch: int = 4,
    timeout: float = 600,
    queue: Queue | None = None,
) -> FastAPI:
    """The server's application, for uvicorn or any other ASGI server.

    Args:
        pipe: the pipeline to generate with.
        api_key: the key that clients have to send as a bearer token; None lets everybody in.
        max_waiting: number of requests that may wait; further ones get status 429 with Retry-After.
        max_batch: largest number of pictures that run together; several requests do if all their settings are equal.
        timeout: seconds after which a request gets status 504.
        queue: the queue to use, if the demo's visitors wait in it too; its own limit replaces ``max_waiting``.

    Raises:
        ValueError: the key is empty, or a number is out of its range.
    """
    check_api_key(api_key)
    check_serving(max_waiting, max_batch, timeout)
    handlers = Handlers(pipe, Queue(max_waiting) if queue is None else queue, max_batch, timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(handlers.batcher.close)

    async def allowed(request: Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), (api_key or "").encode())
        if api_key is not None and not (scheme.lower() == "bearer" and is_right):
            raise ApiError("Send the API key as a bearer token.", 401, code="invalid_api_key")

    # Without FastAPI's documentation pages, which load scripts from another host; /openapi.json has everything.
    app = FastAPI(title="DeciDiffusion on OpenVINO", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(LimitedBody)
    for prefix in PREFIXES:
        behind_key = {"dependencies": [Depends(allowed)], "include_in_schema": prefix == PREFIXES[0]}
        app.post(f"{prefix}/images/generations", **behind_key)(handlers.generations)
        app.post(f"{prefix}/images/edits", **behind_key)(handlers.edits)
        app.get(f"{prefix}/models", **behind_key)(handlers.models)
        app.get(f"{prefix}/models/{{name:path}}", **behind_key)(handlers.one_model)
    app.get("/health")(handlers.health)
    app.get("/metrics", dependencies=[Depends(allowed)])(handlers.metrics)
    answer_errors_as_openai_does(app)
    return app


def check_serving(max_waiting: Any, max_batch: Any, timeout: Any) -> None:
    """Refuse numbers with which no request would succeed; for the arguments see ``create_app``."""
    check_whole("max_waiting", max_waiting, 1, MAX_WAITING)
    check_whole("max_batch", max_batch, 1, MAX_BATCH)
    check_range("timeout", timeout, 0.1, MAX_TIMEOUT)


def under_known_names_only(app: FastAPI, allowed_hosts: Sequence[str] = ()) -> None:
    """Answer only under this machine's own names and the given ones, and not to pages of other sites."""
    for guard in known_names_only(allowed_hosts):
        app.add_middleware(guard.cls, *guard.args, **guard.kwargs)


def rows_of(
    pipe: OVStableDiffusionPipeline, model: str, body: ImageRequest, sources: list[Source]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The arguments of ``pipe.denoise`` for each picture of a request, and those that all pictures share.

    If there are several sources, each is edited `n` times, in their order.

    Raises:
        ApiError: a field has a wrong value; the message says which, and what is allowed.
    """
    if body.model not in (None, "", model):
        raise no_such_model(body.model, model)
    count = 1 if body.n is None else body.n
    if not 1 <= count <= MAX_PICTURES:
        raise ApiError(f"`n` must be from 1 to {MAX_PICTURES}, got {count}.", param="n")
    if count * len(sources) > MAX_PICTURES:
        raise ApiError(
            f"`n` pictures of each of {len(sources)} are {count * len(sources)}; at most {MAX_PICTURES} are made.",
            param="n",
        )
    if body.response_format not in (None, "b64_json", "url"):
        raise ApiError(
            f"`response_format` must be b64_json or url, got {shown(body.response_format)}.", param="response_format"
        )
    if body.output_format not in (None, *FORMATS):
        raise ApiError(
            f"`output_format` must be one of {', '.join(FORMATS)}, got {shown(body.output_format)}.",
            param="output_format",
        )
    _check_extras(body)
    steps = body.num_inference_steps
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ApiError(
            f"`num_inference_steps` must be from 1 to {MAX_STEPS}, got {steps}.", param="num_inference_steps"
        )
    seed = body.rng_seed if body.seed is None else body.seed
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ApiError(f"`seed` must be from 0 to {MAX_SEED}, got {seed}.", param="seed")
    first = random.randint(0, MAX_SEED) if seed is None else seed
    width, height = _size(pipe, body.size, sources[0][0] if sources else None)
    longest = LONGEST.get(body.output_format or "", max(width, height))
    if max(width, height) > longest:
        raise ApiError(f"`size` {width}x{height} is too long for {body.output_format}: png has no limit.", param="size")
    row = {"prompt": body.prompt, "negative_prompt": body.negative_prompt}
    rows = [row | {"image": image, "mask_image": mask} for image, mask in sources or [(None, None)]]
    rows = [row for row in rows for _ in range(count)]
    shared = {
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": body.guidance_scale,
        "preset": body.preset or "exact",
        "solver": body.solver,
    }
    if sources:
        shared |= {"strength": body.strength, "overlay": sources[0][1] is not None}
    elif body.strength is not None:
        raise ApiError("`strength` goes with /images/edits, which starts from a picture.", param="strength")
    return [row | {"seed": (first + i) % (MAX_SEED + 1)} for i, row in enumerate(rows)], shared


def _check_extras(body: ImageRequest) -> None:
    """Refuse OpenAI's fields that are not supported here, unless they have a value that changes nothing."""
    if body.stream or body.partial_images:
        name = "stream" if body.stream else "partial_images"
        raise ApiError(f"`{name}` is not offered: pictures come when they are finished.", param=name)
    if body.background not in (None, "auto", "opaque"):
        raise ApiError(
            f"`background` must be auto or opaque, got {shown(body.background)}: this model paints whole pictures.",
            param="background",
        )
    compression, is_png = body.output_compression, (body.output_format or "png") == "png"
    if compression is not None and not (compression == 100 if is_png else 0 <= compression <= 100):
        allowed = "100, png being exact" if is_png else "from 0 to 100"
        raise ApiError(f"`output_compression` must be {allowed}, got {compression}.", param="output_compression")


def _size(pipe: OVStableDiffusionPipeline, size: str | None, image: Image.Image | None) -> tuple[int, int]:
    if size in (None, "", "auto"):
        if image is None:
            return pipe.default_size
        return fit_size(*image.size, pipe.default_size[0] * pipe.default_size[1], pipe.size_factor)
    found = SIZE.fullmatch(size)
    if found is None or any(int(side) % pipe.size_factor or int(side) == 0 for side in found.groups()):
        raise ApiError(
            f"`size` must be auto or WIDTHxHEIGHT, both multiples of {pipe.size_factor}, got {shown(size)}.",
            param="size",
        )
    return int(found[1]), int(found[2])


async def _finished(batcher: Batcher, job: ImageJob, request: Request, timeout: float) -> list[Image.Image]:
    """The pictures of a job; it is abandoned when its client leaves or its time is up."""
    try:
        batcher.submit(job)
    except QueueIsFull as error:
        raise ApiError(
            "Too many requests are waiting.", 429, code="rate_limit_exceeded", Retry_After=f"{error.seconds:.0f}"
        ) from error
    except RuntimeError as error:
        raise ApiError(str(error), 503) from error
    end = time.monotonic() + timeout
    waiting = asyncio.wrap_future(job.future)
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.2)
            if not waiting.done() and (await request.is_disconnected() or time.monotonic() > end):
                raise ApiError(f"The pictures were not finished within {timeout:.0f} s.", 504, code="timeout")
    finally:
        if not waiting.done():  # also if the server itself cancels the request
            batcher.queue.give_up(job)
    try:
        return waiting.result()
    except ModelDirError as error:
        logger.error("%s", error)
        raise ApiError("The server's models cannot be used.", 500) from error
    except ValueError as error:
        named = re.match(r"`(\w+)`", str(error))
        raise ApiError(str(error), param=named[1] if named else None) from error
    except asyncio.CancelledError as error:
        raise ApiError("The server is being stopped.", 503) from error
    except FloatingPointError as error:
        raise ApiError(f"The picture could not be made: {error}", 500) from error
    except Exception as error:  # whatever it is, the client gets it in OpenAI's form
        logger.exception("a picture could not be made")
        raise ApiError(f"The picture could not be made ({type(error).__name__}).", 500) from error


def _encoded(pictures: list[Image.Image], body: ImageRequest, job: ImageJob) -> list[dict[str, Any]]:
    """Pictures in the requested form; a URL holds the picture itself, so that no file has to be kept here."""
    data, options, output_format = [], {}, body.output_format or "png"
    if output_format != "png":  # OpenAI's "compression" is what others call quality
        options["quality"] = QUALITY if body.output_compression is None else body.output_compression
    for picture, row in zip(pictures, job.rows, strict=True):
        written = io.BytesIO()
        picture.save(written, FORMATS[output_format], **options)
        coded = base64.b64encode(written.getvalue()).decode()
        as_url = body.response_format == "url"
        one = {"url": f"data:image/{output_format};base64,{coded}"} if as_url else {"b64_json": coded}
        data.append(one | {"seed": row["seed"]})
    return data


async def _read_form(request: Request, pipe: OVStableDiffusionPipeline) -> tuple[ImageRequest, list[Source]]:
    """The fields of a form, and its pictures, resized to the size to generate at."""
    try:
        form = await request.form(max_files=MAX_PICTURES + 1, max_part_size=1_000_000)
    except HTTPException as error:
        if error.status_code in (408, 413):
            raise
        raise ApiError(f"The form cannot be read: {error.detail}") from error
    except (LookupError, UnicodeError) as error:  # an unknown or a wrong encoding
        raise ApiError(f"The form cannot be read: {shown(str(error))}") from error
    fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
    uploads = [(name.removesuffix("[]"), one) for name, one in form.multi_items() if isinstance(one, UploadFile)]
    files = {name: [one for other, one in uploads if other == name] for name, _ in uploads}
    if "image" not in files or not files.keys() <= {"image", "mask"}:
        raise ApiError("Send the picture as the file `image`, and a mask as the file `mask`.", param="image")
    if "mask" in files and len(uploads) != 2:
        raise ApiError("A `mask` goes with one `image`: send pictures with masks one at a time.", param="mask")
    try:
        body = ImageRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    mask = await files["mask"][0].read() if "mask" in files else None
    sources: list[Source] = []
    for file in files["image"]:
        size = body.size if not sources else "{}x{}".format(*sources[0][0].size)  # all get the first one's size
        reading = asyncio.get_running_loop().run_in_executor(READER, _source, await file.read(), mask, pipe, size)
        sources.append(await reading)
    return body, _all_masked_or_none(sources)


def _source(data: bytes, mask_data: bytes | None, pipe: OVStableDiffusionPipeline, size: str | None) -> Source:
    """A picture and its mask, resized to the size to generate at, so that large uploads do not wait in the queue.

    Without a mask, the picture's own transparency is the mask, as in OpenAI's interface.
    """
    picture = _decoded(data, "image")
    try:
        image = to_rgb(picture)
        mask = _own_mask(picture) if mask_data is None else _white_where_edited(_decoded(mask_data, "mask"))
    except ValueError as error:
        raise ApiError("`image` is damaged.", param="image") from error
    target = _size(pipe, size, image)
    if mask is not None:
        mask = resize(resize(mask, image.size, "stretch"), target, "crop")
    return resize(image, target, "crop"), mask


def _all_masked_or_none(sources: list[Source]) -> list[Source]:
    """If some pictures are masked by their transparency, the others get a mask that repaints them as a whole."""
    if all(mask is None for _, mask in sources):
        return sources
    return [(image, Image.new("L", image.size, 255) if mask is None else mask) for image, mask in sources]


def _decoded(data: bytes, name: str) -> Image.Image:
    try:
        picture = open_picture(data)
    except UploadError as error:
        raise ApiError(f"`{name}` {error}.", param=name) from error
    try:
        picture.load()
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise ApiError(f"`{name}` is damaged.", param=name) from error
    return picture


def _white_where_edited(mask: Image.Image) -> Image.Image:
    """A mask that is white where OpenAI's mask is transparent; a mask without transparency is used as it is."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    return ImageOps.invert(with_alpha(mask).getchannel("A"))


def _own_mask(picture: Image.Image) -> Image.Image | None:
    if not picture.has_transparency_data:
        return None
    alpha = with_alpha(upright(picture)).getchannel("A")
    return None if alpha.getextrema() == (255, 255) else ImageOps.invert(alpha)
