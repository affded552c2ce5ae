"""Tables of cases of which every check runs a half."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def in_turns(*axes: Iterable[Any]) -> list[Any]:
    """Return the product of some axes for `pytest.mark.parametrize`; every second cell is long.

    The cells alternate as on a checkerboard, so that every check has each value of each axis.
    """
    cells = itertools.product(*map(enumerate, axes))
    return [
        pytest.param(*values, marks=pytest.mark.long if sum(places) % 2 else ())
        for places, values in (zip(*cell, strict=True) for cell in cells)
    ]
