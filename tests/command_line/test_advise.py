"""The command `advise`: what it measures, and the errors of functions and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
    assert "forms= leaves it out" in " ".join(found.stdout.split())
    assert "\nbatch size 4: " in found.stdout


@pytest.mark.parametrize("function", ["of_nnx", "of_linen"])
def test_models_of_flax(parts: Path, function: str) -> None:
    found = invoke(f"{parts}:{function}", "--form", "bcsr", "--json", *QUICK)
    assert found.exit_code == 0, found.output
    assert list(json.loads(found.stdout)["forms"]["bcsr"]["seconds"]["inputs as given"]) == ["0.9"]


def test_a_model_folder(folder: Path) -> None:
    found = invoke(folder, "--length", "4", "--form", "csr", *QUICK)
    assert found.exit_code == 0, found.output
    assert "CSR, PyTorch" in found.stdout


@pytest.mark.parametrize(
    ("function", "text"),
    [
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
    short = invoke(f"{parts}:mlp", "--repeats", "0")
    assert "repeats must be at least 1, got 0" in short.stderr
