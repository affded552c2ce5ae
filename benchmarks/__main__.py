"""Compare the speed and memory of safe_core with other implementations, as Markdown tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from . import devices, projection, steps
from .block import block_step
from .llama_block import LLAMA_2_7B, SMALL, TINY, pruning
from .loading import loading
from .memory import memory
from .report import machine, plot, tables
from .reporting import reports
from .timing import Result

DOCS = Path(__file__).resolve().parent.parent / "docs"
GPU_SIZES = [10**5, 10**6, 10**7, 10**8, 10**9]
Cases = dict[str, Callable[[], list[Result]]]


def cases(quick: bool, repeats: int, compiled: bool, gpu: bool) -> Cases:
    """Return every case of a kind of device by name, at its full or a tiny size."""
    size, width, batch = (100_000, 1, 4) if quick else (10_000_000, 64, 64)
    sizes = [10_000, 100_000] if quick else [10**6, 10**7, 10**8]
    large = sizes[1:]
    if gpu and not quick:
        sizes, large = GPU_SIZES, GPU_SIZES[2:]
    only_cpu: Cases = {
        # First, as in a program that begins: memory that others have freed would be reused.
        "loading": lambda: loading(blocks=2 if quick else 30, repeats=repeats),
        "selection": lambda: projection.selection(size=size, repeats=repeats),
        "scaling": lambda: projection.scaling(sizes=sizes, repeats=repeats),
    }
    only_gpu: Cases = {
        "scaling": lambda: projection.against_sorts(sizes=sizes, repeats=repeats),
        "reading": lambda: projection.reading(size=100 * size, repeats=repeats),
        "bytes": lambda: steps.bytes_step(width=width, repeats=repeats, compiled=compiled),
    }
    both: Cases = {
        "pass": lambda: projection.one_pass(sizes=large, repeats=repeats),
        "torch": lambda: steps.torch_step(width=width, repeats=repeats, compiled=compiled, gpu=gpu),
        "host": lambda: steps.host_step(repeats=repeats),
        "jax": lambda: steps.jax_step(width=width, repeats=repeats, gpu=gpu),
        "whole": lambda: steps.whole_step(batch=batch, repeats=repeats),
        "report": lambda: reports(width=width, batch=batch, repeats=repeats),
        "block": lambda: block_step(hidden=max(64, 16 * width), tokens=8 * batch, repeats=repeats),
        "memory": lambda: memory(size=size, width=width),
        "pruning": lambda: pruning(
            TINY if quick else LLAMA_2_7B if gpu else SMALL, compiled=compiled
        ),
    }
    return {**(only_gpu if gpu else only_cpu), **both}


def write_docs(results: list[Result], described: dict[str, str], docs: Path, *, gpu: bool) -> None:
    """Write the table and the plot of a kind of device; those of the other kind stay."""
    kind = "_gpu" if gpu else ""
    image = f"_static/scaling{kind}.png"
    text = tables(results, described)
    if plot(results, docs / image, described):
        text += f"\n![Time of a projection against the number of entries]({image})\n"
    (docs / f"benchmarks{kind}_table.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the cases that the command line names, and report them."""
    names = list({**cases(True, 1, False, False), **cases(True, 1, False, True)})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        help="measure this device; by default the GPU, if PyTorch and JAX both see one",
    )
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
        "--docs", action="store_true", help="update the table and the plot of this device in docs/"
    )
    options = parser.parse_args()
    try:
        devices.choose(options.device)
    except ValueError as error:
        parser.error(str(error))
    gpu = devices.on_gpu()
    repeats = options.repeats or (1 if options.quick else 7)
    chosen = cases(options.quick, repeats, options.compile, gpu)
    missing = [name for name in options.case or () if name not in chosen]
    if missing:
        parser.error(f"--case must name cases of the {'GPU' if gpu else 'CPU'}, got {missing}")
    results = []
    for name in options.case or chosen:
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
        write_docs(results, described, DOCS, gpu=gpu)


if __name__ == "__main__":
    main()
