"""The server on Ray Serve: replicas with a pipeline each; more of them are started while requests wait.

``serve run ov_decidiffusion.serve:app`` starts it. These environment variables configure it:
``OV_DECIDIFFUSION_MODEL`` (a model folder, a checkpoint's folder or a hub id; by default the embedded checkpoint),
``OV_DECIDIFFUSION_PRECISION``, ``OV_DECIDIFFUSION_THREADS`` (for each replica; by default 2),
``OV_DECIDIFFUSION_MIN_REPLICAS`` and ``OV_DECIDIFFUSION_MAX_REPLICAS`` (by default 1 and 4), and
``OV_DECIDIFFUSION_API_KEY``; without a key, it answers only under this machine's own names.
"""

import os

from fastapi import FastAPI
from ray import serve

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.server.app import create_app, under_known_names_only
from ov_decidiffusion.web.guards import OwnPagesOnly

WAITING = 16  # number of requests that one replica holds; Ray answers 503 to too many
ENOUGH = 4  # target number of requests per replica; above it, another replica is started


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"OV_DECIDIFFUSION_{name}", default)


def _replicas_app() -> FastAPI:
    """The application of one replica, with a pipeline of its own."""
    pipe = OVStableDiffusionPipeline.from_pretrained(
        _setting("MODEL", str(EMBEDDED_CHECKPOINT)),
        inference_precision=_setting("PRECISION", "auto"),
        threads=int(_setting("THREADS", "2")),
    )
    pipe.set_progress_bar_config(disable=True)
    key = os.environ.get("OV_DECIDIFFUSION_API_KEY")
    app = create_app(pipe, key, max_waiting=WAITING)
    if key is None:
        under_known_names_only(app)
    else:
        app.add_middleware(OwnPagesOnly)
    return app


def make_application() -> serve.Application:
    """The application for Ray Serve."""
    names = ("MODEL", "PRECISION", "THREADS", "API_KEY")
    given = {f"OV_DECIDIFFUSION_{name}": os.environ.get(f"OV_DECIDIFFUSION_{name}") for name in names}
    deployment = serve.deployment(
        name="Pictures",
        max_ongoing_requests=WAITING,
        max_queued_requests=4 * WAITING,
        autoscaling_config={
            "min_replicas": int(_setting("MIN_REPLICAS", "1")),
            "max_replicas": int(_setting("MAX_REPLICAS", "4")),
            "target_ongoing_requests": ENOUGH,
        },
        ray_actor_options={
            "num_cpus": int(_setting("THREADS", "2")),
            "runtime_env": {"env_vars": {name: value for name, value in given.items() if value is not None}},
        },
        health_check_period_s=5,
    )

    @serve.ingress(_replicas_app)
    class Pictures:
        pass

    return deployment(Pictures).bind()
