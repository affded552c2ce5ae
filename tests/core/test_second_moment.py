"""An importance that reads the base optimizer's second moments, in both frameworks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import safe_core
from safe_core import SecondMoment
from safe_core.adapters.optax import find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

METHOD = safe_core.admm(0.5, penalty=0.1, dual_update_interval=2, importance=SecondMoment())
WEIGHT = np.asarray([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])
SLOPE = np.asarray([[4.0, 0.1, 2.0], [0.1, 3.0, 0.2]])


def torch_run(base: type[torch.optim.Optimizer], **options: Any) -> tuple[Any, nn.Linear]:
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(WEIGHT))
    optimizer = SparseOptimizer(base(model.parameters(), lr=0.1, **options), METHOD, model=model)
    for _ in range(2):
        optimizer.zero_grad()
        (torch.from_numpy(SLOPE) * model.weight).sum().backward()
        optimizer.step()
    return optimizer, model


def jax_run(base: Any) -> Any:
    params = {"kernel": jnp.asarray(WEIGHT.T)}
    tx = sparse_optimizer(base, METHOD)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)({"kernel": jnp.asarray(SLOPE.T)}, state, params)
        params = optax.apply_updates(params, updates)
    return state


def test_p_is_adams_second_moment_after_the_step_of_the_dual_update() -> None:
    optimizer, model = torch_run(torch.optim.Adam)
    in_torch = optimizer.state[model.weight]["importance"]
    assert torch.equal(in_torch, optimizer.base.state[model.weight]["exp_avg_sq"])
    assert float(in_torch.min()) > 0
    state = jax_run(optax.adam(0.1))
    in_jax = find_state(state).importance["kernel"]
    np.testing.assert_allclose(in_jax.T, in_torch, rtol=1e-12)
    np.testing.assert_array_equal(in_jax, find_state(state).base[0].nu["kernel"])
    support = find_state(state).support["kernel"]
    assert support.T.tolist() == optimizer.split().support[0].tolist()
    # By magnitude alone, or by P alone, other entries would be kept.
    assert support.T.tolist() != (np.abs(WEIGHT) >= 1).tolist()


def test_other_bases_with_second_moments_do_too() -> None:
    optimizer, model = torch_run(torch.optim.RMSprop)
    found = optimizer.state[model.weight]["importance"]
    assert torch.equal(found, optimizer.base.state[model.weight]["square_avg"])
    assert float(jax_run(optax.rmsprop(0.1)).importance["kernel"].min()) > 0


def test_a_base_without_second_moments_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"base must keep second moments, .* got SGD with no state"
    ):
        torch_run(torch.optim.SGD)
    with pytest.raises(ValueError, match="base must keep one tree of second moments"):
        jax_run(optax.sgd(0.1))
