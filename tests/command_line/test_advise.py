"""The command `advise`: what it measures, and the errors of functions and folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from processes import output_of
from typer.testing import CliRunner, Result

from safe_core.command_line.app import app

PARTS = """
import jax.numpy as jnp
import torch
from flax import linen, nnx

NUMBER = 3

def mlp():
    return torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU()), torch.ones(2, 32)

def of_nnx():
    return nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0))), jnp.ones((2, 32))

def of_linen():
    module, x = linen.Dense(16), jnp.ones((2, 32))
    return module, x, module.init(__import__("jax").random.key(0), x)

def model_alone():
    return mlp()[0]

def one_value():
    return (mlp()[0],)

def too_much():
    return *mlp(), {}

def too_narrow():
    return mlp()[0], torch.ones(2, 31)

def failing():
    raise RuntimeError("no data")
"""
QUICK = ("--repeats", "1", "--sparsity", "0.9")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_core.litert.trials._SECONDS", 0.0)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    path = tmp_path / "parts.py"
    path.write_text(PARTS)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def test_a_function_returns_the_model(parts: Path) -> None:
    given = (f"{parts}:mlp", "--batch-size", 1, "--batch-size", 4, *QUICK)
    found = invoke(*given, "--form", "csr", "--form", "1x4")
    assert found.exit_code == 0, found.output
    assert "milliseconds of a call, batch size 4:" in found.stdout
    for form in ("CSR, PyTorch", "blocks 1x4 float32, LiteRT", "dense int8, LiteRT"):
        assert form in found.stdout
    assert "--form leaves it out" in " ".join(found.stdout.split())
    assert "forms=" not in found.stdout
    assert "\nbatch size 4:\n" in found.stdout


def test_a_module_may_lie_in_the_current_folder(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_users_module.py").write_bytes(parts.read_bytes())
    path = list(sys.path)
    assert "No module named 'a_users_module'" in invoke("a_users_module:mlp", *QUICK).stderr
    monkeypatch.chdir(tmp_path)
    found = invoke("a_users_module:mlp", "--form", "csr", *QUICK)
    assert found.exit_code == 0, found.output
    assert sys.path == path


@pytest.mark.parametrize("function", ["of_nnx", "of_linen"])
def test_models_of_flax(parts: Path, function: str) -> None:
    found = invoke(f"{parts}:{function}", "--form", "bcsr", "--json", *QUICK)
    assert found.exit_code == 0, found.output
    assert list(json.loads(found.stdout)["forms"]["bcsr"]["seconds"]["inputs as given"]) == ["0.9"]


def test_a_model_folder(folder: Path) -> None:
    found = invoke(folder, "--length", "4", "--form", "csr", *QUICK)
    assert found.exit_code == 0, found.output
    assert "CSR, PyTorch" in found.stdout


def test_a_sample_longer_than_the_model_takes(folder: Path) -> None:
    found = invoke(folder, "--length", "600", *QUICK)
    assert found.exit_code == 1
    assert found.stderr.startswith("safe-core: length must be at most the model's ")
    assert found.stderr.count("\n") == 1


LINEN = """
import flax.linen as nn
import jax
import jax.numpy as jnp

def made():
    x = jnp.ones((2, 32))
    return nn.Dense(16), x, nn.Dense(16).init(jax.random.key(0), x)
"""
PROGRAM = """
import sys
from safe_core.command_line.advice import advice
found = advice(sys.argv[1], sparsities=[0.9], forms=["bcsr"], repeats=1)
print(found.form("bcsr").title)
"""


def test_linen_without_nnx(tmp_path: Path) -> None:
    (tmp_path / "linen.py").write_text(LINEN)
    assert output_of("-c", PROGRAM, f"{tmp_path}/linen.py:made") == "BCSR, JAX\n"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            "too_narrow",
            "safe-core: model must take example_inputs, got RuntimeError: mat1 and mat2",
        ),
        ("model_alone", "must return a model and example inputs, and for Linen the variables, got"),
        ("one_value", "must return a model and example inputs, and for Linen the variables, got"),
        ("too_much", "must return a model and example inputs, got 3 values for a PyTorch model"),
        ("failing", "must be a function without arguments that runs, got RuntimeError: no data"),
        ("NUMBER", "source must name a function, got "),
        ("nothing", "source must name an object of "),
    ],
)
def test_functions_that_do_not_fit(parts: Path, function: str, text: str) -> None:
    found = invoke(f"{parts}:{function}", *QUICK)
    assert found.exit_code == 1
    assert text in found.stderr


def test_sources_and_options_that_do_not_fit(parts: Path, tmp_path: Path) -> None:
    missing = invoke(tmp_path / "nowhere", *QUICK)
    assert "source must be a model folder or name a function" in missing.stderr
    on_device = invoke(f"{parts}:of_nnx", "--device", "cpu", *QUICK)
    assert "device must be left out for a Flax model, got 'cpu'" in on_device.stderr
    for options, text in (
        (("--sparsity", "90"), "sparsity must be a fraction above 0 and below 1, such as 0.9, got "
         "90: write 0.9 for 90 percent"),
        (("--sparsity", "0"), "sparsity must be a fraction above 0 and below 1, such as 0.9, got"),
        (("--form", "1x8"), "--form must be among 1x4, 1x16, csr, bsr, channels, 2:4, got '1x8'"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
    ):  # fmt: skip
        found = invoke(f"{parts}:mlp", *options)
        assert found.exit_code == 1
        assert found.stderr.startswith(f"safe-core: {text}")
    short = invoke(f"{parts}:mlp", "--repeats", "0")
    assert "repeats must be at least 1, got 0" in short.stderr
