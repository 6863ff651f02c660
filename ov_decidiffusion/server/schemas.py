"""The server's requests and errors, in the form of OpenAI's images API."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from ov_decidiffusion.arguments import shown


class ApiError(Exception):
    """An error to answer with, in the form of OpenAI's errors."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, **headers: str
    ):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ImageRequest(BaseModel):
    """The fields of a request for pictures; OpenAI's fields without effect here, such as ``user``, are accepted."""

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
    background: str | None = None
    moderation: Any = None
    output_compression: int | None = None
    input_fidelity: Any = None
    stream: bool | None = None
    partial_images: int | None = None
    user: Any = None


def no_such_model(name: str, served: str) -> ApiError:
    return ApiError(
        f"There is no model {shown(name)} here, only {served!r}.", 404, param="model", code="model_not_found"
    )


def answer_errors_as_openai_does(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] and first["type"] != "json_invalid" else None
        if name in (None, "body"):
            refusal = ApiError(f"The request is no JSON object with the fields of a request: {first['msg']}.")
        elif first["type"] == "extra_forbidden":
            known = ", ".join(ImageRequest.model_fields)
            refusal = ApiError(f"`{name}` is no field of a request; there are {known}.", param=name)
        elif first["type"] == "missing":
            refusal = ApiError(f"`{name}` is missing.", param=name)
        else:
            refusal = ApiError(f"`{name}`: {first['msg']}, got {shown(first['input'])}.", param=name)
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(str(error.detail), error.status_code).body, error.status_code)
