"""Python started in a clone whose environment holds a wheel and no editable install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORGET_EDITABLE = (
    "import sys\n"
    "finders = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    "sys.meta_path[:] = finders\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel installs it, and without the editable one."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, ROOT]
    # By default setuptools builds in the clone, and would install stale modules from there.
    config = tmp_path_factory.mktemp("build") / "setup.cfg"
    config.write_text(f"[build]\nbuild_base = {config.parent}\n")
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(config)}
    subprocess.run(pip, env=env, check=True, capture_output=True)
    (site / "sitecustomize.py").write_text(FORGET_EDITABLE)
    return site


def in_clone(wheel: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )


@pytest.mark.long  # other tests import the benchmarks, but start no new Python
@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.savings"])
def test_benchmarks_run_in_a_clone_with_a_wheel(wheel: Path, module: str) -> None:
    found = in_clone(wheel, "-m", module, "--help")
    assert found.returncode == 0, found.stderr
    assert f"python -m {module}" in found.stdout


def test_a_bare_clone_says_what_to_do(wheel: Path) -> None:
    found = in_clone(wheel, "-c", "import safe_core")
    assert found.returncode == 1
    assert "pip install -e ." in found.stderr.splitlines()[-1]
    elsewhere = in_clone(wheel, "-P", "-c", "import safe_core; print(safe_core.__file__)")
    assert elsewhere.stdout.startswith(str(wheel)), elsewhere.stderr
