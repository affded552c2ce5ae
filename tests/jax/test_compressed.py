"""Arrays of JAX come back from compressed files bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import safe_core
from safe_core.adapters.jax import load_compressed, save_compressed
from safe_core.adapters.jax.flax import save_safetensors, to_torch_names
from safe_core.adapters.torch import load_compressed as load_in_torch


def test_a_pytree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    kernel = jax.random.normal(jax.random.key(0), (12, 32))
    params = {
        "a": {"kernel": safe_core.project(kernel, 0.9).values, "bias": -jnp.zeros(32)},
        "b": [jnp.arange(40, dtype="bfloat16") * (jnp.arange(40) < 5), jnp.asarray(True)],
        "c": safe_core.project(kernel, "2:4").values.astype("float8_e4m3fn"),
    }
    path = tmp_path / "m.safetensors"
    saved = save_compressed(params, path)
    assert saved.forms == {
        "a/bias": "dense", "a/kernel": "bitmask", "b/0": "bitmask", "b/1": "dense", "c": "2:4",
    }  # fmt: skip
    like = jax.eval_shape(lambda: params)
    found = load_compressed(path, like=like)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_of_nnx_and_torch_names_can_be_saved(tmp_path: Path) -> None:
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    save_compressed(state, tmp_path / "nnx.safetensors")
    found = load_compressed(tmp_path / "nnx.safetensors", like=state)
    np.testing.assert_array_equal(found["kernel"], state["kernel"])
    params = {"Dense_0": {"kernel": jnp.eye(3, 2)}}
    save_compressed(to_torch_names(params), tmp_path / "torch.safetensors")
    weight = load_in_torch(tmp_path / "torch.safetensors")["Dense_0.weight"]
    assert torch.equal(weight, torch.eye(2, 3))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({}, "like must have all arrays of the file, got no 'w'"),
        (
            {"w": jnp.ones(3, "float32")},
            r"'w' as F32 of shape \(3,\), as like= has it, got F32 of shape \(2",
        ),
        ({"w": jnp.ones(2, "bfloat16")}, "'w' as BF16"),
        ({"v": jnp.ones(2, "float32")}, r"'v' as F32 of shape \(2,\), as like= has it, got none"),
    ],
)
def test_another_structure_is_refused(like: Any, message: str, tmp_path: Path) -> None:
    save_compressed({"w": jnp.ones(2, "float32")}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path / "m.safetensors", like=like)


def test_a_module_with_dropout_is_told_to_keep_its_keys_out(tmp_path: Path) -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs))
    way = r"nnx\.state\(model, nnx\.Any\(nnx\.Param, nnx\.BatchStat\)\)"
    path = tmp_path / "m.safetensors"
    for save in (save_compressed, save_safetensors):
        with pytest.raises(TypeError, match=rf"rngs/key: keep keys out .*{way}"):
            save(nnx.state(model), path)
    weights = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    save_safetensors(weights, path)
    save_compressed(weights, path)
    with pytest.raises(TypeError, match=rf"^like must .*rngs/key: keep keys out .*{way}"):
        load_compressed(path, like=nnx.state(model))


@pytest.mark.parametrize("leaf", [jax.random.key(0), 1.0, np.ones(2, "complex128"), "text"])
def test_other_leaves_are_refused(leaf: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"params must hold arrays .* for w"):
        save_compressed({"w": leaf}, tmp_path / "m.safetensors")
