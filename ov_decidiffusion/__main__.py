"""Start the demo from a terminal: ``python -m ov_decidiffusion``."""

import argparse
import secrets
import sys

from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT, CheckpointError
from ov_decidiffusion.convert import ConversionError, convert_checkpoint
from ov_decidiffusion.demo import LOOPBACK, make_demo
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.precision import INFERENCE_PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ov_decidiffusion",
        description="Convert a DeciDiffusion checkpoint to OpenVINO, unless that is done already, and start the demo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", default=str(EMBEDDED_CHECKPOINT), help="a folder or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--model-dir", help="where the OpenVINO models go; default: models/<checkpoint>-fp16")
    parser.add_argument(
        "--quantize",
        action="store_true",
        help="make the INT8 models first that the faster presets need, unless they are there: a minute for the "
        "embedded checkpoint, much longer and 16 GB of memory for the real one",
    )
    parser.add_argument("--device", default="CPU", help="any OpenVINO device string")
    parser.add_argument("--inference-precision", default="auto", choices=INFERENCE_PRECISIONS)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with a password")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="what to ask for; made and printed for other hosts")
    parser.add_argument("--no-auth", action="store_true", help="let everybody in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args()
    try:
        report = convert_checkpoint(options.checkpoint, options.model_dir, revision=options.revision)
        print(report)
        if options.quantize:
            from ov_decidiffusion.quantize import quantize_models  # NNCF takes seconds to import

            print(quantize_models(report.model_dir))
        pipe = OVStableDiffusionPipeline.from_pretrained(report.model_dir, options.device, options.inference_precision)
    except (CheckpointError, ConversionError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"precision: {pipe.inference_precision}")
    auth = _credentials(options)
    try:
        make_demo(pipe).launch(server_name=options.host, server_port=options.port, auth=auth)
    except OSError as error:  # a port that is taken
        sys.exit(f"error: {error}")


def _credentials(options: argparse.Namespace) -> tuple[str, str] | None:
    """The user and password to ask for; other machines are let in without only where that was asked for."""
    if options.no_auth or (options.auth is None and options.host in LOOPBACK):
        return None
    user, _, password = (options.auth or f"demo:{secrets.token_urlsafe(9)}").partition(":")
    if not user or not password:
        sys.exit(f"error: --auth must be USER:PASSWORD, got {options.auth!r}")
    if options.auth is None:
        print(f"user: {user}, password: {password} (--auth sets them, --no-auth asks for none)")
    return user, password


if __name__ == "__main__":
    main()
