"""Time the projection: against other implementations, the size, and one pass over the arrays."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

from safe_core import project

from . import peers
from .devices import free_bytes, torch_device
from .timing import Result, interleaved

__all__ = ["against_sorts", "one_pass", "reading", "scaling", "selection"]

SPARSITY = 0.95


# Bytes per entry that a case of this file takes at most: the arrays, a flat copy, and a sort of it
# with indices and its buffers.
_NEEDED = {"PyTorch": 56, "JAX": 40}


def _arrays(size: int, count: int = 100) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size // count, dtype=np.float32) for _ in range(count)]


def _ours(arrays: list[np.ndarray]) -> dict[str, Any]:
    tensors = [torch.from_numpy(x) for x in arrays]
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
    """Time a projection on the CPU against one partition of the flat data, and against peers."""
    arrays = _arrays(size)
    flat, kept = np.concatenate(arrays), sum(x.size for x in arrays) // 20
    tensors = [torch.from_numpy(x) for x in arrays]
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
    """Time projections of several sizes on the CPU. With linear cost the ratios stay constant."""
    results = []
    for size in sizes:
        arrays = _arrays(size)
        flat = np.concatenate(arrays)
        run = {"numpy.partition alone": partial(np.partition, flat, flat.size - flat.size // 20)}
        results += interleaved(f"size {size}", {**run, **_ours(arrays)}, repeats=repeats)
    return results


def fits(framework: Literal["PyTorch", "JAX"], size: int) -> bool:
    """Return whether the cases of a size fit in the memory of the device."""
    return size * _NEEDED[framework] <= free_bytes(framework)


def _tensors(size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size // 100, device=torch_device()) for _ in range(100)]


def _jax_arrays(size: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 100)
    return [jax.random.normal(key, size // 100, jnp.float32) for key in keys]


def against_sorts(*, sizes: list[int], repeats: int) -> list[Result]:
    """Time projections of several sizes against a sort of the flat array in the same framework.

    These are the peers of a GPU. The projection selects, breaks ties and writes the values, while
    the peers only find the threshold in magnitudes that are joined before.
    """
    torch_sizes = [size for size in sizes if fits("PyTorch", size)]
    results = [result for size in torch_sizes for result in _against_torch(size, repeats)]
    jax_sizes = [size for size in sizes if fits("JAX", size)]
    return results + [result for size in jax_sizes for result in _against_jax(size, repeats)]


def _against_torch(size: int, repeats: int) -> list[Result]:
    tensors = _tensors(size)
    flat = torch.cat(tensors).abs_()
    kept = flat.numel() // 20
    half = [x.bfloat16() for x in tensors]
    return interleaved(
        f"size {size}, PyTorch",
        {
            "torch.sort of the flat array": lambda: flat.sort().values[-kept],
            "torch.topk of the flat array": lambda: flat.topk(kept, sorted=False).values.amin(),
            "torch.kthvalue of the flat array": lambda: (
                flat.kthvalue(flat.numel() - kept + 1).values
            ),
            "safe_core, PyTorch": lambda: project(tensors, SPARSITY),
            "safe_core, PyTorch bfloat16": lambda: project(half, SPARSITY),
        },
        repeats=repeats,
        budgets={"safe_core, PyTorch": 1.0},
    )


def _against_jax(size: int, repeats: int) -> list[Result]:
    arrays = _jax_arrays(size)
    flat = jnp.abs(jnp.concatenate(arrays))
    kept = flat.size // 20
    sort = jax.jit(lambda x: jnp.sort(x)[-kept])
    top_k = jax.jit(lambda x: jax.lax.top_k(x, kept)[0][-1])
    ours = jax.jit(partial(project, sparsity=SPARSITY))
    return interleaved(
        f"size {size}, JAX",
        {
            "jnp.sort of the flat array": lambda: sort(flat),
            "jax.lax.top_k of the flat array": lambda: top_k(flat),
            "safe_core, JAX jit, counting": lambda: ours(arrays),
        },
        repeats=repeats,
        budgets={"safe_core, JAX jit, counting": 1.0},
    )


def one_pass(*, sizes: list[int], repeats: int) -> list[Result]:
    """Time projections against reading and writing the arrays once, in the same framework."""
    results = []
    for size in sizes:
        if fits("PyTorch", size):
            results += _one_pass_torch(size, repeats)
    for size in sizes:
        if fits("JAX", size):
            results += _one_pass_jax(size, repeats)
    return results


ONCE = "reading and writing the arrays once"


def _once(size: int, framework: str, passed: Any, ours: Any, repeats: int) -> list[Result]:
    name = f"safe_core, {framework}"
    return interleaved(
        f"projection of {size:,} float32 in 100 tensors against one pass, {framework}",
        {ONCE: passed, name: ours},
        repeats=repeats,
        budgets={name: 4.0} if size >= 10**7 else None,
    )


def _one_pass_torch(size: int, repeats: int) -> list[Result]:
    tensors = _tensors(size)
    copies = [torch.empty_like(x) for x in tensors]
    passed = partial(torch._foreach_copy_, copies, tensors)
    return _once(size, "PyTorch", passed, lambda: project(tensors, SPARSITY), repeats)


def _one_pass_jax(size: int, repeats: int) -> list[Result]:
    arrays = _jax_arrays(size)
    held = [[x + 0 for x in arrays]]
    add = jax.jit(lambda xs: [x + 1 for x in xs], donate_argnums=0)  # in-place, as foreach copies
    ours = jax.jit(partial(project, sparsity=SPARSITY))

    def passed() -> Any:
        held[:] = [add(held[0])]
        return held[0]

    return _once(size, "JAX jit", passed, lambda: ours(arrays), repeats)


def reading(*, size: int, repeats: int) -> list[Result]:
    """Time the selection in PyTorch against reading the scores four times."""
    if not fits("PyTorch", size):
        return []
    tensors = _tensors(size)
    return interleaved(
        f"selection among {size:,} float32, PyTorch",
        {
            "reading four times": lambda: [x.sum() for _ in range(4) for x in tensors],
            "safe_core, PyTorch": lambda: project(tensors, SPARSITY).support,
        },
        repeats=repeats,
        budgets={"safe_core, PyTorch": 2.0},
    )
