"""The sessions of nox prepare JAX for a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Session:
    """Records the programs that a session runs, with the environment that it adds."""

    posargs = ()

    def __init__(self) -> None:
        self.runs: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def run(self, *command: str, env: dict[str, str] | None = None, **options: Any) -> None:
        self.runs.append((command, env or {}))


@pytest.fixture(scope="module")
def noxfile() -> Any:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install = lambda session: None
    return module


@pytest.mark.parametrize("name", ["run_tests", "equivalence", "build_docs"])
def test_checks_share_the_memory_of_a_gpu_and_multiply_in_float32(noxfile: Any, name: str) -> None:
    session = Session()
    function = getattr(noxfile, name)
    getattr(function, "func", function)(session)
    checks = [env for command, env in session.runs if {"pytest", "doctest"} & set(command)]
    assert len(checks) == 1
    assert checks[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert checks[0]["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"
