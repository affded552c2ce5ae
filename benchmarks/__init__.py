"""Speed and memory compared with other implementations, as ratios measured in one run.

Run from a clone of the repository: ``python -m benchmarks``.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the clone first on the path. Its folder safe_core/ is only a part of the
# package and would hide an installed wheel, so installed packages go first.
sys.path.sort(key=lambda entry: Path(entry).resolve() == _ROOT)
