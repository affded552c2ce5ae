"""Choose the kind of device that the benchmarks measure."""

from __future__ import annotations

import os
from typing import Literal

import jax
import torch

__all__ = [
    "choose",
    "free_bytes",
    "gpu_name",
    "jax_device",
    "on_gpu",
    "torch_device",
    "without_gpu",
]

_hidden = False


def without_gpu() -> list[str]:
    """Return the frameworks that see no GPU."""
    sees = {"PyTorch": torch.cuda.is_available(), "JAX": jax.default_backend() == "gpu"}
    return [name for name, found in sees.items() if not found]


def choose(kind: Literal["cpu", "gpu"] | None) -> None:
    """Measure this kind of device; by default the GPU, if both frameworks see one.

    Raises
    ------
    ValueError
        If a GPU is chosen that a framework does not see: its rows would be those of the CPU.
    """
    global _hidden
    missing = without_gpu()
    if kind == "gpu" and missing:
        raise ValueError(f"device must be one that each framework sees, got no GPU in {missing}")
    _hidden = kind == "cpu" or bool(missing)
    jax.config.update("jax_default_device", jax.devices("cpu")[0] if _hidden else None)


def on_gpu() -> bool:
    """Return whether a GPU is measured."""
    return not _hidden and not without_gpu()


def torch_device() -> str:
    """Return the device of the tensors."""
    return "cuda" if on_gpu() else "cpu"


def gpu_name() -> str:
    """Return the GPU that PyTorch may use, with its memory and the version of CUDA, or "none"."""
    if _hidden or not torch.cuda.is_available():
        return "none"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def jax_device() -> str:
    """Return the name of the device on which JAX computes."""
    device = jax.config.jax_default_device or jax.devices()[0]
    return "CPU" if device.platform == "cpu" else f"{device.device_kind} ({device.platform})"


def free_bytes(framework: Literal["PyTorch", "JAX"]) -> int:
    """Return the memory that a framework can still allocate on the device."""
    if not on_gpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    torch.cuda.empty_cache()  # else JAX could not use what PyTorch has freed
    if framework == "PyTorch":
        return torch.cuda.mem_get_info()[0]
    found = jax.devices()[0].memory_stats()
    return int(found["bytes_limit"] - found["bytes_in_use"])
