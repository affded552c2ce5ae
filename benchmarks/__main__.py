"""Compare the speed and memory of safe_core with other implementations, as Markdown tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from . import projection, steps
from .block import block_step
from .large_block import large_block
from .loading import loading
from .memory import memory
from .report import machine, plot, tables
from .reporting import reports
from .timing import Result

# Cases that compare work on an accelerator, or take hours without one.
ON_GPU = ("reading", "captured", "pruning")
ROOT = Path(__file__).resolve().parent.parent


def cases(quick: bool, repeats: int, compiled: bool) -> dict[str, Callable[[], list[Result]]]:
    """Return every case by name, at its full or a tiny size."""
    size, width, batch = (100_000, 1, 4) if quick else (10_000_000, 64, 64)
    sizes = [10_000, 100_000] if quick else [10**6, 10**7, 10**8]
    on_gpu = sizes if quick else [10**5, 10**6, 10**7, 10**8, 10**9]
    return {
        # First, as in a program that begins: memory that others have freed would be reused.
        "loading": lambda: loading(blocks=2 if quick else 30, repeats=repeats),
        "selection": lambda: projection.selection(size=size, repeats=repeats),
        "scaling": lambda: projection.scaling(sizes=sizes, repeats=repeats),
        "reading": lambda: projection.reading(sizes=on_gpu, repeats=repeats),
        "torch": lambda: steps.torch_step(width=width, repeats=repeats, compiled=compiled),
        "host": lambda: steps.host_step(repeats=repeats),
        "jax": lambda: steps.jax_step(width=width, repeats=repeats),
        "whole": lambda: steps.whole_step(batch=batch, repeats=repeats),
        "report": lambda: reports(width=width, batch=batch, repeats=repeats),
        "captured": lambda: steps.captured_step(width=width, repeats=repeats),
        "block": lambda: block_step(hidden=max(64, 16 * width), tokens=8 * batch, repeats=repeats),
        "memory": lambda: memory(size=size, width=width),
        "pruning": lambda: large_block(
            hidden=64 if quick else 4096, samples=4 if quick else 128, length=16 if quick else 2048
        ),
    }


def main() -> None:
    """Run the cases that the command line names, and report them."""
    names = list(cases(True, 1, False))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--case", action="append", choices=names, help="run only this case; may be repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="use tiny sizes, to check that everything runs"
    )
    parser.add_argument("--repeats", type=int, default=None, help="repetitions of each measurement")
    parser.add_argument(
        "--compile", action="store_true", help="also measure torch.compile (takes minutes)"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="update docs/: the table of GPUs on a machine with CUDA, elsewhere the table of CPUs "
        "and the plot",
    )
    options = parser.parse_args()
    gpu, quick = torch.cuda.is_available(), options.quick
    repeats = options.repeats or (1 if options.quick else 7)
    chosen = cases(options.quick, repeats, options.compile)
    results = []
    for name in options.case or [name for name in names if name not in ON_GPU or gpu or quick]:
        print(f"running {name} ...", flush=True)
        results += chosen[name]()
    described = machine()
    table = tables(results, described)
    if options.quick:
        table = "Tiny sizes: these figures are meaningless.\n\n" + table
    print("\n" + table)
    if options.json:
        found = {"machine": described, "results": [result.as_dict() for result in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.docs:
        kind = "_gpu" if gpu else ""
        (ROOT / "docs" / f"benchmarks_table{kind}.md").write_text(table)
        if not gpu:
            plot(results, ROOT / "docs" / "_static" / "scaling.png", described)


if __name__ == "__main__":
    main()
