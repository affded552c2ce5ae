"""Add symmetric label noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from safe_core import _checks

__all__ = ["symmetric_label_noise"]


def symmetric_label_noise(
    labels: NDArray[np.int64], ratio: float, *, classes: int, seed: int | Sequence[int]
) -> NDArray[np.int64]:
    """Return ``labels`` with ``round(ratio * n)`` of the n replaced by uniform draws.

    The replaced positions are drawn without replacement. A draw can return the old label, so
    about ``ratio * (1 - 1 / classes)`` of the labels change.

    Parameters
    ----------
    labels : (n,) array of int
        From 0 to ``classes - 1``.
    ratio : float
        In [0, 1].
    classes : int
        The number of classes to draw labels from.
    seed : int or sequence of int
        Passed to `numpy.random.default_rng`.

    Returns
    -------
    (n,) array of int
        A new array.

    Raises
    ------
    TypeError, ValueError
        If ``ratio`` is not in [0, 1], ``classes`` is not a positive integer, or a label is
        not a class.

    References
    ----------
    Lee et al. 2025, section 4.4, with ratios 0.25, 0.5 and 0.75.

    Examples
    --------
    >>> clean = np.zeros(1000, np.int64)
    >>> noisy = symmetric_label_noise(clean, 0.5, classes=10, seed=0)
    >>> float(np.mean(noisy != clean))
    0.459
    """
    if _checks.real("ratio", ratio, low=0) > 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio!r}")
    _checks.integer("classes", classes, low=1)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )
    noisy = labels.copy()
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(labels))[: round(ratio * len(labels))]
    noisy[rows] = rng.integers(classes, size=len(rows))
    return noisy
