"""The command line: ``ov-decidiffusion``, or ``python -m ov_decidiffusion``; without a command, the demo."""

import argparse
import errno
import os
import signal
import sys

from ov_decidiffusion import __version__
from ov_decidiffusion.cli import commands, generate
from ov_decidiffusion.errors import DeciDiffusionError

EPILOG = """examples:
  ov-decidiffusion generate "an owl in a forest at night" -o owl.png
  ov-decidiffusion demo
  ov-decidiffusion demo --checkpoint Deci/DeciDiffusion-v1-0

Without a command, the demo starts. COMMAND --help lists the options of a command. Everything is converted when it is
first needed; the checkpoint that comes with the repository needs no network.
"""
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
    "first make the INT8 models that the faster presets need, unless they exist: half a minute for the embedded "
    "checkpoint, some minutes and 5 GB of memory for the real one"
)
INTERRUPTED = 130  # the exit status for a process ended by a signal: 128 plus the signal's number
ENDING = ("SIGTERM", "SIGHUP")  # SIGHUP comes when a terminal is closed; Windows does not have it


def main() -> None:
    """Run the command line; the user's mistakes are reported in one line, with exit status 1."""
    for name in ("stdout", "stderr"):  # None without a console, but libraries write to them all the same
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until the process ends
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["demo", *arguments]
    options = _parser(arguments[0]).parse_args(arguments)
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
    """End in an orderly way, once: closing a terminal sends the signal twice."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser; the many options of ``generate`` are added only if they are needed."""
    parser = argparse.ArgumentParser(
        prog="ov-decidiffusion",
        description="Images from words, and from other images, with DeciDiffusion on OpenVINO.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    source, running = _source_options(), _running_options()
    made = parsers.add_parser("generate", parents=[source, running], help="make one picture, or a few, into files")
    made.set_defaults(run=commands.generate)
    if command == "generate":
        generate.add_options(made)
    _add_demo(parsers.add_parser("demo", parents=[source, running], help="open the interactive page in a browser"))
    _add_serve(parsers.add_parser("serve", parents=[source, running], help="serve OpenAI's images API"))
    _add_bulk(parsers.add_parser("bulk", parents=[source, running], help="make a picture of every row of a table"))
    _add_convert(parsers.add_parser("convert", parents=[source], help="convert a checkpoint to OpenVINO models"))
    _add_quantize(parsers.add_parser("quantize", help="make the INT8 models that the faster presets use"))
    _add_doctor(parsers.add_parser("doctor", help="check a checkpoint from its files to its pictures, and report"))
    return parser


def _source_options() -> argparse.ArgumentParser:
    """Options for the models' source and folder."""
    source = argparse.ArgumentParser(add_help=False)
    group = source.add_argument_group("the model")
    group.add_argument("--checkpoint", help="a folder or a hub id; by default the embedded one")
    group.add_argument("--revision", help="a branch, tag or commit of the hub's repository")
    group.add_argument(
        "--model-dir", help="where the OpenVINO models go; by default models/<checkpoint>-<weight format>"
    )
    group.add_argument(
        "--discard-download",
        action="store_true",
        help="delete the downloaded files after their conversion, and say how much is freed",
    )
    group.add_argument("--allow-pickles", action="store_true", help="accept weights that are not safetensors")
    group.add_argument("--check", action="store_true", help="compare all files of the model folder with their hashes")
    return source


def _running_options() -> argparse.ArgumentParser:
    """Options for what the models run on."""
    running = argparse.ArgumentParser(add_help=False)
    group = running.add_argument_group("how it runs")
    group.add_argument("--quantize", action="store_true", help=QUANTIZE_HELP)
    group.add_argument("--device", default="CPU", help="any OpenVINO device string; by default %(default)s")
    group.add_argument("--inference-precision", default="auto", choices=("auto", "f32", "bf16", "f16"))
    group.add_argument("--threads", type=int, help="number of threads to compute with; by default all cores")
    return running


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with a password")
    demo.add_argument("--auth", metavar="USER:PASSWORD", help="the login; made and printed if other machines get in")
    demo.add_argument("--no-auth", action="store_true", help="let everybody in")
    demo.add_argument("--port", type=int, help="by default the first free one from 7860")
    demo.add_argument("--no-save", action="store_true", help="keep no pictures in outputs/ on this machine")
    _add_allowed_host(demo)
    demo.set_defaults(run=commands.demo)


def _add_allowed_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a public host name under which a proxy passes requests on; also turns on the password or key",
    )


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with an API key")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument(
        "--api-key", default=os.environ.get("OV_DECIDIFFUSION_API_KEY"), help="the key that clients have to send"
    )
    serve.add_argument("--no-auth", action="store_true", help="let everybody in")
    _add_allowed_host(serve)
    serve.add_argument("--demo", action="store_true", help="serve the demo too, at /demo; its password is the API key")
    serve.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; by default %(default)s")
    serve.add_argument("--max-batch", type=int, default=4, help="pictures that run together; by default %(default)s")
    serve.add_argument("--timeout", type=float, default=600, help="seconds for each request; by default %(default)s")
    serve.set_defaults(run=commands.serve)


def _add_bulk(bulk: argparse.ArgumentParser) -> None:
    bulk.add_argument("prompts", help="a .txt file of prompts; or .csv, .jsonl or .parquet with arguments as columns")
    bulk.add_argument("--out", required=True, help="a new folder, or one to continue")
    bulk.add_argument("--actors", type=int, help="pipelines at once, on Ray; by default one, without it")
    bulk.add_argument("--ray-address", help="the address of a cluster; by default --actors starts Ray here")
    bulk.add_argument("--format", default="png", choices=("png", "webdataset"))
    presets = ("exact", "balanced", "fast")
    bulk.add_argument("--preset", choices=presets, help="the preset for rows that name none")
    bulk.set_defaults(run=commands.bulk)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("--weight-format", default="fp16", choices=("fp16", "fp32"))
    convert.add_argument("--verify", action="store_true", help="compare every model with PyTorch, whatever its size")
    convert.set_defaults(run=commands.convert)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--checkpoint", help="a folder or a hub id; by default the embedded one")
    doctor.add_argument("--revision", help="a branch, tag or commit of the hub's repository")
    doctor.add_argument("--out", default="doctor", help="the report's folder; by default %(default)s")
    doctor.add_argument("--quick", action="store_true", help="skip the INT8 models and the drawing")
    doctor.set_defaults(run=commands.doctor)


def _add_quantize(quantize: argparse.ArgumentParser) -> None:
    quantize.add_argument("model_dir", help="a converted folder, such as models/tiny-decidiffusion-fp16")
    quantize.add_argument("--mode", default="int8", choices=("int8", "int8-weights", "int4-weights"))
    quantize.add_argument("--prompts", type=int, help="how many calibration prompts to run; by default the first 8")
    quantize.set_defaults(run=commands.quantize)
