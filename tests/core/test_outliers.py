"""The sparsities of blocks by their outliers: bounds, the mean, and exact counts."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_core.patterns import outlier_weighed
from safe_core.patterns.distribution import round_to_sum

BLOCKS = st.lists(st.tuples(st.fractions(0, 1), st.integers(1, 10**6)), min_size=1, max_size=8)
HUNDREDTHS = st.integers(20, 79).map(lambda n: n / 100)


@given(BLOCKS, HUNDREDTHS, st.integers(0, 20).map(lambda n: n / 100))
def test_mean_and_bounds_are_kept(
    blocks: list[tuple[Fraction, int]], sparsity: float, reach: float
) -> None:
    outliers, entries = zip(*blocks, strict=True)
    found = outlier_weighed(outliers, entries, sparsity, reach)
    exact, most = Fraction(str(sparsity)), Fraction(str(reach))
    assert sum(s * n for s, n in zip(found, entries, strict=True)) == exact * sum(entries)
    assert all(exact - most <= s <= exact + most for s in found)
    by_outliers = sorted(zip(outliers, found, strict=True))
    assert all(a[1] >= b[1] for a, b in pairwise(by_outliers))
    if len(set(outliers)) > 1:
        assert max(abs(s - exact) for s in found) == most  # the whole reach is used


def test_the_range_may_not_leave_the_unit_interval() -> None:
    assert outlier_weighed([0.5], [3], 0.08) == [Fraction(2, 25)]
    for sparsity, reach in ((0.05, 0.08), (0.95, 0.05), (0.5, 0.6)):
        with pytest.raises(ValueError, match=r"leave every sparsity in \[0, 1\), got"):
            outlier_weighed([], [], sparsity, reach)
    with pytest.raises(ValueError, match="reach must be a finite number of at least 0"):
        outlier_weighed([], [], 0.5, -0.1)
    with pytest.raises(ValueError, match="sparsity must be a fraction"):
        outlier_weighed([], [], 1.5)


@given(st.lists(st.tuples(st.fractions(0, 50), st.integers(1, 9)), min_size=1, max_size=8))
def test_rounding_keeps_the_sum(rows: list[tuple[Fraction, int]]) -> None:
    exact, units = (list(column) for column in zip(*rows, strict=True))
    total = int(sum(exact))
    whole = round_to_sum(exact, total)
    assert sum(whole) == total
    assert all(abs(n - x) < 1 for n, x in zip(whole, exact, strict=True))
    found = round_to_sum(exact, total, units)
    assert total - max(units) < sum(found) <= total
    assert all(n % unit == 0 for n, unit in zip(found, units, strict=True))
    assert all(abs(n - x) <= unit for n, x, unit in zip(found, exact, units, strict=True))
