"""Describe the machine, and write tables and the plot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .devices import gpu_name, jax_device
from .timing import Result

__all__ = ["machine", "machine_table", "plot", "tables", "write_below_machine"]


def machine() -> dict[str, str]:
    """Describe the machine. The speed of partition depends on the SIMD instructions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
        return found[1] if found else "unknown"

    flags = field("flags").split()
    simd = [flag for flag in ("avx2", "avx512f") if flag in flags]
    packages = ("numpy", "torch", "jax", "optax")
    return {
        "CPU": f"{field('model name')}, family {field('cpu family')}, model {field('model')}",
        "SIMD": ", ".join(simd) or "unknown",
        "cores": f"{os.cpu_count()}, of which PyTorch uses {torch.get_num_threads()}",
        "GPU": gpu_name(),
        "device of JAX": jax_device(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
    }


def machine_table(described: dict[str, str]) -> list[str]:
    """Return the description of a machine as lines of Markdown."""
    rows = [f"| {name} | {value} |" for name, value in described.items()]
    return ["| machine | |", "| --- | --- |", *rows]


def write_below_machine(path: Path, table: str) -> None:
    """Write a table below that of this machine."""
    path.write_text("\n".join(machine_table(machine())) + f"\n\n{table}", encoding="utf-8")


def tables(results: Sequence[Result], described: dict[str, str]) -> str:
    """Return Markdown: the machine, then a table for each case."""
    lines = machine_table(described)
    for case in dict.fromkeys(result.case for result in results):
        rows = [result for result in results if result.case == case]
        lines += ["", f"**{case}**", ""]
        lines += [f"| | median, {rows[0].unit} | ratio | budget |", "| --- | ---: | ---: | ---: |"]
        for row in rows:
            budget = "" if row.budget is None else f"{row.budget:g}"
            lines.append(f"| {row.name} | {row.value:.4g} | {row.ratio:.2f} | {budget} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path, described: dict[str, str]) -> bool:
    """Plot the time of a projection against its size. Return False if no size was measured."""
    sizes = [(re.match(r"size (\d+)", result.case), result) for result in results]
    points = [(int(size[1]), result) for size, result in sizes if size]
    if not points:
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in dict.fromkeys(result.name for _, result in points):
        mine = [(size, result.value) for size, result in points if result.name == name]
        axes.loglog(*zip(*mine, strict=True), marker="o", label=name)
    device = described.get("GPU", "none")
    name = described["CPU"] if device == "none" else device
    axes.set(xlabel="entries, float32", ylabel="ms", title=f"Projection, 95% global\n{name}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
