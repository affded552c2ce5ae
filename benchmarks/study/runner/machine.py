"""Record the machine and the memory of a run."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from safe_core.adapters.layer_timing import processor

__all__ = ["machine", "peak_memory", "reset_peak_memory"]

_PROC = Path("/proc/self")


def machine(device: str, name: str | None, jobs: int) -> dict[str, Any]:
    """Return where a run took place: host, processor, device, threads and runs at a time.

    Examples
    --------
    >>> machine("cpu", None, jobs=2)["jobs"]
    2
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "device": device if name is None else f"{device} ({name})",
        "threads": int(threads) if threads and threads.isdecimal() else os.cpu_count(),
        "jobs": jobs,
    }


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory`, where the system allows it."""
    with contextlib.suppress(OSError):  # then the peak is that of the process
        (_PROC / "clear_refs").write_text("5")


def peak_memory() -> float | None:
    """Return the peak of the memory of this process in MiB; None where it is not known.

    Examples
    --------
    >>> found = peak_memory()
    >>> found is None or found > 1
    True
    """
    try:
        lines = (_PROC / "status").read_text(encoding="utf-8").splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _peak_of_process()
    return found / 2**10


def _peak_of_process() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)
