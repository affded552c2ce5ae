"""The reference in `docs/api/` and the names that the packages export are the same."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import safe_core

API = Path(__file__).parents[2] / "docs" / "api"

PACKAGES = (
    "safe_core",
    "safe_core.constraints",
    "safe_core.constraints.splitting",
    "safe_core.patterns",
    "safe_core.functional",
    "safe_core.step",
    "safe_core.importance",
    "safe_core.schedules",
    "safe_core.solvers",
    "safe_core.flatness",
    "safe_core.litert",
    "safe_core.adapters.torch",
    "safe_core.adapters.torch.blocks",
    "safe_core.adapters.jax",
    "safe_core.adapters.jax.flax",
    "safe_core.adapters.jax.blocks",
    "safe_core.adapters.optax",
    "safe_core.adapters.transformers",
    "safe_core.study.runner",
)

# Modules of which the page documents some names; the others serve the library alone.
MODULES = (
    "safe_core.random_numbers",
    "safe_core.reconstruction",
    "safe_core.report",
    "safe_core.adapters.export_advice",
    "safe_core.adapters.export_forms",
    "safe_core.adapters.layer_timing",
    "safe_core.adapters.sparse_report",
    "safe_core.advice",
    "safe_core.compressed",
    "safe_core.finalization",
    "safe_core.inspection",
    "safe_core.sassha",
    "safe_core.flatness.figures",
    "safe_core.command_line.compression",
    "safe_core.command_line.dry_run",
    "safe_core.command_line.inspection",
    "safe_core.command_line.perplexity",
    "safe_core.command_line.pruning",
)

DIRECTIVE = re.compile(r"\.\. (currentmodule|auto[a-z]+):: *(\S+)")
OPTION = re.compile(r" +:([a-z-]+): *(.*)")


class Directive(NamedTuple):
    """A directive of the page, such as ``.. autoclass:: Layout``, with its options."""

    kind: str
    argument: str
    options: dict[str, str]

    def listed(self, option: str) -> list[str]:
        """Return the names that an option lists."""
        return [name.strip() for name in self.options.get(option, "").split(",") if name.strip()]


def directives(text: str) -> list[Directive]:
    """Return the directives of a page that set a module or document a name."""
    found: list[Directive] = []
    for line in text.splitlines():
        if match := DIRECTIVE.match(line):
            found.append(Directive(match[1], match[2], {}))
        elif found and (match := OPTION.match(line)):
            found[-1].options[match[1]] = match[2]
    return found


def documented(text: str) -> Iterator[str]:
    """Yield the full names that a page documents, as autodoc resolves them.

    Members of a class follow the class, as ``module.Class.member``.
    """
    module = ""
    for directive in directives(text):
        if directive.kind in ("currentmodule", "automodule"):
            module = name = directive.argument
        elif directive.argument.startswith("safe_core."):
            name = directive.argument
        else:
            name = f"{module}.{directive.argument}"
        if directive.kind not in ("currentmodule", "automodule"):
            yield name
        members = directive.listed("members")
        if directive.kind == "automodule" and "members" in directive.options and not members:
            members = importlib.import_module(name).__all__
        hidden = directive.listed("exclude-members")
        yield from (f"{name}.{member}" for member in members if member not in hidden)


def resolve(name: str) -> Any:
    """Return the object of a full name; an attribute comes before a module of the same name."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


PAGES = [path.read_text() for path in sorted(API.glob("*.md"))]
DOCUMENTED = list(dict.fromkeys(name for page in PAGES for name in documented(page)))
EXPORTED = [
    f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__
]


def test_the_page_is_read_as_autodoc_reads_it() -> None:
    page = """
.. currentmodule:: safe_core
.. autofunction:: project
.. autoclass:: safe_core.solvers.Gram
   :members: add, count
   :exclude-members: count
.. automodule:: safe_core.schedules
   :members: constant,linear
.. autofunction:: cosine
.. automodule:: safe_core.step
   :members:
"""
    assert list(documented(page)) == [
        "safe_core.project",
        "safe_core.solvers.Gram",
        "safe_core.solvers.Gram.add",
        "safe_core.schedules.constant",
        "safe_core.schedules.linear",
        "safe_core.schedules.cosine",
        *(f"safe_core.step.{name}" for name in importlib.import_module("safe_core.step").__all__),
    ]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_exists_and_has_a_docstring(name: str) -> None:
    thing = resolve(name)
    docstring = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert docstring
    owner = resolve(name.rpartition(".")[0])
    if inspect.isfunction(thing) and inspect.ismodule(owner):
        assert "Examples\n--------\n>>> " in docstring


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_is_exported(name: str) -> None:
    owner, _, last = name.rpartition(".")
    if inspect.isclass(resolve(owner)):  # a member comes with its class, which is listed itself
        assert owner in DOCUMENTED
    else:
        assert owner in (*PACKAGES, *MODULES)
        assert last in importlib.import_module(owner).__all__


@functools.cache
def documented_objects() -> list[Any]:
    """Return the objects that the page documents, without names that cannot be imported."""
    found = []
    for name in DOCUMENTED:
        with contextlib.suppress(AttributeError, ModuleNotFoundError):  # another test reports them
            found.append(resolve(name))
    return found


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_is_documented(name: str) -> None:
    """One entry is enough for a name that several packages export."""
    thing = resolve(name)
    if inspect.ismodule(thing):
        assert thing.__name__ in PACKAGES
    else:
        assert any(other is thing for other in documented_objects())


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("SparseOptimizer", "safe_core.adapters.torch"),
        ("sparse_optimizer", "safe_core.adapters.optax"),
        ("advise", "safe_core.adapters.torch and safe_core.adapters.jax.flax"),
        ("prune_blocks", "safe_core.adapters.torch.blocks and safe_core.adapters.jax.blocks"),
    ],
)
def test_a_name_of_an_adapter_is_pointed_to(name: str, places: str) -> None:
    with pytest.raises(AttributeError, match=rf"^{name} is in {places}$"):
        getattr(safe_core, name)


def test_every_name_of_an_adapter_is_found_without_its_framework() -> None:
    program = (
        "import sys, safe_core._adapter_names\n"
        "found = safe_core._adapter_names.adapters_with\n"
        "for name in sys.argv[1:]: assert found(name), name\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
        "assert not hasattr(safe_core, 'saver') and not hasattr(safe_core, '__wrapped__')"
    )
    packages = [name for name in PACKAGES if name.startswith("safe_core.adapters")]
    listed = [name for package in packages for name in importlib.import_module(package).__all__]
    command = [sys.executable, "-P", "-W", "error", "-c", program, *listed]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
