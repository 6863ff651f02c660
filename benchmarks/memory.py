"""The peak memory of this very process."""

import sys
from pathlib import Path


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 1e9 bytes.

    Linux hands ``ru_maxrss`` on from the process that started this one, so there it is read from the kernel's own
    account of this process's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
