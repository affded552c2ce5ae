"""Time loading a sparse model from a compressed and from a dense file on the disk."""

from __future__ import annotations

import os
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
    """Time loading from a disk, with files that the operating system does not hold in memory.

    The row "the disk alone" reads the bytes of the dense file and nothing else, which shows the
    speed of the disk. In a temporary folder that lies in memory there is no disk to wait for, and
    on macOS and Windows the files stay in memory.
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
            case = f"loading {count / 1e6:.0f}M {name}, {SPARSITY:.0%} of the blocks zero"
            found += _timed(case, dense, small, repeats)
    return found


def _timed(case: str, dense: Path, small: Path, repeats: int) -> list[Result]:
    candidates: dict[str, tuple[Path, Callable[[], Any]]] = {
        "dense file, safetensors": (dense, lambda: [x.clone() for x in load_file(dense).values()]),
        "dense file, mapped": (dense, lambda: [_touch(x) for x in load_file(dense).values()]),
        "dense file, the disk alone": (dense, lambda: _read(dense)),
        "compressed file, safe_core": (small, lambda: load_compressed(small)),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, (file, load) in candidates.items():
            _forget(file)
            start = time.perf_counter()
            load()
            times[name].append(time.perf_counter() - start)
    baseline = times["dense file, safetensors"]
    return [
        Result(
            case,
            name,
            1e3 * statistics.median(taken),
            "ms",
            statistics.median(a / b for a, b in zip(taken, baseline, strict=True)),
            1.0 if "compressed" in name else None,
        )
        for name, taken in times.items()
    ]


def _forget(file: Path) -> None:
    """Let the operating system drop a file from its cache, so that the disk has to read it."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # pages that are not written yet cannot be dropped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _touch(x: Tensor) -> None:
    """Read an entry of every page, so that a mapped tensor is in memory."""
    x.view(torch.uint8).view(-1)[::4096].sum()


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(2**22):
            pass
