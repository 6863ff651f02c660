"""A server that OpenAI's clients speak to: pictures from prompts, and edits of pictures, over HTTP.

The interface is the one of OpenAI's public API reference, "Images", with the fields that OpenVINO Model Server adds to
it (``num_inference_steps``, ``guidance_scale``, ``negative_prompt``, ``rng_seed``); ``/v3`` is its path.
"""

import asyncio
import base64
import hmac
import io
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import prometheus_client as prometheus
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ov_decidiffusion.arguments import check_range, check_whole, shown
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.generation.images import fit_size, to_rgb
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.server.batching import Batcher, Job, QueueIsFull
from ov_decidiffusion.web.guards import THIS_MACHINE_ONLY, check_api_key
from ov_decidiffusion.web.limits import MAX_SEED, MAX_STEPS, MAX_UPLOAD, why_not_read

logger = logging.getLogger(__name__)

MAX_PICTURES = 10  # of a request, as in OpenAI's interface
MAX_WAITING, MAX_BATCH, MAX_TIMEOUT = 100_000, 1000, 86_400  # requests, pictures, seconds
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
LONGEST = {"jpeg": 65_500, "webp": 16_383}  # pixels of a side that can be written
PREFIXES = ("/v1", "/v3")
READER = ThreadPoolExecutor(1, "reader")  # a large picture takes seconds and 0.5 GB: one at a time, others are answered
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Refused(Exception):
    """What a client is told instead of pictures, in the form of OpenAI's errors."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, **headers: str
    ):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Asked(BaseModel):
    """What a request for pictures may hold. Fields of OpenAI's that mean nothing here are taken and left alone."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = "auto"
    response_format: str | None = "b64_json"
    output_format: str | None = "png"
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    seed: int | None = None
    rng_seed: int | None = None
    preset: str | None = None
    solver: str | None = None
    quality: Any = None
    style: Any = None
    background: Any = None
    moderation: Any = None
    output_compression: Any = None
    input_fidelity: Any = None
    user: Any = None


class Metrics:
    """What ``/metrics`` tells, in Prometheus's format."""

    def __init__(self, batcher: Batcher):
        self.registry = prometheus.CollectorRegistry()
        named = {"namespace": "ov_decidiffusion", "registry": self.registry}
        self.answers = prometheus.Counter("answers", "Requests for pictures, by status", ["status"], **named)
        self.pictures = prometheus.Counter("pictures", "Pictures made", **named)
        buckets = (0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320)
        self.seconds = prometheus.Histogram("seconds", "From request to answer", buckets=buckets, **named)
        waiting = prometheus.Gauge("waiting", "Requests in the queue", **named)
        waiting.set_function(lambda: batcher.waiting)


class LimitedBody:
    """Refuses bodies that are too large, told or not how large they are."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if told.isdigit() and int(told) > MAX_UPLOAD:
            too_large = self._refused()
            await JSONResponse(too_large.body, too_large.status)(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MAX_UPLOAD:
                raise self._refused()
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)

    @staticmethod
    def _refused() -> Refused:
        return Refused(f"The request is larger than {MAX_UPLOAD // 10**6} MB.", 413)


class Answers:
    """What is answered at each address.

    Args:
        pipe: the pipeline to generate with.
        max_waiting, max_batch, timeout: as of ``create_app``.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, max_waiting: int, max_batch: int, timeout: float):
        self._pipe, self._timeout = pipe, timeout
        self.batcher = Batcher(pipe, max_waiting, max_batch)
        self._metrics = Metrics(self.batcher)
        self._model = str(pipe.origin.get("checkpoint") or "decidiffusion").rsplit("/", 1)[-1]
        self._began = int(time.time())

    async def generations(self, request: Request, asked: Asked) -> Any:
        return await self._pictures(request, asked, None, None)

    async def edits(self, request: Request) -> Any:
        asked, image, mask = await _read_form(request)
        return await self._pictures(request, asked, image, mask)

    def models(self) -> Any:
        return {"object": "list", "data": [self.one_model(self._model)]}

    def one_model(self, name: str) -> Any:
        if name != self._model:
            raise _no_such_model(name, self._model)
        return {"id": self._model, "object": "model", "created": self._began, "owned_by": "ov_decidiffusion"}

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "model": self._model, "waiting": self.batcher.waiting}

    def metrics(self) -> PlainTextResponse:
        text = prometheus.generate_latest(self._metrics.registry).decode()
        return PlainTextResponse(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _pictures(
        self, request: Request, asked: Asked, image: Image.Image | None, mask: Image.Image | None
    ) -> dict[str, Any]:
        start, output_format = time.perf_counter(), asked.output_format or "png"
        try:
            job = make_job(self._pipe, self._model, asked, image, mask)
            pictures = await _finished(self.batcher, job, request, self._timeout)
            data = await asyncio.to_thread(_encoded, pictures, output_format, job)
        except Refused as error:
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
) -> FastAPI:
    """The server's application, for uvicorn or any other ASGI server.

    Args:
        pipe: the pipeline to generate with.
        api_key: what clients have to send as a bearer token; None lets everybody in.
        max_waiting: requests that may wait; further ones are answered 429 with Retry-After.
        max_batch: pictures that run together at most, those of several requests if all their settings are the same.
        timeout: seconds after which a request is answered 504.

    Raises:
        ValueError: the key is empty, or a number is out of its range.
    """
    check_api_key(api_key)
    check_serving(max_waiting, max_batch, timeout)
    answers = Answers(pipe, max_waiting, max_batch, timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answers.batcher.close)

    async def allowed(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refused("Send the API key as a bearer token.", 401, code="invalid_api_key")

    app = FastAPI(title="DeciDiffusion on OpenVINO", lifespan=lifespan)
    app.add_middleware(LimitedBody)
    for prefix in PREFIXES:
        behind_key = {"dependencies": [Depends(allowed)], "include_in_schema": prefix == PREFIXES[0]}
        app.post(f"{prefix}/images/generations", **behind_key)(answers.generations)
        app.post(f"{prefix}/images/edits", **behind_key)(answers.edits)
        app.get(f"{prefix}/models", **behind_key)(answers.models)
        app.get(f"{prefix}/models/{{name:path}}", **behind_key)(answers.one_model)
    app.get("/health")(answers.health)
    app.get("/metrics", dependencies=[Depends(allowed)])(answers.metrics)
    _say_errors_as_openai_does(app)
    return app


def check_serving(max_waiting: Any, max_batch: Any, timeout: Any) -> None:
    """Refuse numbers with which nothing would be answered; arguments as of ``create_app``."""
    check_whole("max_waiting", max_waiting, 1, MAX_WAITING)
    check_whole("max_batch", max_batch, 1, MAX_BATCH)
    check_range("timeout", timeout, 0.1, MAX_TIMEOUT)


def on_this_machine_only(app: FastAPI) -> None:
    """Answer under this machine's own names only, and no page of another site."""
    for guard in THIS_MACHINE_ONLY:
        app.add_middleware(guard.cls, **guard.kwargs)


def make_job(
    pipe: OVStableDiffusionPipeline, model: str, asked: Asked, image: Image.Image | None, mask: Image.Image | None
) -> Job:
    """What is to be made, from what was asked for.

    Raises:
        Refused: a field has a wrong value; the message says which, and what is allowed.
    """
    if asked.model not in (None, "", model):
        raise _no_such_model(asked.model, model)
    count = 1 if asked.n is None else asked.n
    if not 1 <= count <= MAX_PICTURES:
        raise Refused(f"`n` must be from 1 to {MAX_PICTURES}, got {count}.", param="n")
    if asked.response_format not in (None, "b64_json"):
        raise Refused(
            f"`response_format` must be b64_json, got {asked.response_format!r}: nothing is kept here to link to.",
            param="response_format",
        )
    if asked.output_format not in (None, *FORMATS):
        raise Refused(
            f"`output_format` must be one of {', '.join(FORMATS)}, got {asked.output_format!r}.", param="output_format"
        )
    steps = asked.num_inference_steps
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise Refused(f"`num_inference_steps` must be from 1 to {MAX_STEPS}, got {steps}.", param="num_inference_steps")
    seed = asked.rng_seed if asked.seed is None else asked.seed
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise Refused(f"`seed` must be from 0 to {MAX_SEED}, got {seed}.", param="seed")
    first = random.randint(0, MAX_SEED) if seed is None else seed
    width, height = _size(pipe, asked.size, image)
    longest = LONGEST.get(asked.output_format or "", max(width, height))
    if max(width, height) > longest:
        raise Refused(f"`size` {width}x{height} is too long for {asked.output_format}: png has no bound.", param="size")
    row = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt, "image": image, "mask_image": mask}
    shared = {
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": asked.guidance_scale,
        "preset": asked.preset or "exact",
        "solver": asked.solver,
    }
    if image is not None:
        shared |= {"strength": asked.strength, "overlay": mask is not None}
    elif asked.strength is not None:
        raise Refused("`strength` goes with /images/edits, which starts from a picture.", param="strength")
    return Job([row | {"seed": (first + i) % (MAX_SEED + 1)} for i in range(count)], shared)


def _size(pipe: OVStableDiffusionPipeline, asked: str | None, image: Image.Image | None) -> tuple[int, int]:
    if asked in (None, "", "auto"):
        if image is None:
            return pipe.default_size
        return fit_size(*image.size, pipe.default_size[0] * pipe.default_size[1], pipe.size_factor)
    found = SIZE.fullmatch(asked)
    if found is None or any(int(side) % pipe.size_factor or int(side) == 0 for side in found.groups()):
        raise Refused(
            f"`size` must be auto or WIDTHxHEIGHT, both multiples of {pipe.size_factor}, got {asked!r}.", param="size"
        )
    return int(found[1]), int(found[2])


async def _finished(batcher: Batcher, job: Job, request: Request, timeout: float) -> list[Image.Image]:
    """The pictures of a job; it is given up when its client leaves or its time is up."""
    try:
        batcher.submit(job)
    except QueueIsFull as error:
        raise Refused(
            "Too many requests are waiting.", 429, code="rate_limit_exceeded", Retry_After=f"{error.seconds:.0f}"
        ) from error
    except RuntimeError as error:
        raise Refused(str(error), 503) from error
    end = time.monotonic() + timeout
    waiting = asyncio.wrap_future(job.future)
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.2)
            if not waiting.done() and (await request.is_disconnected() or time.monotonic() > end):
                raise Refused(f"The pictures were not finished within {timeout:.0f} s.", 504, code="timeout")
    finally:
        job.cancelled = not waiting.done()  # also where the server itself gives the request up
    try:
        return waiting.result()
    except ModelDirError as error:
        logger.error("%s", error)
        raise Refused("The server's models cannot be used.", 500) from error
    except ValueError as error:
        named = re.match(r"`(\w+)`", str(error))
        raise Refused(str(error), param=named[1] if named else None) from error
    except asyncio.CancelledError as error:
        raise Refused("The server is being stopped.", 503) from error
    except FloatingPointError as error:
        raise Refused(f"The picture could not be made: {error}", 500) from error
    except Exception as error:  # whatever it is, the client is told in the form that it reads
        logger.exception("a picture could not be made")
        raise Refused(f"The picture could not be made ({type(error).__name__}).", 500) from error


def _encoded(pictures: list[Image.Image], output_format: str, job: Job) -> list[dict[str, Any]]:
    data = []
    for picture, row in zip(pictures, job.rows, strict=True):
        written = io.BytesIO()
        picture.save(written, FORMATS[output_format])
        data.append({"b64_json": base64.b64encode(written.getvalue()).decode(), "seed": row["seed"]})
    return data


async def _read_form(request: Request) -> tuple[Asked, Image.Image, Image.Image | None]:
    """The fields of a form, its picture, and a mask that is white where the form's is transparent.

    A mask without transparency is taken as it is.
    """
    try:
        form = await request.form(max_files=4, max_part_size=1_000_000)
    except HTTPException as error:
        raise Refused(f"The form cannot be read: {error.detail}") from error
    fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
    uploads = [(name.removesuffix("[]"), one) for name, one in form.multi_items() if isinstance(one, UploadFile)]
    files = dict(uploads)
    if len(files) < len(uploads):
        raise Refused("Send one `image` and at most one `mask`.", param="image")
    unknown = sorted(set(files) - {"image", "mask"})
    if unknown or "image" not in files:
        raise Refused("Send the picture as the file `image`, and a mask as the file `mask`.", param="image")
    try:
        asked = Asked.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    image = await _read_picture(files["image"], "image", to_rgb)
    mask = await _read_picture(files["mask"], "mask", _white_where_edited) if "mask" in files else None
    return asked, image, mask


async def _read_picture(file: UploadFile, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    data = await file.read()

    def read() -> Image.Image:
        picture = Image.open(io.BytesIO(data))
        if reason := why_not_read(picture):
            raise Refused(f"`{name}` {reason}.", param=name)
        picture.load()
        return convert(picture)

    try:
        return await asyncio.get_running_loop().run_in_executor(READER, read)
    except Refused:
        raise
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise Refused(f"`{name}` cannot be read as a picture.", param=name) from error


def _white_where_edited(mask: Image.Image) -> Image.Image:
    if not mask.has_transparency_data:
        return mask.convert("L")
    alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    return Image.fromarray(255 - alpha)


def _no_such_model(name: str, served: str) -> Refused:
    return Refused(f"There is no model {name!r} here, only {served!r}.", 404, param="model", code="model_not_found")


def _say_errors_as_openai_does(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] and first["type"] != "json_invalid" else None
        if name in (None, "body"):
            refusal = Refused(f"The request is no JSON object with the fields of a request: {first['msg']}.")
        elif first["type"] == "extra_forbidden":
            known = ", ".join(Asked.model_fields)
            refusal = Refused(f"`{name}` is no field of a request; there are {known}.", param=name)
        elif first["type"] == "missing":
            refusal = Refused(f"`{name}` is missing.", param=name)
        else:
            refusal = Refused(f"`{name}`: {first['msg']}, got {shown(first['input'])}.", param=name)
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(Refused(str(error.detail), error.status_code).body, error.status_code)
