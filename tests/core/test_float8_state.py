"""z in float8 and u in bfloat16: the same bits in every library, in checkpoints and in runs."""

from __future__ import annotations

import io
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from array_backends import BFLOAT16, Backend, bits
from torch import nn

import safe_core
from safe_core import ArrayInfo, SplitState, Unstructured
from safe_core.adapters.jax.reporting import report
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.constraints.float8 import dequantised, quantised
from safe_core.constraints.splitting import dual_update, init, recover

FLOAT8 = "float8_e4m3fn"
METHOD = safe_core.elsa(0.6, penalty=0.3, dual_update_interval=3, state_dtype=FLOAT8)


def published(anchor: np.ndarray, support: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the bytes of z, u in bfloat16 and the scale, by the types of NumPy."""
    z = np.where(support, anchor, np.float32(0))
    scale = np.maximum(np.abs(z).max() * np.float32(1.05 / 448), np.float32(1e-8))
    stored = (z * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)
    u = np.where(support, np.float32(0), -anchor).astype(BFLOAT16)
    return stored.view(np.uint8), u, scale


def opened(anchor: Any, support: Any) -> tuple[Any, ...]:
    """Return the state as what NumPy can hold, and what it is read as."""
    state = quantised([anchor], [support])
    read = dequantised(state)
    stored = state.support[0]
    stored = stored.view(torch.uint8) if torch.is_tensor(stored) else stored.view(jnp.uint8)
    return stored, state.anchor[0], state.scale[0], read.anchor[0], read.support[0]


@pytest.mark.parametrize("xp", [Backend.TORCH, Backend.JAX, Backend.JAX_JIT])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e30])
def test_the_state_is_the_published_one_in_every_library(xp: Backend, size: float) -> None:
    rng = np.random.default_rng(0)
    anchor = (rng.normal(size=(40, 50)) * size * 10.0 ** rng.uniform(-6, 0, (40, 50))).astype("f4")
    support = rng.random((40, 50)) < 0.3
    z, u, scale = published(anchor, support)
    stored, off, found_scale, wide, kept = xp.run(opened, anchor, support)
    np.testing.assert_array_equal(kept, support)
    tiny = support & (z & 0x7F == 0)  # marked by the sign of zero
    assert tiny.any()
    np.testing.assert_array_equal(stored[tiny], 0x80)
    np.testing.assert_array_equal(stored[~tiny], z[~tiny] & np.where(support, 0xFF, 0)[~tiny])
    np.testing.assert_array_equal(-off, u)
    np.testing.assert_array_equal(bits(found_scale), bits(np.asarray(scale)))
    np.testing.assert_array_equal(
        wide, z.view(ml_dtypes.float8_e4m3fn).astype("f4") * scale - u.astype("f4")
    )


def test_weights_of_a_million_keep_their_support_and_a_fortieth_of_their_size() -> None:
    anchor = np.random.default_rng(0).normal(size=10**6).astype("f4")
    anchor[7] = 40.0
    support = np.abs(anchor) > 1.5
    state = quantised([torch.from_numpy(anchor)], [torch.from_numpy(support)])
    (z,), (u,) = recover(state)
    for found, mask, largest in ((z, support, 0.03), (-u, ~support, 0.002)):
        error = np.linalg.norm(found.numpy()[mask] - anchor[mask]) / np.linalg.norm(anchor[mask])
        assert largest / 3 < error < largest
    assert not (z * u).any()


def test_edges_have_an_answer() -> None:
    kept = torch.tensor([True, True, False])
    zero = dequantised(quantised([torch.zeros(3)], [kept]))
    assert zero.anchor[0].tolist() == [0, 0, 0]
    assert zero.support[0].tolist() == kept.tolist()
    largest = torch.finfo(torch.float32).max
    huge = dequantised(quantised([torch.tensor([largest, -1.0, largest])], [kept]))
    assert huge.anchor[0].isfinite().all()
    assert huge.support[0].tolist() == kept.tolist()
    assert dequantised(SplitState([1], [2])) == SplitState([1], [2])


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="packed_support must be False with state_dtype='float8"):
        safe_core.elsa(0.5, state_dtype=FLOAT8, packed_support=True)
    with pytest.raises(ValueError, match="state_dtype must be None under rescale_dual"):
        safe_core.ADMM(rescale_dual=True, state_dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"state_dtype must be one of None, 'bfloat16', got 'fl"):
        safe_core.Pull(state_dtype=FLOAT8)
    x, info = [np.ones(4)], ArrayInfo(("x",), (None,))
    with pytest.raises(TypeError, match="state_dtype must be None where the library has no bf"):
        init(x, Unstructured(0.5), info, state_dtype=FLOAT8)
    with pytest.raises(ValueError, match="step must be given to round to a state_dtype, got None"):
        dual_update(x, SplitState(x, x), Unstructured(0.5), info, state_dtype=FLOAT8)


# PyTorch


def parts(method: safe_core.Method = METHOD) -> tuple[nn.Module, SparseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3))
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, SparseOptimizer(base, method, model=model)


def train(model: nn.Module, optimizer: SparseOptimizer, steps: range) -> None:
    for t in steps:
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_torch_adds_the_penalty_of_what_is_stored() -> None:
    model, optimizer = parts()
    train(model, optimizer, range(4))
    weight, held = model[0].weight, optimizer.state[model[0].weight]
    z = held["support"].float() * held["scale"]
    want = 0.3 * (weight.detach() - z - held["anchor"].float())
    optimizer.base.step = lambda: None
    optimizer.zero_grad()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.grad, want, rtol=1e-6, atol=1e-7)
    assert want.abs().max() > 0.01


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
def test_torch_resumes_with_the_same_dtypes_and_bits() -> None:
    model, optimizer = parts()
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    again, second = parts()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    held = second.state[again[0].weight]
    assert {key: (x.dtype, tuple(x.shape)) for key, x in held.items() if key != "importance"} == {
        "anchor": (torch.bfloat16, (8, 13)),
        "support": (torch.float8_e4m3fn, (8, 13)),
        "scale": (torch.float32, ()),
    }
    for each in ((model, optimizer), (again, second)):
        train(*each, range(4, 9))
        assert each[1].report().scalars()["distance"] > 0
        each[1].finalize()
        each[1].check_sparsity()
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    # Another kind of state, with the record of the method taken out.
    for group in state["param_groups"]:
        del group["safe_method"]
    _, plain = parts(safe_core.elsa(0.6, penalty=0.3, state_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"state_dict must hold no safe_scale for 0.weight: "):
        plain.load_state_dict(state)
    for entry in state["state"].values():
        entry.pop("safe_scale", None)
    with pytest.raises(ValueError, match=r"safe_scale of shape \(\) for 0.weight, got None"):
        parts()[1].load_state_dict(state)


# JAX


def jax_parts(method: safe_core.Method = METHOD) -> tuple[Any, Any, Any]:
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 13), jnp.float32)}
    tx = sparse_optimizer(optax.adam(0.01), method)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), (20, 8))
        grads = jax.grad(lambda p: ((x.astype(jnp.float32) @ p["kernel"]) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return params, tx.init(params), step


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
def test_jax_resumes_with_the_same_dtypes_and_bits() -> None:
    params, state, step = jax_parts()
    like = params, state
    for t in range(9):
        if t == 4:
            saved = flax.serialization.to_bytes((params, state))
        before = find_state(state)
        params, state = step(params, state)
        held = find_state(state)
        arrays = held.anchor["kernel"], held.support["kernel"], held.scale["kernel"]
        assert [x.dtype for x in arrays] == [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32]
        same = bits(np.asarray(held.support["kernel"])) == bits(
            np.asarray(before.support["kernel"])
        )
        assert same.all() == (t % 3 != 2)  # only dual updates round
    assert step._cache_size() == 1
    again = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(like, saved))
    for _ in range(5):
        again = step(*again)
    np.testing.assert_array_equal(again[0]["kernel"], params["kernel"])
    assert float(report(params, state, METHOD).scalars()["distance"]) > 0
    assert int((finalize(params, state, METHOD)["kernel"] == 0).sum()) == 62


def test_jax_refuses_a_state_of_the_other_kind() -> None:
    params, state, _ = jax_parts()
    other = safe_core.elsa(0.6, penalty=0.3, state_dtype="bfloat16")
    tx = sparse_optimizer(optax.adam(0.01), other)
    with pytest.raises(TypeError, match=r"state.support of kernel must be bool, .* float8_e4m3fn"):
        tx.update(params, state, params)


# Bytes


@pytest.mark.parametrize(
    ("options", "bytes_each"),
    [
        ({}, 5),
        ({"state_dtype": "bfloat16"}, 3),
        ({"state_dtype": "bfloat16", "packed_support": True}, 2.125),
        ({"state_dtype": FLOAT8}, 3),
    ],
    ids=str,
)
def test_a_parameter_takes_these_bytes_for_z_and_u(
    options: dict[str, Any], bytes_each: float
) -> None:
    method = safe_core.elsa(0.5, **options)
    base = torch.optim.Adam([p := nn.Parameter(torch.randn(64, 64))], lr=0.1)
    optimizer = SparseOptimizer(base, method, where=lambda name, p: True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert sum(x.nbytes for x in base.state[p].values() if x.ndim) == 8 * 4096
    assert optimizer.state[p].pop("importance").nbytes == 4 * 4096
    in_torch = sum(x.nbytes for x in optimizer.state[p].values())
    params = {"kernel": jnp.asarray(p.detach().numpy())}
    held = find_state(sparse_optimizer(optax.adam(0.1), method).init(params))
    leaves = jax.tree.leaves((held.anchor, held.support, held.scale))
    assert in_torch == sum(x.nbytes for x in leaves)
    scales = 4 if options.get("state_dtype") == FLOAT8 else 0
    assert in_torch == bytes_each * 4096 + scales
