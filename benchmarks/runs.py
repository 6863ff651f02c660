"""The runs of the benchmarks, the place of their results, and how one run is done."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import openvino as ov

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.model_folder.layout import default_model_dir

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GUIDANCE = 7.5
PEERS_PYTHON = Path(".venv-peers") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
RIVALS = [  # tool, precision
    ("ours", "auto"),
    ("ours", "f32"),
    ("diffusers", "f32"),
    ("optimum", "default"),
    ("optimum", "f32"),
    ("genai", "default"),
    ("genai", "f32"),
]


def pictures_run(tool: str, precision: str, side: int = 512, pictures: int = 1, steps: int = 5, **more) -> dict:
    """Options of one run that makes pictures."""
    run = {
        "tool": tool,
        "precision": precision,
        "side": side,
        "pictures": pictures,
        "steps": steps,
        "guidance_scale": GUIDANCE,
    }
    return json.loads(json.dumps(run | more))  # in its saved form, since finished runs are found by comparing


GROWTH = {  # how cost grows with the size of a picture and with their number
    "256x256": pictures_run("ours", "auto", side=256, steps=3, cold_only=True),
    "512x512": pictures_run("ours", "auto", side=512, steps=3, cold_only=True),
    "768x768": pictures_run("ours", "auto", side=768, steps=3, cold_only=True),
    "512x512, 2 pictures": pictures_run("ours", "auto", pictures=2, steps=3, cold_only=True),
    "512x512, 4 pictures": pictures_run("ours", "auto", pictures=4, steps=3, cold_only=True),
}
THIRTY_STEPS = {rival: pictures_run(*rival, steps=30, cold_only=True) for rival in (RIVALS[0], RIVALS[3])}


def unet_run(unet: str, precision: str) -> dict:
    """Options of one run of a U-Net alone, batch 2; the machine's own rate is measured in the same process."""
    return {"tool": "unet", "unet": unet, "precision": precision, "side": 512, "pictures": 1}


CACHES = {"none": None, "whole": "OPTIMIZE_SPEED", "without weights": "OPTIMIZE_SIZE"}  # OpenVINO's CACHE_MODE


def loading_run(cache: str) -> dict:
    """Options of one run that only loads; OpenVINO's model cache is empty in the first turn, and filled after it."""
    return {"tool": "loading", "cache": cache}


class Bench:
    """The prepared files, the finished runs, and how to do one."""

    def __init__(self, work: Path, file: Path, gigaflops: dict[str, float]):
        self.gigaflops = gigaflops
        self.checkpoint, self.model_dir, self.unets = work / "decidiffusion-1.0", work / "decidiffusion-1.0-fp16", {}
        self.plain = work / "alone-fp16"  # the same models under a name without INT8 models beside it
        self.pictures, self.cache, self.file = work / "pictures", work / "cache", file
        self.runs: list[dict] = []
        self.begun = time.perf_counter()
        self.conversions: dict[str, dict] = {}

    def prepare(self, work: Path) -> None:
        """Make missing files that the runs need; conversions run in processes whose memory is measured."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():  # made in a process of its own, to free its memory
            run_python(sys.executable, "-m", "benchmarks.make_checkpoint", "1.0", str(self.checkpoint))
        sd15 = work / "sd15-unet.xml"
        if not sd15.exists():
            run_python(sys.executable, "-m", "benchmarks.workload", "sd15", str(sd15))
        self.unets = {"nas": self.model_dir / "unet" / "openvino_model.xml", "sd15": sd15}
        for verified, target in (("plain", self.model_dir), ("verified", self.model_dir.with_name("verified"))):
            if verified not in self.conversions or not self.model_dir.exists():
                self._convert(verified, target)
        shutil.rmtree(self.model_dir.with_name("verified"), ignore_errors=True)

    def _convert(self, verified: str, target: Path) -> None:
        """Measure a conversion from scratch, in a process of its own."""
        shutil.rmtree(target, ignore_errors=True)
        options = {"checkpoint": str(self.checkpoint), "model_dir": str(target), "verify": verified == "verified"}
        printed = run_python(sys.executable, "-m", "benchmarks.run_one", json.dumps({"tool": "conversion"} | options))
        self.conversions[verified] = json.loads(printed.strip().splitlines()[-1])
        self.save()

    def load(self) -> None:
        """Load the finished runs of an interrupted benchmark, if machine, versions and code are the same."""
        if self.file.is_file():
            content = json.loads(self.file.read_text())
            if content["machine"] == machine():
                self.runs, self.conversions = content["runs"], content["conversions"]

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        content = {"machine": machine(), "conversions": self.conversions, "runs": self.runs}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.file)

    def done(self, run: dict, turn: int) -> bool:
        """Whether the run's figures exist, and its picture if it makes one."""
        drawn = run["tool"] in ("unet", "loading") or self.picture(run).is_file()
        return drawn and any(other["run"] == run and other["turn"] == turn for other in self.runs)

    def do(self, run: dict, turn: int) -> None:
        """Do one run, and add the JSON that it prints to the finished runs."""
        options = run | {"model_dir": str(self._models_of(run)), "checkpoint": str(self.checkpoint)}
        if run["tool"] == "unet":
            options |= {"xml": str(self.unets[run["unet"]]), "gigaflop": self.gigaflops[run["unet"]]}
        elif run["tool"] == "loading":
            options["cache_mode"] = CACHES[run["cache"]]
            options["cache_dir"] = str(self.cache) if options["cache_mode"] else None
            if turn == 0:
                shutil.rmtree(self.cache, ignore_errors=True)
        else:
            self.pictures.mkdir(parents=True, exist_ok=True)
            options["picture"] = str(self.picture(run))
        python = str(PEERS_PYTHON) if run["tool"] == "optimum" else sys.executable
        options["started"] = time.time()
        printed = run_python(python, "-m", "benchmarks.run_one", json.dumps(options))
        self.runs = [other for other in self.runs if (other["run"], other["turn"]) != (run, turn)]
        self.runs.append({"run": run, "turn": turn, **json.loads(printed.strip().splitlines()[-1])})
        self.save()

    def do_all(self, planned: list[tuple[str, dict, int]], minutes: float = math.inf) -> None:
        """Do all unfinished runs, and print their names; none begins more than ``minutes`` after this was created."""
        for number, (name, run, turn) in enumerate(planned, 1):
            spent = (time.perf_counter() - self.begun) / 60
            if not self.done(run, turn) and spent <= minutes:
                print(f"[{number}/{len(planned)}, {spent:.0f} min] {name}", flush=True)
                self.do(run, turn)

    def _models_of(self, run: dict) -> Path:
        """The model folder for a run: one without INT8 models beside it, unless the run may need them.

        If there are INT8 models, the pipeline compiles none of the models before it knows which ones it needs.
        """
        if run.get("embedded"):
            return default_model_dir(EMBEDDED_CHECKPOINT)
        if "arguments" in run:
            return self.model_dir
        if not self.plain.is_symlink():
            self.plain.symlink_to(self.model_dir.name)
        return self.plain

    def picture(self, run: dict) -> Path:
        names = [run.get("name", run["tool"]), *(run[key] for key in ("precision", "side", "pictures", "steps"))]
        return self.pictures / (re.sub(r"[^a-zA-Z0-9]+", "-", " ".join(map(str, names))) + ".png")

    def median(self, figure: str, run: dict) -> float | None:
        """Median of a figure over the turns of a run; None if the run was not done."""
        values = self.values(figure, run)
        return statistics.median(values) if values else None

    def values(self, figure: str, run: dict) -> list[float]:
        return [other[figure] for other in self.runs if other["run"] == run and figure in other]


def require_peers() -> None:
    """End the program if Optimum Intel is not installed."""
    if not PEERS_PYTHON.exists():
        sys.exit("error: the peers' environment is missing: run `make peers` first.")


def run_python(python: str, *arguments: str) -> str:
    """Standard output of a Python process that can import this project; its standard error is shown if it fails."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise RuntimeError(f"{' '.join([python, *arguments])} failed:\n{finished.stderr[-4000:]}")
    return finished.stdout


def machine() -> dict[str, str]:
    """What the figures depend on: the machine, the versions, and the code."""
    core = ov.Core()
    packages = ("openvino", "torch", "diffusers", "transformers", "openvino-genai")
    return {
        "processor": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "capabilities": " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "code": _digest_of_code(),
    }


def _digest_of_code() -> str:
    """A digest that tells versions of the library's and the runs' code apart."""
    digest = hashlib.sha256()
    for file in sorted([*(HERE.parent / "ov_decidiffusion").rglob("*.py"), HERE / "run_one.py", HERE / "workload.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
