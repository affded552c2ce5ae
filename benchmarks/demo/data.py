"""Prepare scikit-learn's digits in the same way for both frameworks: split, noise, batches."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from safe_core.study.noise import symmetric_label_noise

from .recipe import Recipe, Run

__all__ = ["Dataset", "Layer", "accuracy", "cross_entropy", "initial_layers", "load", "logits"]

Floats = NDArray[np.float32]
CLASSES = 10


class Layer(NamedTuple):
    """A layer: a weight of shape (input, output) and a bias of shape (output,)."""

    weight: Floats
    bias: Floats


class Dataset(NamedTuple):
    """The data of one run.

    ``order`` of shape (steps, batch) holds the rows of every batch. ``validation`` is the
    held-out fifth of the training set, with the same label noise. It is empty if nothing is
    held out.
    """

    inputs: Floats
    labels: NDArray[np.int64]
    order: NDArray[np.int64]
    validation: tuple[Floats, NDArray[np.int64]]
    test: tuple[Floats, NDArray[np.int64]]


def load(recipe: Recipe, run: Run) -> Dataset:
    """Load the digits for one run, split them, add label noise and arrange batches."""
    images, digits = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, digits, test_size=0.3, stratify=digits, random_state=0)
    train, test = (part.astype(np.float32) for part in split[:2])
    mean = train.mean(axis=0)
    train, test = train - mean, test - mean
    labels = symmetric_label_noise(split[2], run.noise, classes=CLASSES, seed=[run.seed, 1])
    kept, held = np.arange(len(labels)), np.arange(0)
    if run.held_out:
        kept, held = train_test_split(kept, test_size=0.2, stratify=split[2], random_state=0)
    batches = len(kept) // recipe.batch_size  # the last, smaller batch is dropped
    shuffle = np.random.default_rng([run.seed, 2])
    order = [
        shuffle.permutation(len(kept))[: batches * recipe.batch_size].reshape(batches, -1)
        for _ in range(recipe.epochs)
    ]
    return Dataset(
        train[kept],
        labels[kept],
        np.concatenate(order),
        (train[held], labels[held]),
        (test, split[3]),
    )


def initial_layers(recipe: Recipe, run: Run, features: int) -> list[Layer]:
    """Draw layers by He initialisation: weights with variance ``2 / inputs``, zero biases."""
    rng = np.random.default_rng([run.seed, 0])
    sizes = (features, *recipe.hidden, CLASSES)
    return [
        Layer(
            (rng.standard_normal((m, n)) * np.sqrt(2 / m)).astype(np.float32),
            np.zeros(n, np.float32),
        )
        for m, n in itertools.pairwise(sizes)
    ]


def logits(layers: list[Layer], inputs: Floats) -> Floats:
    """Return the logits of the network, which has ReLU between its layers."""
    for i, (weight, bias) in enumerate(layers):
        inputs = inputs @ weight + bias
        if i < len(layers) - 1:
            inputs = np.maximum(inputs, 0)
    return inputs


def accuracy(layers: list[Layer], inputs: Floats, labels: NDArray[np.int64]) -> float:
    """Return the percentage of correct predictions."""
    return float(100 * np.mean(logits(layers, inputs).argmax(axis=1) == labels))


def cross_entropy(layers: list[Layer], inputs: Floats, labels: NDArray[np.int64]) -> float:
    """Return the mean cross entropy in nats."""
    scores = logits(layers, inputs).astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    log_normaliser = np.log(np.exp(scores).sum(axis=1))
    return float(np.mean(log_normaliser - scores[np.arange(len(labels)), labels]))
