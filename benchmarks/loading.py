"""Time loading a sparse model from a compressed and from a dense file."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safe_core.adapters.torch import load_compressed, save_compressed

from .timing import Result

__all__ = ["loading"]

SPARSITY = 0.8
DISK = 1e9  # bytes per second


def _model(blocks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of SmolLM2-135M, sparse except for the embedding, with fewer blocks."""
    torch.manual_seed(0)
    shapes = {"embedding": (49152 * blocks // 30, 576)}
    for i in range(blocks):
        for name, rows, columns in (
            ("q", 576, 576), ("k", 192, 576), ("v", 192, 576), ("o", 576, 576),
            ("gate", 1536, 576), ("up", 1536, 576), ("down", 576, 1536),
        ):  # fmt: skip
            shapes[f"{i}.{name}"] = (rows, columns)
    found = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, x in found.items():
        if name != "embedding":
            x[torch.rand(x.shape) < SPARSITY] = 0
    return found


def loading(*, blocks: int, repeats: int) -> list[Result]:
    """Time loading from memory, and add what a disk of 1 GB/s takes for the bytes of the file.

    The time is that of all threads on the CPU, so that other processes do not count. That a disk
    reads while the CPU works, and that several threads work at once, does not count either.
    """
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            dense, small = Path(folder) / "dense.safetensors", Path(folder) / "c.safetensors"
            model = _model(blocks, dtype)
            save_file(model, dense)
            save_compressed(model, small)
            count = sum(x.numel() for x in model.values())
            del model
            name = str(dtype).removeprefix("torch.")
            case = f"loading {count / 1e6:.0f}M {name}, {SPARSITY:.0%} of the blocks zero, 1 GB/s"
            found += _timed(case, dense, small, repeats)
    return found


def _timed(case: str, dense: Path, small: Path, repeats: int) -> list[Result]:
    candidates: dict[str, tuple[Path, Callable[[], Any]]] = {
        "dense file, safetensors": (dense, lambda: [x.clone() for x in load_file(dense).values()]),
        "dense file, the disk alone": (dense, lambda: None),
        "compressed file, safe_core": (small, lambda: load_compressed(small)),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, (file, load) in candidates.items():
            start = time.process_time()
            load()
            times[name].append(time.process_time() - start + file.stat().st_size / DISK)
    baseline = times["dense file, safetensors"][1:]  # the first run fills the page cache
    return [
        Result(
            case,
            name,
            1e3 * statistics.median(taken[1:]),
            "ms",
            statistics.median(a / b for a, b in zip(taken[1:], baseline, strict=True)),
            1.0 if "compressed" in name else None,
        )
        for name, taken in times.items()
    ]
