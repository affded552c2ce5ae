"""Examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import safe_core
import safe_core.adapters
import safe_core.adapters.jax
import safe_core.adapters.jax.flax
import safe_core.adapters.torch
import safe_core.adapters.torch.blocks
import safe_core.backends
import safe_core.command_line
import safe_core.flatness
import safe_core.solvers
import safe_core.splitting
import safe_core.study
import safe_core.study.data
import safe_core.study.models
import safe_core.study.robustness
import safe_core.study.runner


def modules(package: object) -> list[str]:
    return [
        info.name
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not info.ispkg
    ]


PACKAGES = (
    safe_core,
    safe_core.backends,
    safe_core.adapters,
    safe_core.adapters.jax,
    safe_core.adapters.jax.flax,
    safe_core.adapters.torch,
    safe_core.adapters.torch.blocks,
    safe_core.command_line,
    safe_core.flatness,
    safe_core.solvers,
    safe_core.study,
    safe_core.study.data,
    safe_core.study.models,
    safe_core.study.robustness,
    safe_core.study.runner,
)
MODULES = [name for package in PACKAGES for name in (package.__name__, *modules(package))]
WITHOUT_EXAMPLES = {  # the package itself, and what is not public
    "safe_core.adapters",
    "safe_core.adapters.jax",
    "safe_core.adapters.jax.flax",
    "safe_core.adapters.optax",
    "safe_core.adapters.torch",
    "safe_core.adapters.torch.blocks",
    "safe_core.adapters.transformers",
    "safe_core.constraints",
    "safe_core.patterns",
    "safe_core.adapters.jax.tree",
    "safe_core",
    "safe_core._checks",
    "safe_core._dtypes",
    "safe_core.arguments",
    "safe_core.scores",
    "safe_core.solvers.problem",
    "safe_core.command_line",
    "safe_core.command_line.options",
    "safe_core.command_line.output",
    "safe_core.study",
    "safe_core.study.commands",
    "safe_core.adapters.torch.compiled",
    "safe_core.adapters.torch.kernels",
    "safe_core.adapters.torch.reporting",
    "safe_core.adapters.torch.checkpoint",
    "safe_core.adapters.torch.blocks.calls",
    "safe_core.adapters.torch.blocks.run",
    "safe_core.adapters.torch.blocks.task",
}


def test_every_module_is_found() -> None:
    assert {"safe_core.projection", "safe_core.splitting", "safe_core.backends.jax"} < set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    if name not in WITHOUT_EXAMPLES and not name.startswith("safe_core.backends."):
        assert results.attempted > 0


def public() -> dict[str, object]:
    """Classes and functions of the package, and functions of its public modules."""
    found = {
        name: getattr(safe_core, name)
        for name in safe_core.__all__
        if not inspect.ismodule(getattr(safe_core, name))
    }
    for name in safe_core.solvers.__all__:
        found[f"solvers.{name}"] = getattr(safe_core.solvers, name)
    for module in (safe_core.splitting, safe_core.importance, safe_core.schedules):
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


@pytest.mark.parametrize("name", public())
def test_public_names_have_an_example(name: str) -> None:
    thing = public()[name]
    assert thing.__module__.startswith("safe_core")
    assert "Examples\n--------\n>>> " in (inspect.getdoc(thing) or "")


@pytest.mark.parametrize(
    "module", [safe_core, safe_core.importance, safe_core.schedules, safe_core.solvers]
)
def test_public_modules_are_documented(module: object) -> None:
    assert len(module.__doc__.split()) > 10
