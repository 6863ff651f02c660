"""How fast this project and other tools are on this machine: ``make benchmark``.

Every run is a process of its own. Runs take turns, so that a slow quarter of an hour affects all tools alike. Each
finished run is saved at once, so that an interrupted benchmark can resume. Results are written to
``benchmarks/results/``: ``compare.json`` with every single figure, ``compare.md`` and ``compare.png``.
"""

import argparse
from pathlib import Path

import openvino as ov

from benchmarks import report
from benchmarks.make_checkpoint import unet_of
from benchmarks.runs import (
    CACHES,
    GROWTH,
    HERE,
    RESULTS,
    RIVALS,
    THIRTY_STEPS,
    Bench,
    loading_run,
    pictures_run,
    require_peers,
    unet_run,
)
from benchmarks.workload import gigaflops
from ov_decidiffusion.runtime.precision import choose_precision

ROUNDS = 3
LOADINGS = 4


def all_runs(precision: str) -> list[tuple[dict, int]]:
    """Every run with the number of its turn, in the order of execution."""
    rivals = [pictures_run(*rival) for rival in RIVALS]
    units = [unet_run(unet, wanted) for wanted in dict.fromkeys(("f32", precision)) for unet in ("nas", "sd15")]
    turns = [[(run, turn) for run in rivals + units] for turn in range(ROUNDS)]
    once = [(run, 0) for run in (*GROWTH.values(), *THIRTY_STEPS.values())]
    once += [(loading_run(cache), turn) for cache in CACHES for turn in range(LOADINGS)]
    return turns[0] + once + [planned for turn in turns[1:] for planned in turn]


def _described(run: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.items() if key != "guidance_scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the folder for the full-size models; 6 GB")
    parser.add_argument("--minutes", type=float, default=60, help="start no further run after this time")
    options = parser.parse_args()
    require_peers()
    flops = {"nas": gigaflops(unet_of("1.0")), "sd15": gigaflops(unet_of("sd15"))}
    bench = Bench(options.work, RESULTS / "compare.json", flops)
    bench.load()
    bench.prepare(options.work)
    precision = choose_precision(ov.Core(), "CPU")[0]
    bench.do_all([(_described(run), run, turn) for run, turn in all_runs(precision)], options.minutes)
    tables = report.write(bench, precision, RESULTS)
    print(tables)


if __name__ == "__main__":
    main()
