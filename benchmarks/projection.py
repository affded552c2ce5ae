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


def reading(*, sizes: list[int], repeats: int) -> list[Result]:
    """Time projections against reading and writing the arrays once, and against sorts.

    All run on the device of each library, of which the first of PyTorch is CUDA if there is one.
    Sizes for which the memory of the device is too small are left out. JAX has cases of its own,
    because its arrays lie beside those of PyTorch.
    """
    results = []
    for size in sizes:
        kept = size // 100 * 100 // 20
        try:
            tensors = [torch.randn(size // 100, device=_device()) for _ in range(100)]
            case = f"projection of {size:,} float32 in 100 tensors where they lie, PyTorch"
            results += interleaved(
                case,
                {
                    "reading and writing once": lambda x=tensors: [t + 1 for t in x],
                    "safe_core": lambda x=tensors: project(x, SPARSITY).values,
                    "torch.sort threshold": lambda x=tensors, k=kept: peers.by_sort(x, k),
                    "torch.topk threshold": lambda x=tensors, k=kept: peers.by_topk(x, k),
                },
                repeats=repeats,
                budgets={"safe_core": 4.0} if size >= 10**7 else None,
            )
            del tensors
            arrays = [jnp.asarray(x) for x in _arrays(size)]
            results += _reading_jax(arrays, size, kept, repeats)
        except (torch.OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
            print(f"left out {size:,} entries: {str(error).splitlines()[0]}", flush=True)
    return results


def _reading_jax(arrays: list[Any], size: int, kept: int, repeats: int) -> list[Result]:
    once = jax.jit(lambda xs: [x + 1 for x in xs])
    ours = jax.jit(lambda xs: project(xs, SPARSITY).values)
    by_sort = jax.jit(partial(peers.by_sort_jax, kept=kept))
    by_top_k = jax.jit(partial(peers.by_top_k_jax, kept=kept))
    return interleaved(
        f"projection of {size:,} float32 in 100 arrays where they lie, JAX",
        {
            "reading and writing once": lambda: once(arrays),
            "safe_core": lambda: ours(arrays),
            "jnp.sort threshold": lambda: by_sort(arrays),
            "jax.lax.top_k threshold": lambda: by_top_k(arrays),
        },
        repeats=repeats,
        budgets={"safe_core": 4.0} if size >= 10**7 else None,
    )
