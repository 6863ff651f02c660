"""The command: the demo, which starts without one; ``serve`` for programs; ``bulk`` for many pictures; ``convert`` and
``quantize`` for folders."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ov_decidiffusion.errors import DeciDiffusionError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.web.queue import Queue

COMMANDS = ("demo", "serve", "bulk", "convert", "quantize")
EXTRAS = {
    "gradio": "demo",
    "starlette": "demo",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "nncf": "quantize",
    "rich": "quantize",
    "pyarrow": "bulk",
    "ray": "scale",
}
QUANTIZE_HELP = (
    "make the INT8 models first that the faster presets need, unless they are there: a minute for the embedded "
    "checkpoint, much longer and 16 GB of memory for the real one"
)
INTERRUPTED = 130  # what shells expect of a process that a signal ended: 128 and its number
ENDING = ("SIGTERM", "SIGHUP")  # SIGHUP comes where a terminal is closed; Windows has none


def main() -> None:
    """Run the command line; errors of the user's are one line, and end with status 1."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments = ["demo", *arguments]
    options = _parser().parse_args(arguments)
    for ending in (getattr(signal, name) for name in ENDING if hasattr(signal, name)):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, _end)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (DeciDiffusionError, ValueError, OSError, ArithmeticError) as error:
        port = getattr(options, "port", None)
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        sys.exit(f"error: port {port} is taken: choose another" if taken else f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(
            f"error: {error.name} is not installed: pip install '.[{EXTRAS[error.name]}]' in the repository's folder"
        )


def _end(number: int, _: object) -> None:
    """End in order, once: a terminal that is closed sends its signal twice."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ov-decidiffusion",
        description="DeciDiffusion on OpenVINO. Without a command, the demo starts, and takes its options.",
        epilog="COMMAND --help lists the options of each, such as: ov-decidiffusion demo --help",
    )
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    source, running = _source_options(), _running_options()
    _add_demo(commands.add_parser("demo", parents=[source, running], help="convert if needed, and serve the demo"))
    _add_serve(
        commands.add_parser("serve", parents=[source, running], help="the same for programs: OpenAI's images API")
    )
    _add_bulk(commands.add_parser("bulk", parents=[source, running], help="pictures of all prompts of a file"))
    _add_convert(commands.add_parser("convert", parents=[source], help="make the model folder of a checkpoint"))
    _add_quantize(commands.add_parser("quantize", help="make the INT8 models of a model folder"))
    return parser


def _source_options() -> argparse.ArgumentParser:
    """What the models are made from, and where they go."""
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--checkpoint", help="a folder or a hub id; by default the embedded one")
    source.add_argument("--revision", help="branch, tag or commit of a hub id")
    source.add_argument(
        "--model-dir", help="where the OpenVINO models go; by default models/<checkpoint>-<weight format>"
    )
    source.add_argument("--allow-pickles", action="store_true", help="take weights that are no safetensors")
    source.add_argument("--check", action="store_true", help="compare all files of the model folder with their hashes")
    return source


def _running_options() -> argparse.ArgumentParser:
    """What the models run on."""
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--quantize", action="store_true", help=QUANTIZE_HELP)
    running.add_argument("--device", default="CPU", help="any OpenVINO device string; by default %(default)s")
    running.add_argument("--inference-precision", default="auto", choices=("auto", "f32", "bf16", "f16"))
    running.add_argument("--threads", type=int, help="to compute with; by default all cores")
    return running


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with a password")
    demo.add_argument("--auth", metavar="USER:PASSWORD", help="what to ask for; made and printed for other hosts")
    demo.add_argument("--no-auth", action="store_true", help="let everybody in")
    demo.add_argument("--port", type=int, help="by default the first free one from 7860")
    demo.set_defaults(run=_demo)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with an API key")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument(
        "--api-key", default=os.environ.get("OV_DECIDIFFUSION_API_KEY"), help="what clients have to send"
    )
    serve.add_argument("--no-auth", action="store_true", help="let everybody in")
    serve.add_argument("--demo", action="store_true", help="the demo too, at /demo; its password is the API key")
    serve.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; by default %(default)s")
    serve.add_argument("--max-batch", type=int, default=4, help="pictures that run together; by default %(default)s")
    serve.add_argument("--timeout", type=float, default=600, help="seconds for a request; by default %(default)s")
    serve.set_defaults(run=_serve)


def _add_bulk(bulk: argparse.ArgumentParser) -> None:
    bulk.add_argument("prompts", help="a .txt file of prompts; or .csv, .jsonl or .parquet with arguments as columns")
    bulk.add_argument("--out", required=True, help="a new folder, or one to continue")
    bulk.add_argument("--actors", type=int, help="pipelines at once, on Ray; by default one, without it")
    bulk.add_argument("--ray-address", help="of a cluster; by default Ray is started here, for --actors")
    bulk.add_argument("--format", default="png", choices=("png", "webdataset"))
    presets = ("exact", "balanced", "fast")
    bulk.add_argument("--preset", choices=presets, help="for rows that say nothing else")
    bulk.set_defaults(run=_bulk)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("--weight-format", default="fp16", choices=("fp16", "fp32"))
    convert.add_argument("--verify", action="store_true", help="compare every model with PyTorch, whatever its size")
    convert.set_defaults(run=_convert)


def _add_quantize(quantize: argparse.ArgumentParser) -> None:
    quantize.add_argument("model_dir", help="a folder that was converted, such as models/tiny-decidiffusion-fp16")
    quantize.add_argument("--mode", default="int8", choices=("int8", "int8-weights", "int4-weights"))
    quantize.add_argument("--prompts", type=int, help="how many calibration prompts to run; by default all")
    quantize.set_defaults(run=_quantize)


def _convert(options: argparse.Namespace) -> Path:
    from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
    from ov_decidiffusion.conversion.convert import convert_checkpoint

    report = convert_checkpoint(
        options.checkpoint or EMBEDDED_CHECKPOINT,
        options.model_dir,
        weight_format=getattr(options, "weight_format", "fp16"),
        verify=True if getattr(options, "verify", False) else None,
        revision=options.revision,
        allow_pickles=options.allow_pickles,
    )
    print(report if report.converted else report.place)
    return _checked(report.model_dir, options)


def _checked(model_dir: Path, options: argparse.Namespace) -> Path:
    if options.check:
        from ov_decidiffusion.model_folder.integrity import verify_model_dir
        from ov_decidiffusion.model_folder.layout import QUANTIZATION_REPORT, quantized_sibling

        folders, int8 = [model_dir], quantized_sibling(model_dir)
        if int8 != model_dir and (int8 / QUANTIZATION_REPORT).is_file():
            folders.append(int8)
        for folder in folders:
            verify_model_dir(folder)
            print(f"{folder} is as it was written")
    return model_dir


def _quantize(options: argparse.Namespace) -> None:
    from ov_decidiffusion.quantize import quantize_models

    print(quantize_models(options.model_dir, options.mode, options.prompts))


def _demo(options: argparse.Namespace) -> None:
    from ov_decidiffusion.demo.app import make_demo
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.web.limits import LOOPBACK

    auth = _credentials(options.host in LOOPBACK, options.auth, options.no_auth)
    _check_port(options)
    model_dir = _prepared(options)
    with _folder_for_pictures():
        pipe = OVStableDiffusionPipeline.from_pretrained(
            model_dir, options.device, options.inference_precision, threads=options.threads
        )
        print(f"precision: {pipe.inference_precision}")
        demo = make_demo(pipe)
        try:
            demo.launch(server_name=options.host, server_port=options.port, auth=auth, prevent_thread_lock=True)
            threading.Event().wait()
        finally:
            demo.close(verbose=False)
            pipe.close()  # a process that ends while models run is aborted


def _check_port(options: argparse.Namespace) -> None:
    """A port that is taken, or a host that is not this machine's, is told now, not after everything was loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port or 0), family=family):
        pass


def _prepared(options: argparse.Namespace) -> Path:
    """The model folder, converted unless it is there, and quantized where that was asked for."""
    from ov_decidiffusion.arguments import check_path
    from ov_decidiffusion.model_folder.integrity import check_model_dir
    from ov_decidiffusion.model_folder.layout import graph_file
    from ov_decidiffusion.runtime.loading import check_loading

    check_loading(options.device, options.inference_precision, threads=options.threads)
    given = None if options.model_dir is None else check_path("model_dir", options.model_dir)
    if options.checkpoint is None and given is not None and graph_file(given, "unet").is_file():
        check_model_dir(given)  # whatever it was made of
        model_dir = _checked(given, options)
    else:
        model_dir = _convert(options)
    if options.quantize:
        from ov_decidiffusion.quantize import quantize_models  # NNCF takes seconds to import

        print(quantize_models(model_dir))
    return model_dir


def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.server.app import check_serving, create_app, on_this_machine_only
    from ov_decidiffusion.web.guards import check_api_key
    from ov_decidiffusion.web.limits import LOOPBACK
    from ov_decidiffusion.web.queue import Queue

    local = options.host in LOOPBACK
    check_api_key(options.api_key)
    check_serving(options.max_waiting, options.max_batch, options.timeout)
    if options.api_key is None and not local and not options.no_auth:
        options.api_key = secrets.token_urlsafe(18)
        print(f"API key: {options.api_key} (--api-key sets it, --no-auth asks for none)")
    _check_port(options)
    pipe = OVStableDiffusionPipeline.from_pretrained(
        _prepared(options), options.device, options.inference_precision, threads=options.threads
    )
    pipe.set_progress_bar_config(disable=True)
    print(f"precision: {pipe.inference_precision}", flush=True)
    queue = Queue(options.max_waiting)
    app = create_app(pipe, options.api_key, options.max_waiting, options.max_batch, options.timeout, queue)
    if local:
        on_this_machine_only(app)
    address = f"http://[{options.host}]" if ":" in options.host else f"http://{options.host}"
    print(f"for OpenAI's clients: {address}:{options.port}/v1", flush=True)
    try:
        with _demo_beside(app, pipe, queue, options, address) if options.demo else contextlib.nullcontext():
            # Ends gracefully, and then raises the signal that ended it once more.
            uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=60)
    finally:
        pipe.close()


@contextlib.contextmanager
def _demo_beside(
    app: FastAPI, pipe: OVStableDiffusionPipeline, queue: Queue, options: argparse.Namespace, address: str
) -> Iterator[None]:
    from ov_decidiffusion.demo.app import mount_demo

    with _folder_for_pictures():
        demo = mount_demo(app, pipe, options.api_key, queue)
        print(f"the demo: {address}:{options.port}/demo", flush=True)
        try:
            yield
        finally:
            demo.close(verbose=False)


def _bulk(options: argparse.Namespace) -> None:
    import pyarrow  # noqa: F401  missing, it is told before anything is converted

    from ov_decidiffusion.arguments import check_path, check_whole
    from ov_decidiffusion.bulk.generate import generate
    from ov_decidiffusion.bulk.rows import read_rows

    check_path("out", options.out)
    if options.actors is not None:
        check_whole("actors", options.actors, 1)
    for _ in read_rows(options.prompts):  # what cannot be read is refused now, not after the conversion
        pass
    manifest = generate(
        options.prompts,
        _prepared(options),
        options.out,
        actors=options.actors,
        threads=options.threads,
        ray_address=options.ray_address,
        output_format=options.format,
        device=options.device,
        inference_precision=options.inference_precision,
        **({} if options.preset is None else {"preset": options.preset}),
    )
    print(f"the pictures and what they were made with: {manifest}")


@contextlib.contextmanager
def _folder_for_pictures() -> Iterator[None]:
    """Where Gradio keeps uploads and results, which goes with the process."""
    with tempfile.TemporaryDirectory(prefix="ov_decidiffusion-pictures-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def _credentials(local: bool, given: str | None, none: bool) -> tuple[str, str] | None:
    """The user and password to ask for; other machines are let in without only where that was asked for."""
    if none or (given is None and local):
        return None
    user, _, password = (f"demo:{secrets.token_urlsafe(9)}" if given is None else given).partition(":")
    if not user or not password:
        raise ValueError(f"--auth must be USER:PASSWORD, got {given!r}")
    if given is None:
        print(f"user: {user}, password: {password} (--auth sets them, --no-auth asks for none)")
    return user, password
