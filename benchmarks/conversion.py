"""One measured conversion, in a process of its own: prints seconds, peak memory and agreement as JSON."""

import argparse
import dataclasses
import json
import time

from benchmarks.memory import peak_memory_gb
from ov_decidiffusion.convert import convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("model_dir")
    parser.add_argument("--verify", action="store_true", help="compare every model with PyTorch")
    options = parser.parse_args()
    start = time.perf_counter()
    report = convert_checkpoint(options.checkpoint, options.model_dir, verify=options.verify)
    measured = {
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": peak_memory_gb(),
        "converted": report.converted,
        "parts": [dataclasses.asdict(part) for part in report.parts],
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
