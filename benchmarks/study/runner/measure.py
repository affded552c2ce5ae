"""Measure a trained network, in the same way for both frameworks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_core.study.data import CORRUPTIONS as CIFAR_CORRUPTIONS
from safe_core.study.data import Split, load_cifar_10_c, pixels
from safe_core.study.models import Variables
from safe_core.study.robustness import CORRUPTIONS, PGD, corrupt

from .plan import Plan, Subject
from .recipe import MOMENTS, Attack, Evaluation

__all__ = ["accuracy", "constraint_distance", "is_finite", "measure", "zeros"]

_BATCH = 1000  # images per batch
MakeSubject = Callable[[Variables], Subject]


def measure(
    evaluation: Evaluation, plan: Plan, make: MakeSubject, dense: Variables, sparse: Variables
) -> dict[str, Any]:
    """Return the measurements that a recipe asks for, by name.

    Accuracies are in percent. ``dense_accuracy`` is measured before the projection, everything
    else after it. With batch-norm tuning, ``accuracy_untuned`` is measured before the tuning and
    everything else after it.
    """
    subject = make(sparse)
    found: dict[str, Any] = {}
    if evaluation.batch_norm_tuning:
        found["accuracy_untuned"] = accuracy(subject, plan.data.test)
        subject = make(subject.recalibrated(_tuning_batches(evaluation, plan)))
    found["accuracy"] = accuracy(subject, plan.data.test)
    found["dense_accuracy"] = accuracy(make(dense), plan.data.test)
    found["distance"] = constraint_distance(dense, sparse)
    found["zeros"], found["weights"] = zeros(sparse)
    found |= _flatness(evaluation, plan, subject)
    for severity in evaluation.corruptions:
        found[f"corruption_{severity}"] = _corrupted(evaluation, plan, subject, severity)
        if evaluation.corruption_ratio:
            ratio = found[f"corruption_{severity}"] / max(found["accuracy"], 1e-9)
            found[f"corruption_ratio_{severity}"] = ratio
    for attack in evaluation.attacks:
        found[f"pgd_{attack.norm}"] = _attacked(attack, plan, subject)
    if evaluation.weight_bins:
        found["weights_histogram"] = _histogram(dense, evaluation.weight_bins)
    return found


def accuracy(subject: Subject, split: Split) -> float:
    """Return the percentage of correct predictions."""
    right = sum(
        int(np.sum(subject.logits(images).argmax(1) == labels))
        for images, labels in _parts(split.images, split.labels)
    )
    return 100 * right / len(split.labels)


def constraint_distance(dense: Variables, sparse: Variables) -> float:
    """Return the distance from the constraint, ``|x - proj(x)|_2``.

    Examples
    --------
    >>> x = {"params": {"dense": {"kernel": np.asarray([[3.0], [4.0]])}}}
    >>> constraint_distance(x, {"params": {"dense": {"kernel": np.asarray([[0.0], [0.0]])}}})
    5.0
    """
    pairs = zip(_leaves(dense["params"]), _leaves(sparse["params"]), strict=True)
    squares = [np.sum(np.square(a - b, dtype=np.float64)) for a, b in pairs]
    return float(np.sqrt(np.sum(squares)))


def is_finite(variables: Variables) -> bool:
    """Return whether all weights and statistics are finite.

    Examples
    --------
    >>> is_finite({"params": {"dense": {"kernel": np.asarray([[np.nan]])}}})
    False
    """
    return all(bool(np.isfinite(x).all()) for x in _leaves(variables))


def zeros(variables: Variables) -> tuple[int, int]:
    """Return the numbers of zero weights and of all weights, without biases and normalisation.

    Examples
    --------
    >>> zeros({"params": {"dense": {"kernel": np.asarray([[0.0], [4.0]]), "bias": np.zeros(1)}}})
    (1, 2)
    """
    kernels = [x for x in _leaves(variables["params"]) if x.ndim > 1]
    return sum(int(np.sum(x == 0)) for x in kernels), sum(x.size for x in kernels)


def _flatness(evaluation: Evaluation, plan: Plan, subject: Subject) -> dict[str, Any]:
    """Measure flatness on the first training images, with the labels used in training."""
    if not evaluation.flatness and not evaluation.landscape_points:
        return {}
    images, labels = (part[: evaluation.flatness_images] for part in plan.data.train)
    surface = subject.surface(list(_parts(images, labels)))
    measures = {
        "eigenvalue": lambda: surface.eigenvalues(seed=plan.seed).values[0],
        "trace": lambda: surface.trace(seed=plan.seed).value,
        "sharpness": lambda: surface.sharpness(evaluation.flatness_rho, seed=plan.seed).mean,
    }
    measures |= _moments(evaluation, plan, subject, images, labels)
    found: dict[str, Any] = {name: float(measures[name]()) for name in evaluation.flatness}
    if evaluation.landscape_points:
        # One seed for all networks, so that they are cut along the same random directions.
        plane = surface.landscape(2, points=evaluation.landscape_points, seed=0)
        found["landscape"] = {name: x.tolist() for name, x in plane._asdict().items()}
    return found


def _moments(
    evaluation: Evaluation, plan: Plan, subject: Subject, images: Any, labels: Any
) -> dict[str, Callable[[], float]]:
    """Return the moments of the Hessians of batches of one size, to measure by name."""
    size = evaluation.moment_batch or plan.training.batch_size
    whole = max(size, len(labels) // size * size)
    surface = subject.surface(list(_parts(images[:whole], labels[:whole], size)))

    def moment(order: int) -> float:
        value: float = surface.moment(order, seed=plan.seed).value
        return value

    return {name: partial(moment, int(name.removeprefix("moment_"))) for name in MOMENTS}


def _corrupted(evaluation: Evaluation, plan: Plan, subject: Subject, severity: int) -> float:
    """Return the mean accuracy over common corruptions, from files of CIFAR-10-C if given."""
    if evaluation.corruption_folder is not None:
        folder = Path(evaluation.corruption_folder)
        splits: Iterator[Split] = (
            load_cifar_10_c(folder, name, severity) for name in CIFAR_CORRUPTIONS
        )
    else:
        images, labels = plan.data.test
        splits = (Split(corrupt(images, name, severity), labels) for name in CORRUPTIONS)
    return float(np.mean([accuracy(subject, split) for split in splits]))


def _attacked(attack: Attack, plan: Plan, subject: Subject) -> float:
    pgd = PGD(attack.norm, attack.radius, attack.steps)
    right = 0
    for part, (images, labels) in enumerate(_parts(*plan.data.test)):
        # Each part, and each seed of a study, draws its own starting points.
        moved = subject.attacked(pgd, images, labels, plan.seed + part * 2**20)
        right += int(np.sum(subject.logits(moved).argmax(1) == labels))
    return 100 * right / len(plan.data.test.labels)


def _histogram(variables: Variables, bins: int) -> dict[str, Any]:
    """Return the histogram of the weights before the final projection."""
    weights = np.concatenate([x.ravel() for x in _leaves(variables["params"]) if x.ndim > 1])
    counts, edges = np.histogram(weights, bins, range=(-1, 1))
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _tuning_batches(evaluation: Evaluation, plan: Plan) -> list[NDArray[np.float32]]:
    """Return batches of the first epoch, as used in training."""
    found: list[NDArray[np.float32]] = []
    for images, _ in plan.batches(0):
        found.append(images)
        if sum(map(len, found)) >= evaluation.batch_norm_samples:
            break
    return found


def _parts(
    images: Any, labels: Any, size: int | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    size = size or _BATCH
    for i in range(0, len(labels), size):
        yield pixels(images[i : i + size]), labels[i : i + size]


def _leaves(tree: Any) -> Sequence[NDArray[Any]]:
    if not isinstance(tree, Mapping):
        return [tree]
    return [leaf for name in sorted(tree) for leaf in _leaves(tree[name])]
