"""What each command does. Slow modules are imported only when a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ov_decidiffusion.conversion.reports import ConversionReport
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.web.queue import Queue


def convert(options: argparse.Namespace) -> Path:
    report = _converted(options)
    print(report if report.converted else report.place)
    return _checked(report.model_dir, options)


def _converted(options: argparse.Namespace) -> ConversionReport:
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
    if options.discard_download and options.checkpoint and not Path(options.checkpoint).expanduser().is_dir():
        from ov_decidiffusion.conversion.hub import discard_download

        freed = discard_download(options.checkpoint)
        print(f"deleted the download of {options.checkpoint}: {freed / 1e9:.2f} GB are free again", file=sys.stderr)
    return report


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


def generate(options: argparse.Namespace) -> None:
    from ov_decidiffusion.cli.generate import run

    run(options, lambda: _load(options))


def _load(options: argparse.Namespace) -> OVStableDiffusionPipeline:
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the pictures' names
        folder = prepared_folder(options, tells_place=False)
    return OVStableDiffusionPipeline.from_pretrained(
        folder, options.device, options.inference_precision, threads=options.threads
    )


def quantize(options: argparse.Namespace) -> None:
    from ov_decidiffusion.quantize import quantize_models

    print(quantize_models(options.model_dir, options.mode, options.prompts))


def doctor(options: argparse.Namespace) -> None:
    from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
    from ov_decidiffusion.doctor import examine

    if not examine(options.checkpoint or EMBEDDED_CHECKPOINT, options.revision, options.out, options.quick):
        sys.exit(1)


def demo(options: argparse.Namespace) -> None:
    from ov_decidiffusion.demo.app import make_demo
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.web.guards import check_allowed_hosts
    from ov_decidiffusion.web.limits import LOOPBACK
    from ov_decidiffusion.web.uploads import keep_only_these_readers

    keep_only_these_readers()
    hosts = check_allowed_hosts(options.allowed_host)
    own = options.host in LOOPBACK and not hosts
    auth = _credentials(own, options.auth, options.no_auth)
    _check_port(options)
    model_dir = prepared_folder(options)
    with _folder_for_pictures():
        pipe = OVStableDiffusionPipeline.from_pretrained(
            model_dir, options.device, options.inference_precision, threads=options.threads
        )
        print(f"precision: {pipe.inference_precision}")
        outputs = Path("outputs") if own and not options.no_save else None
        demo = make_demo(pipe, outputs=outputs, offers_int8=own)
        try:
            demo.launch(
                allowed_hosts=hosts,
                server_name=options.host,
                server_port=options.port,
                auth=auth,
                prevent_thread_lock=True,
            )
            while True:  # a wait without a timeout could not be interrupted on Windows
                time.sleep(3600)
        finally:
            demo.close(verbose=False)
            pipe.close()  # a process that ends while models run is aborted


def _check_port(options: argparse.Namespace) -> None:
    """Fail now, not after loading everything, if the port is taken or the host is not an address of this machine."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port or 0), family=family):
        pass


def prepared_folder(options: argparse.Namespace, tells_place: bool = True) -> Path:
    """The model folder, converted if it does not exist, and quantized if requested."""
    from ov_decidiffusion.arguments import check_path
    from ov_decidiffusion.model_folder.integrity import check_model_dir
    from ov_decidiffusion.model_folder.layout import graph_file
    from ov_decidiffusion.runtime.loading import check_loading

    check_loading(options.device, options.inference_precision, threads=options.threads)
    given = None if options.model_dir is None else check_path("model_dir", options.model_dir)
    if options.checkpoint is None and given is not None and graph_file(given, "unet").is_file():
        check_model_dir(given)  # whatever it was made from
        model_dir = _checked(given, options)
    else:
        report = _converted(options)
        if report.converted or tells_place:
            print(report if report.converted else report.place)
        model_dir = _checked(report.model_dir, options)
    if options.quantize:
        from ov_decidiffusion.quantize import quantize_models  # NNCF takes seconds to import

        print(quantize_models(model_dir))
    return model_dir


def serve(options: argparse.Namespace) -> None:
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
    from ov_decidiffusion.server.app import check_serving, create_app, under_known_names_only
    from ov_decidiffusion.server.running import run_server
    from ov_decidiffusion.web.guards import check_allowed_hosts, check_api_key
    from ov_decidiffusion.web.limits import LOOPBACK
    from ov_decidiffusion.web.queue import Queue
    from ov_decidiffusion.web.uploads import keep_only_these_readers

    keep_only_these_readers()
    hosts = check_allowed_hosts(options.allowed_host)
    local = options.host in LOOPBACK and not hosts
    check_api_key(options.api_key)
    check_serving(options.max_waiting, options.max_batch, options.timeout)
    if options.api_key is None and not local and not options.no_auth:
        options.api_key = secrets.token_urlsafe(18)
        print(f"API key: {options.api_key} (--api-key sets it, --no-auth asks for none)")
    _check_port(options)
    pipe = OVStableDiffusionPipeline.from_pretrained(
        prepared_folder(options), options.device, options.inference_precision, threads=options.threads
    )
    pipe.set_progress_bar_config(disable=True)
    print(f"precision: {pipe.inference_precision}", flush=True)
    queue = Queue(options.max_waiting)
    app = create_app(pipe, options.api_key, options.max_waiting, options.max_batch, options.timeout, queue)
    if local or hosts:
        under_known_names_only(app, hosts)
    address = f"http://[{options.host}]" if ":" in options.host else f"http://{options.host}"
    print(f"for OpenAI's clients: {address}:{options.port}/v1", flush=True)
    try:
        with _demo_beside(app, pipe, queue, options, address) if options.demo else contextlib.nullcontext():
            run_server(app, options.host, options.port)
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


def bulk(options: argparse.Namespace) -> None:
    import pyarrow  # noqa: F401  if it is missing, fail before anything is converted

    from ov_decidiffusion.arguments import check_path, check_whole
    from ov_decidiffusion.bulk.generate import check_out, generate, summary
    from ov_decidiffusion.bulk.rows import check_table
    from ov_decidiffusion.web.uploads import keep_only_these_readers

    keep_only_these_readers()
    check_out(check_path("out", options.out))
    if options.actors is not None:
        check_whole("actors", options.actors, 1)
    check_table(options.prompts)  # refuse an unreadable table now, not after the conversion
    manifest = generate(
        options.prompts,
        prepared_folder(options),
        options.out,
        actors=options.actors,
        threads=options.threads,
        ray_address=options.ray_address,
        output_format=options.format,
        device=options.device,
        inference_precision=options.inference_precision,
        **({} if options.preset is None else {"preset": options.preset}),
    )
    made, told = summary(manifest)
    print(told)
    if not made:
        raise ValueError(f"no picture was made; {manifest} has the error of each row")


@contextlib.contextmanager
def _folder_for_pictures() -> Iterator[None]:
    """A temporary folder for Gradio's uploads and results, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="ov_decidiffusion-pictures-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def _credentials(local: bool, given: str | None, none: bool) -> tuple[str, str] | None:
    """The user and password to ask for; None for this machine alone, or if ``--no-auth`` was given."""
    if none or (given is None and local):
        return None
    user, _, password = (f"demo:{secrets.token_urlsafe(9)}" if given is None else given).partition(":")
    if not user or not password:
        raise ValueError(f"--auth must be USER:PASSWORD, got {given!r}")
    if given is None:
        print(f"user: {user}, password: {password} (--auth sets them, --no-auth asks for none)")
    return user, password
