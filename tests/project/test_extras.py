"""Without the packages of an extra, an error names the extra, and the rest works."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from safe_core._installed import install_command, require

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

# A finder before all others, which takes packages for missing, and their metadata too.
BLOCKER = """
import importlib.metadata, sys

class Blocker:
    blocked = {blocked!r}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

found = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name in Blocker.blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)

sys.meta_path.insert(0, Blocker())
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def run(program: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process in which some packages are missing."""
    code = BLOCKER.format(blocked=set(blocked)) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("statement", "missing", "extra"),
    [
        ("import safe_core.adapters.torch", "torch", "torch"),
        ("import safe_core.adapters.torch.blocks", "torch", "torch"),
        ("import safe_core.adapters.transformers", "torch", "torch"),
        (
            "import torch; from safe_core.adapters.torch import shrink; "
            "shrink(torch.nn.Linear(2, 2), torch.ones(1, 2))",
            "torch_kirigami",
            "channels",
        ),
        (
            "import torch; from safe_core.adapters.torch import save_litert; "
            "save_litert(torch.nn.Linear(2, 2), torch.ones(1, 2), 'model.tflite')",
            "ai_edge_litert",
            "litert",
        ),
        ("import safe_core.adapters.jax", "jax", "jax"),
        ("import safe_core.adapters.optax", "jax", "jax"),
        ("import safe_core.adapters.optax", "optax", "jax"),
        ("from safe_core.adapters.jax.flax import SparseTrainState", "flax", "jax"),
        ("import safe_core.demo.run", "matplotlib", "demo"),
        ("import safe_core.demo.run", "rich", "demo"),
        ("import safe_core.demo.run", "sklearn", "demo"),
        ("from safe_core.report import Report; Report(0, []).table()", "rich", "demo"),
        (
            "import numpy as np; from safe_core.flatness.figures import *; "
            "plot_lines({'x': Landscape(np.arange(3.0), np.arange(3.0))})",
            "matplotlib",
            "demo",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    statement: str, missing: str, extra: str
) -> None:
    if "plot_lines" in statement:
        statement = "from safe_core.flatness import Landscape\n" + statement
    result = run(statement, missing)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert last.endswith(f" needs {missing}: {install_command(extra)}")
    names = {"ai_edge_litert": "ai-edge-litert", "torch_kirigami": "torch-kirigami"}
    named = {**names, "sklearn": "scikit-learn"}.get(missing, missing)
    assert any(line.startswith(named) for line in PROJECT["optional-dependencies"][extra])


def test_the_core_needs_no_extra() -> None:
    program = """
        import numpy, safe_core
        from safe_core.solvers import ALPS
        assert safe_core.project(numpy.asarray([1.0, 2.0]), 0.5).support.tolist() == [False, True]
    """
    blocked = ("torch", "jax", "optax", "flax", "matplotlib", "rich", "typer", "sklearn", "scipy")
    result = run(program, *blocked)
    assert result.returncode == 0, result.stderr


def test_pytorch_needs_no_jax() -> None:
    program = "import safe_core.adapters.torch.blocks, safe_core.adapters.transformers"
    result = run(program, "jax", "optax", "flax")
    assert result.returncode == 0, result.stderr


def test_a_broken_package_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_that_is_missing"):
        require("this", "broken_package", extra="dev")


@pytest.mark.long  # tests/study/test_demo.py runs the demo
@pytest.mark.parametrize(
    ("framework", "others"), [("jax", ("torch",)), ("torch", ("jax", "optax", "flax"))]
)
def test_the_demo_runs_with_one_framework(
    framework: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    program = f"""
        from pathlib import Path
        from safe_core.demo.recipe import Recipe
        from safe_core.demo.run import demo

        recipe = Recipe(hidden=(8,), epochs=1, warmup_epochs=1, penalties=(0.1,),
                        rises=(0.5,), sparsities=(0.9,), noises=(0.0,), seeds=(0,))
        if __name__ == "__main__":
            demo(recipe, [{framework!r}], Path({str(tmp_path)!r}))
    """
    result = run(program, *others)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table.md").read_text()
    assert f"{framework} " in table
    assert not any(f" {other} " in table for other in others)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
