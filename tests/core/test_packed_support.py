"""A support with one bit per entry changes nothing but the size of the state."""

from __future__ import annotations

import copy
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import safe_core
from safe_core.adapters.jax.reporting import report
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.packing import packed, packed_shape, unpacked

SETTINGS: dict[str, Any] = {"penalty": 0.3, "dual_update_interval": 3, "state_dtype": "bfloat16"}


def method(*, packs: bool) -> safe_core.Method:
    return safe_core.elsa(0.6, packed_support=packs, **SETTINGS)


@given(st.lists(st.integers(0, 19), max_size=3), st.integers(0, 2**32 - 1))
def test_masks_of_every_shape_come_back(shape: list[int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.5
    found = packed(mask)
    last = (-(-shape[-1] // 8),) if shape else ()
    assert (found.dtype, found.shape) == (np.uint8, (*shape[:-1], *last))
    assert packed_shape(tuple(shape)) == found.shape
    np.testing.assert_array_equal(unpacked(found, mask), mask)
    if not shape:
        return
    # numpy's own packing, with the first entry in the lowest bit
    np.testing.assert_array_equal(found, np.packbits(mask, axis=-1, bitorder="little"))


def test_every_library_packs_alike(xp: Backend) -> None:
    mask = np.random.default_rng(0).random((3, 13)) < 0.5
    found = xp.run(packed, mask)
    np.testing.assert_array_equal(found, packed(mask))
    np.testing.assert_array_equal(xp.run(unpacked, found, np.zeros((3, 13), np.float32)), mask)
    np.testing.assert_array_equal(xp.run(unpacked, mask, mask), mask)


def torch_parts(*, packs: bool) -> tuple[nn.Module, SparseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3))
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, SparseOptimizer(base, method(packs=packs), model=model)


def torch_steps(model: nn.Module, optimizer: SparseOptimizer, steps: range) -> None:
    for t in steps:
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
def test_torch_takes_the_same_steps_in_an_eighth_of_the_bytes() -> None:
    runs = [torch_parts(packs=packs) for packs in (False, True)]
    for run in runs:
        torch_steps(*run, range(7))
    (plain, wide), (model, optimizer) = runs
    held = optimizer.state[model[0].weight]
    assert (held["support"].dtype, held["support"].shape) == (torch.uint8, (8, 2))
    assert held["anchor"].dtype == torch.bfloat16
    assert [s.tolist() for s in optimizer.split().support] == [
        s.tolist() for s in wide.split().support
    ]
    assert optimizer.report().scalars() == wide.report().scalars()
    for other in (plain, model):
        optimizer_of = optimizer if other is model else wide
        optimizer_of.finalize(freeze=True)
        torch_steps(other, optimizer_of, range(7, 9))
        optimizer_of.check_sparsity()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_torch_resumes_and_refuses_a_state_of_the_other_kind() -> None:
    model, optimizer = torch_parts(packs=True)
    torch_steps(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    torch_steps(model, optimizer, range(4, 9))
    again, second = torch_parts(packs=True)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    second.load_state_dict(copy.deepcopy(state))
    torch_steps(again, second, range(4, 9))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    _, unpacking = torch_parts(packs=False)
    with pytest.raises(ValueError, match=r"state_dict"):
        unpacking.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
def test_jax_takes_the_same_steps_in_an_eighth_of_the_bytes() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 13), dtype=jnp.float32)}
    inputs = jax.random.normal(jax.random.key(1), (20, 8), dtype=jnp.float32)
    ends = []
    for packs in (False, True):
        mine, chosen = params, method(packs=packs)
        tx = sparse_optimizer(optax.adam(0.01), chosen)
        state = tx.init(mine)

        @jax.jit
        def step(params, state, tx=tx):
            grads = jax.grad(lambda p: ((inputs @ p["kernel"]) ** 2).sum())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(7):
            mine, state = step(mine, state)
        figures = report(mine, state, chosen).scalars()
        support = find_state(state).support["kernel"]
        ends.append((mine, finalize(mine, state, chosen), figures, support))
    (x, sparse, figures, wide), (y, same, others, small) = ends
    assert (small.dtype, small.shape, wide.shape) == (jnp.uint8, (8, 2), (8, 13))
    np.testing.assert_array_equal(unpacked(small, wide), wide)
    np.testing.assert_array_equal(x["kernel"], y["kernel"])
    np.testing.assert_array_equal(sparse["kernel"], same["kernel"])
    assert {k: float(v) for k, v in figures.items()} == {k: float(v) for k, v in others.items()}
