"""Compare ELSA with block-wise pruning and fine-tuning, at the same number of training steps.

python -m benchmarks.byte_llama --out LLAMA
python -m benchmarks.elsa --llama LLAMA
python -m benchmarks.elsa --table

The network is a Llama over bytes. Every method takes the same number of steps on the same batches,
with Adam, a rate that falls linearly to 0, and gradients clipped to 1. Block-wise methods prune
first and train under their zeros. The learning rate, and the penalty of ELSA, are chosen for each
method and sparsity on one half of the held-out text; the table shows the other half. Results are
appended to docs/elsa_results.jsonl as one line of JSON per run; finished runs are skipped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import safe_core
from safe_core import Unstructured, schedules
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.command_line.perplexity import perplexity

from .corpus import source, windows
from .report import write_below_machine
from .results import append, lines
from .training import fit
from .transformers import Llama

__all__ = ["METHODS", "markdown"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, TABLE = DOCS / "elsa_results.jsonl", DOCS / "elsa_table.md"
SPARSITIES = (0.6, 0.8, 0.9)
RATES, PENALTIES = (3e-4, 1e-3, 3e-3), (1e-2, 1e-1, 1.0)
LENGTH, BATCH, PREDICTIONS = 64, 8, 32_768
UPDATES = 128  # dual updates of a run, as in the paper
BLOCKWISE: dict[str, Callable[[], Any]] = {
    "Wanda, fine-tuned": lambda: "wanda",
    "ALPS, fine-tuned": lambda: "alps",
    "SAFE+, fine-tuned": lambda: SafeReconstruction(importance="wanda", epochs=5),
}
TRAINED: dict[str, Callable[[float, int, float], safe_core.Method]] = {
    "GMP": lambda s, steps, _: safe_core.gmp(_in_tensors(_rising(s, steps))),
    "ADMM, untuned": lambda s, steps, _: safe_core.admm(_in_tensors(s), steps=steps),
    "ELSA": lambda s, steps, penalty: _elsa(s, steps, penalty, "objective"),
    "ELSA, magnitude": lambda s, steps, penalty: _elsa(s, steps, penalty, "magnitude"),
}
METHODS = (*BLOCKWISE, *TRAINED)


def _in_tensors(sparsity: Any) -> Unstructured:
    return Unstructured(sparsity, "tensor")


def _rising(sparsity: float, steps: int) -> Any:
    every = max(steps // UPDATES, 1)
    return schedules.cubic(sparsity, steps=7 * steps // 10 // every * every, every=every)


def _elsa(sparsity: float, steps: int, penalty: float, score: Any) -> safe_core.Method:
    every = max(steps // UPDATES, 1)
    return safe_core.elsa(sparsity, penalty=penalty, dual_update_interval=every, score=score)


def tried(method: str) -> Iterator[tuple[float, float | None]]:
    """Yield the learning rates and penalties to choose from."""
    yield from itertools.product(RATES, PENALTIES if "ELSA" in method else (None,))


def run(
    method: str, sparsity: float, rate: float, penalty: float | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once, and return a line of results."""
    torch.manual_seed(options.seed)
    model = Llama(options.llama).load()
    line: dict[str, Any] = {"method": method, "sparsity": sparsity, "rate": rate}
    line |= {"penalty": penalty, "steps": options.steps, "seed": options.seed}
    if method in BLOCKWISE:
        rows = windows(source(held_out=False), 64, LENGTH, seed=options.seed)
        prune_blocks(model, rows, BLOCKWISE[method](), sparsity)
        line["pruned"] = measured(model)
        found = safe_core.keep_zeros()
    else:
        found = TRAINED[method](sparsity, options.steps, penalty or 0.0)
    base = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.95))
    # The head stays dense, as in block-wise pruning.
    optimizer = SparseOptimizer(base, found, model=model, where=lambda name, p: "proj" in name)
    fit(
        model,
        optimizer,
        source(held_out=False),
        options.steps,
        batch=BATCH,
        length=LENGTH,
        clip=1.0,
    )
    optimizer.finalize()
    optimizer.check_sparsity()
    return line | {"distance": optimizer.finalized.distance, "found": measured(model)}


def measured(model: nn.Module) -> dict[str, float]:
    """Return the perplexity on both halves of the held-out text."""
    texts = source(held_out=True)[: 2 * PREDICTIONS].split(PREDICTIONS)
    model.eval()
    return {
        half: perplexity(model, text, 256, batch_size=16).perplexity
        for half, text in zip(("choice", "test"), texts, strict=True)
    }


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    keys = ("method", "sparsity", "rate", "penalty", "steps", "seed")
    done = {tuple(line[key] for key in keys) for line in lines(options.results)}
    if not any(line["method"] == "Dense" for line in lines(options.results)):
        yield dict.fromkeys(keys) | {
            "method": "Dense",
            "found": measured(Llama(options.llama).load()),
        }
    for sparsity, method in itertools.product(options.sparsities, options.methods):
        for rate, penalty in tried(method):
            if (method, sparsity, rate, penalty, options.steps, options.seed) not in done:
                yield run(method, sparsity, rate, penalty, options)


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of test perplexities at the settings that were chosen."""
    (dense,) = (r["found"]["test"] for r in results if r["method"] == "Dense")
    sparsities = sorted({r["sparsity"] for r in results if r["method"] != "Dense"})
    rows = [
        f"| perplexity (dense {dense:.2f}) | {' | '.join(f'{s:.0%}' for s in sparsities)} |",
        f"| --- |{' ---: |' * len(sparsities)}",
    ]
    best = {
        (method, s): min(cell, key=lambda r: r["found"]["choice"])
        for method in METHODS
        for s in sparsities
        if (cell := [r for r in results if (r["method"], r["sparsity"]) == (method, s)])
    }
    tests = {key: line["found"]["test"] for key, line in best.items()}
    first = {s: min(test for key, test in tests.items() if key[1] == s) for s in sparsities}
    for method in METHODS:
        mine = [tests.get((method, s)) for s in sparsities]
        texts = [
            "" if test is None else f"**{test:.2f}**" if test == first[s] else f"{test:.2f}"
            for test, s in zip(mine, sparsities, strict=True)
        ]
        rows.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the cells of the command line, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elsa", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file")
    parser.add_argument("--llama", type=Path, help="folder of the Llama over bytes")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    options = parser.parse_args()
    if options.table:
        write_below_machine(TABLE, markdown(lines(options.results)))
        return
    if options.llama is None:
        parser.error("--llama must name the folder of the Llama over bytes")
    append(options.results, runs(options))


if __name__ == "__main__":
    main()
