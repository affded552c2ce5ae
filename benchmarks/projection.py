"""Time the projection: against other implementations, and against the size."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from safe_core import project

from . import peers
from .timing import Result, interleaved

__all__ = ["reading", "scaling", "selection"]

SPARSITY = 0.95


def _arrays(size: int, count: int = 100) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size // count, dtype=np.float32) for _ in range(count)]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ours(arrays: list[np.ndarray]) -> dict[str, Any]:
    tensors = [torch.from_numpy(x).to(_device()) for x in arrays]
    in_jax = [jnp.asarray(x) for x in arrays]
    counting = jax.jit(partial(project, sparsity=SPARSITY))
    on_host = jax.jit(partial(project, sparsity=SPARSITY, select_on_host=True))
    return {
        "safe_core, NumPy": lambda: project(arrays, SPARSITY),
        "safe_core, PyTorch": lambda: project(tensors, SPARSITY),
        "safe_core, JAX jit, counting": lambda: counting(in_jax),
        "safe_core, JAX jit, on host": lambda: on_host(in_jax),
    }


def selection(*, size: int, repeats: int) -> list[Result]:
    """Time a projection against one partition of the flat data, and against peers."""
    arrays = _arrays(size)
    flat, kept = np.concatenate(arrays), sum(x.size for x in arrays) // 20
    tensors = [torch.from_numpy(x).to(_device()) for x in arrays]
    in_jax = [jnp.asarray(x) for x in arrays]
    sort_jax = jax.jit(partial(peers.by_sort_jax, kept=kept))
    top_k = jax.jit(lambda xs: jax.lax.top_k(jnp.abs(jnp.concatenate(xs)), kept)[0][-1])
    half = [x.bfloat16() for x in tensors]
    floor = {"numpy.partition alone": lambda: np.partition(flat, flat.size - kept)}
    fast = {**_ours(arrays), "safe_core, PyTorch bfloat16": lambda: project(half, SPARSITY)}
    slow = {
        "torch.kthvalue threshold": lambda: peers.by_kthvalue(tensors, kept),
        "torch.topk threshold": lambda: peers.by_topk(tensors, kept),
        "torch.sort threshold (published)": lambda: peers.by_sort(tensors, kept),
        "jnp.sort threshold (published)": lambda: sort_jax(in_jax),
        "jax.lax.top_k, threshold only": lambda: top_k(in_jax),
    }
    budgets = {
        "safe_core, PyTorch": 2.0,
        "safe_core, JAX jit, counting": 10.0,
        "safe_core, JAX jit, on host": 3.5,
    }
    case = f"projection of {size:,} float32 in 100 tensors, 95% global"
    quick = interleaved(case, {**floor, **fast}, repeats=repeats, budgets=budgets)
    return quick + interleaved(case, {**floor, **slow}, repeats=max(1, repeats // 4))[1:]


def scaling(*, sizes: list[int], repeats: int) -> list[Result]:
    """Time projections of several sizes. With linear cost the ratios stay constant."""
    results = []
    for size in sizes:
        arrays = _arrays(size)
        flat = np.concatenate(arrays)
        run = {"numpy.partition alone": partial(np.partition, flat, flat.size - flat.size // 20)}
        results += interleaved(f"size {size}", {**run, **_ours(arrays)}, repeats=repeats)
    return results


def reading(*, size: int, repeats: int) -> list[Result]:
    """Time the selection against reading the scores four times, on an accelerator."""
    if not torch.cuda.is_available():
        return []
    tensors = [torch.randn(size // 100, device="cuda") for _ in range(100)]
    return interleaved(
        f"selection among {size:,} float32 on the accelerator",
        {
            "reading four times": lambda: [x.sum() for _ in range(4) for x in tensors],
            "safe_core, PyTorch": lambda: project(tensors, SPARSITY).support,
        },
        repeats=repeats,
        budgets={"safe_core, PyTorch": 2.0},
    )
