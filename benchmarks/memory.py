"""Measure bytes per parameter: state between steps, and temporary memory of a step."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn

import safe_core
from safe_core import project
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.blocks.memory import TensorBytes

from .devices import on_gpu, torch_device
from .peers import TwoArrayADMM
from .steps import give, resnet50_shapes
from .timing import Result

__all__ = ["memory", "step_peaks"]

METHOD = safe_core.safe(0.95, rho=1e-3, penalty=1e-3)
NARROW = safe_core.safe(0.95, rho=1e-3, penalty=1e-3, state_dtype="bfloat16")
CASE = "memory per float32 parameter, all of them sparse"


def memory(*, size: int, width: int) -> list[Result]:
    """Measure state and peak memory. Two-array ADMM is the baseline of the state."""
    side = int(size**0.5) // 8 * 8
    two = _torch_state(side, None)
    program, narrow = _jax_step(side, METHOD), _jax_step(side, NARROW)
    rows = [
        ("state, two-array ADMM in PyTorch", two, two, None),
        ("state, safe_core in PyTorch", _torch_state(side, METHOD), two, 5 / 8),
        ("state, safe_core in JAX", program["state"], two, 5 / 8),
        ("state in bfloat16, safe_core in PyTorch", _torch_state(side, NARROW), two, 3 / 8),
        ("state in bfloat16, safe_core in JAX", narrow["state"], two, 3 / 8),
        ("copies held for the perturbed pass, PyTorch", 4.0, 4.0, None),
        ("temporaries of one step, JAX (compiled)", program["temporary"], 4.0, None),
        ("peak of a projection, result included, NumPy", _projection_peak(side), 5.0, None),
    ]
    found = [Result(CASE, n, value, "B", value / base, budget) for n, value, base, budget in rows]
    return found + step_peaks(width=width)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _torch_state(side: int, method: safe_core.Method | None) -> float:
    weight = nn.Parameter(torch.randn(side, side))
    base = torch.optim.SGD([weight], lr=0.1)
    if method is None:
        peer = TwoArrayADMM([weight], base, sparsity=0.95, penalty=1e-3, interval=32)
        return _bytes(peer.z + peer.u) / side**2
    optimizer = SparseOptimizer(base, method, where=lambda name, p: True)
    packed = optimizer.state_dict()["state"]
    kept = {t.data_ptr(): t for entry in packed.values() for t in entry.values()}
    return _bytes(kept.values()) / side**2


def _jax_step(side: int, method: safe_core.Method) -> dict[str, float]:
    tx = sparse_optimizer(optax.sgd(0.1), method, where=lambda path, x: True)
    params = {"kernel": jnp.ones((side, side))}
    state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        grad_fn = lambda p: jax.tree.map(lambda x: 0.01 * x, p)  # noqa: E731
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    analysis = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    used = analysis.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.anchor, state.support)))
    return {"state": held / side**2, "temporary": used.temp_size_in_bytes / side**2}


def _projection_peak(side: int) -> float:
    weight = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    tracemalloc.start()
    project(weight, 0.95)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / side**2


def step_peaks(*, width: int) -> list[Result]:
    """Measure the peak of a step beyond the weights, the gradients and the state of optimizers.

    The weights have the shapes of ResNet-50. On a GPU the allocator counts, on the CPU every
    tensor.
    """
    case = "peak of a step beyond weights, gradients and state, shapes of ResNet-50"
    shapes = resnet50_shapes(width)
    params = [nn.Parameter(torch.randn(s, device=torch_device()) / 50) for s in shapes]
    gradients = [torch.randn_like(p) / 100 for p in params]
    base = torch.optim.SGD(params, lr=1e-5, momentum=0.9)
    method = safe_core.safe(0.95, rho=1e-3, penalty=1e-3, dual_update_interval=2)
    optimizer = SparseOptimizer(base, method, where=lambda name, p: p.ndim > 1)

    def step() -> None:
        optimizer.step(lambda: give(params, gradients))

    for _ in range(2):  # creates the state, and the copies that are kept on the CPU
        step()
    entries = sum(p.numel() for p in params)
    state = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
    known = [*params, *gradients, *filter(torch.is_tensor, state)]
    # The third step has no dual update, and the fourth has one.
    peaks = [_peak(step, known) / entries for _ in range(2)]
    names = ("a step without a dual update", "a step with a dual update")
    return [Result(case, n, v, "B", v / peaks[0]) for n, v in zip(names, peaks, strict=True)]


def _peak(run: Callable[[], object], known: list[Tensor]) -> int:
    if not on_gpu():
        with TensorBytes(known) as counted:
            run()
        return counted.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
