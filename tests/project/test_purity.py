"""The core is free of frameworks."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import numpy
import safe_core

safe_core.project(numpy.ones((2, 4)), "2:4")
safe_core.safe(0.9)
print(sorted({"jax", "jaxlib", "torch", "flax", "optax", "tensorflow", "cupy"} & set(sys.modules)))
"""


def test_the_core_imports_no_framework() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"
