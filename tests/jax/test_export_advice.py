"""`advise` for Flax measures every form once, and leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import safe_core
from safe_core.adapters.jax import save_compressed
from safe_core.adapters.jax.flax import advise, export_advice, sparse_model

X = jnp.sin(jnp.arange(3 * 32.0)).reshape(3, 32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Measure nothing twice; return the forms that were timed together."""
    timed: list[list[str]] = []

    def once(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        timed.append(list(candidates))
        for run in candidates.values():
            run()
        return {name: [1.0 if "0.9" in name else 2.0] * repeats for name in candidates}

    monkeypatch.setattr(export_advice, "interleaved", once)
    monkeypatch.setattr(sparse_model, "interleaved", once)
    monkeypatch.setattr("safe_core.litert.trials._SECONDS", 0.0)
    return timed


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.half = nnx.Linear(32, 4, dtype="bfloat16", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        return self.half(x).astype("float32")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(4)(x)


def test_every_form_is_measured_and_the_model_stays(quick: list[list[str]]) -> None:
    model = Network()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    parts: list[tuple[int, int]] = []
    found = advise(
        model,
        X,
        batch_sizes=[1, 4],
        sparsities=[0.5, 0.9],
        repeats=1,
        progress=lambda *part: parts.append(part),
    )
    assert parts == [(done, 6) for done in range(1, 7)]
    assert "JAX uses all its threads and wall-clock time" in "\n".join(found.notes)
    assert [form.name for form in found.forms] == ["dense", "litert", "int8", "1x4", "1x16", "bcsr"]
    for name in ("1x4", "1x16", "bcsr"):
        assert found.form(name).reason == ""
        times = {batch: list(at) for batch, at in found.form(name).seconds.items()}
        assert times == {1: [0.5, 0.9], 4: [0.5, 0.9]}
    # Two layers of one shape are measured as one, for each batch size.
    layers = [keys for keys in quick if "dense 0.0" in keys]
    assert layers == [["dense 0.0", "bcsr 0.5", "bcsr 0.9"]] * 2
    assert found.form("bcsr").seconds[1] == {0.5: 2.0, 0.9: 1.0}
    assert "BCSR: half/kernel stays dense: it computes in bfloat16" in "\n".join(found.notes)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_own_zeros_have_the_sizes_that_exports_write(tmp_path: Any) -> None:
    module = Linen()
    variables = module.init(jax.random.key(0), X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    pruned = safe_core.project(kernel.T, safe_core.Block((1, 16), 0.75)).values.T
    variables["params"]["Dense_0"]["kernel"] = pruned
    found = advise(module, X, variables=variables, sparsities=[0.9], repeats=1)
    assert found.own == pytest.approx(0.75 * 512 / 576)
    saved = save_compressed(variables, tmp_path / "model.safetensors")
    assert found.form("bcsr").sizes["own"] == saved.stored_bytes
    assert found.form("dense").sizes[0.0] == saved.dense_bytes
    for name in ("1x4", "1x16", "bcsr"):
        assert list(found.form(name).seconds[None]) == [0.9, "own"]
    assert "own zeros" in found.advice[None]


def test_few_zeros_of_its_own_have_a_size_alone() -> None:
    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), jax.nn.relu)
    model.layers[0].kernel[...] = safe_core.project(model.layers[0].kernel[...], 0.4).values
    found = advise(model, X, sparsities=[0.9], forms=["bcsr"], repeats=1)
    assert list(found.form("bcsr").seconds[None]) == [0.9]
    assert list(found.form("bcsr").sizes) == [0.9, "own"]
    assert "1 of 1 layers have fewer than half zeros" in "\n".join(found.notes)
    assert "save_compressed makes the file" in found.advice[None]


def test_patterns_fit_kernels_and_titles_the_dtype() -> None:
    model = nnx.Sequential(nnx.Linear(18, 8, param_dtype="bfloat16", rngs=nnx.Rngs(0)))
    found = advise(model, X[:, :18], sparsities=[0.9], forms=["1x4", "bcsr"], repeats=1)
    assert found.form("dense").title == "dense bfloat16, JAX"
    assert found.form("1x4").pattern(0.9) == 'safe_core.Block((1, 4), 0.9, ragged="dense")'
    assert found.form("bcsr").pattern(0.9) == "0.9"
    layer = nn.Dense(8)  # whose layout counts axes from the end
    variables = layer.init(jax.random.key(0), X[:, :18])
    options = {"sparsities": [0.9], "forms": ["1x4"], "repeats": 1}
    found = advise(layer, X[:, :18], variables=variables, **options)
    assert found.form("1x4").pattern(0.9) == 'safe_core.Block((1, 4), 0.9, ragged="dense")'


def test_litert_is_measured_beside_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = nnx.Sequential(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    found = advise(model, X, sparsities=[0.9], forms=["1x4", "bcsr"], repeats=1)
    for name in ("litert", "int8", "1x4"):
        assert found.form(name).reason == "LiteRT runs on the CPU here, and JAX computes on gpu"
    assert "LiteRT" not in found.machine


def test_what_cannot_be_built_has_its_reason() -> None:
    model = nnx.Sequential(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), jnp.fft.fft, jnp.real)
    found = advise(model, X, sparsities=[0.9], repeats=1)
    assert "must be able to express every operation, got fft" in found.form("1x4").reason
    assert list(found.form("bcsr").seconds[None]) == [0.9]


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "text"),
    [
        ((3, X), {}, TypeError, "model must be a Flax module, of Linen or NNX, got <class 'int'>"),
        ((Linen(), X), {}, TypeError, "variables must be given for a Linen module, got None"),
        (
            (nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X),
            {},
            ValueError,
            "model must take example_inputs, got TypeError: dot_general requires",
        ),
        ((nnx.Dropout(0.5), X), {}, ValueError, "model must have weights that can be pruned, got"),
        (
            (nnx.Linear(32, 4, rngs=nnx.Rngs(0)), jnp.ones(())),
            {"batch_sizes": [1]},
            ValueError,
            "example_inputs must be arrays with samples on their first axes for batch_sizes=, got",
        ),
        (
            (nnx.Linear(32, 4, rngs=nnx.Rngs(0)), X),
            {"forms": ["csr"]},
            ValueError,
            "forms must be among 1x4, 1x16, bcsr, got 'csr'",
        ),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, Any], settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        advise(*arguments, **settings)
