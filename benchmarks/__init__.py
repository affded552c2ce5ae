"""Speed and memory compared with other implementations, as ratios measured in one run.

Run from a clone of the repository: ``python -m benchmarks``.
"""

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the clone first on the path. The folder safe_core/ of the clone is only a part
# of the package and would hide an installed wheel, so put installed packages first.
sys.path.sort(key=lambda entry: Path(entry).resolve() == _ROOT)

# By default JAX takes three quarters of a GPU's memory as it starts, and PyTorch needs some, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
