"""The examples in docstrings run. That public names have one is checked with the API page."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = (
    "safe_core",
    "safe_core.compressed",
    "safe_core.patterns",
    "safe_core.constraints",
    "safe_core.solvers",
    "safe_core.flatness",
    "safe_core.litert",
    "safe_core.backends",
    "safe_core.adapters",
    "safe_core.adapters.jax",
    "safe_core.adapters.jax.flax",
    "safe_core.adapters.torch",
    "safe_core.adapters.torch.blocks",
    "safe_core.command_line",
    "safe_core.command_line.commands",
    "safe_core.study",
    "safe_core.study.data",
    "safe_core.study.models",
    "safe_core.study.robustness",
    "safe_core.study.runner",
)


def modules(name: str) -> list[str]:
    """A package and its modules, without the packages within."""
    package = importlib.import_module(name)
    found = pkgutil.iter_modules(package.__path__, f"{name}.")
    return [name, *(info.name for info in found if not info.ispkg)]


MODULES = [module for package in PACKAGES for module in modules(package)]


def test_every_module_is_found() -> None:
    some = {"safe_core.projection", "safe_core.constraints.admm", "safe_core.backends.jax"}
    assert some | {"safe_core.adapters.torch.step", "safe_core.study.runner.run"} < set(MODULES)


@pytest.mark.filterwarnings("error::safe_core.FinalizeWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 0 or ">>> " not in (module.__doc__ or "")
