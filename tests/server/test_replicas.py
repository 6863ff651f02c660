"""The server on Ray Serve: two replicas, one of which is killed under load."""

import base64
import io
import os
import signal
import threading
import time

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.at_length

PROMPT = "a fox in the snow"
RETRYABLE = {408, 429, 500, 502, 503, 504}


@pytest.fixture(scope="module")
def address(model_dir):
    import ray
    from ray import serve

    from ov_decidiffusion import serve as server

    settings = {"MODEL": str(model_dir), "PRECISION": "f32", "THREADS": "1", "MIN_REPLICAS": "2", "MAX_REPLICAS": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"OV_DECIDIFFUSION_{name}", value)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        port = 18765
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(server.app, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(one.info["cmdline"] or [])]


def test_openais_client_gets_the_pipelines_pictures(address, pipe):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    data = client.images.generate(prompt=PROMPT, extra_body={"seed": 3, "num_inference_steps": 4}).data[0]
    picture = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
    expected = pipe(PROMPT, seed=3, num_inference_steps=4).images[0]
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def test_a_killed_replica_loses_no_request_without_a_word(address):
    answers, until = [], time.time() + 20

    def ask(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.time() < until:
                body = {"prompt": PROMPT, "seed": number, "num_inference_steps": 4}
                try:
                    answers.append(client.post(f"{address}/v1/images/generations", json=body).status_code)
                except httpx.TransportError as error:
                    answers.append(type(error).__name__)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(5)
    before = replicas()
    assert len(before) == 2
    os.kill(before[0].pid, signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    print({answer: answers.count(answer) for answer in set(answers)})
    assert answers.count(200) > 10
    assert all(answer == 200 or answer in RETRYABLE for answer in answers), set(answers)
    deadline = time.time() + 60
    while time.time() < deadline and len(replicas()) < 2:
        time.sleep(1)
    assert len(replicas()) == 2, "the dead one is replaced"
