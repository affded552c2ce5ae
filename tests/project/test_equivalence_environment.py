"""The equivalence tests also run where few packages are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Collects the tests as if only the given distributions and their dependencies were installed.
COLLECT = r"""
import re
import sys
from importlib import metadata
from importlib.machinery import PathFinder

import pytest


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(names):
    found, waiting = set(), list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # a dependency on another platform
            continue
        waiting += [name_of(need) for need in needs if "extra ==" not in need]
    return found


allowed = with_dependencies(sys.argv[1].split(","))
hidden = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not allowed & {canonical(owner) for owner in owners}
}
print("hidden:", *sorted(hidden))


class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in hidden else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/equivalence"]))
"""


def test_equivalence_tests_are_collected_without_other_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    needed = "safe-core,torch,jax,optax,flax,numpy,array-api-compat,pytest"
    finished = subprocess.run(
        [sys.executable, "-P", "-c", COLLECT, needed], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    hidden, _, collected = finished.stdout.partition("\n")
    assert {"array_api_strict", "expecttest", "hypothesis", "sklearn", "transformers"} <= set(
        hidden.split()
    )
    for file in (ROOT / "tests/equivalence").glob("test_*.py"):
        assert f"tests/equivalence/{file.name}::" in collected
