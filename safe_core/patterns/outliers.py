"""Give each block a sparsity by its outliers: those with more of them are pruned less."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from safe_core import _checks

__all__ = ["outlier_weighed"]


def outlier_weighed(
    outliers: Sequence[Any], entries: Sequence[int], sparsity: float, reach: float = 0.08
) -> list[Fraction]:
    """Return the sparsity of each block from its fraction of outliers, with their mean kept.

    The sparsity of block l, with the fraction D_l of outliers, is::

        S_l = S - reach * (D_l - m) / max_k |D_k - m|

    where m is the mean of the D_k, weighted by the number of entries. So the mean of the S_l,
    weighted in the same way, is exactly S, and every S_l lies in [S - reach, S + reach]. If all
    D_l are equal, so are the S_l.

    Parameters
    ----------
    outliers : sequence of numbers
        Fraction of outliers in each block.
    entries : sequence of int
        Number of entries in each block.
    sparsity : float
        The mean S.
    reach : float
        The largest distance of an S_l from S, called lambda in the paper.

    Returns
    -------
    list of Fraction

    Raises
    ------
    TypeError, ValueError
        If ``S - reach`` is below 0 or ``S + reach`` is not below 1.

    Notes
    -----
    The code that was published with the paper stretches the S_l to a range of ``2 * reach``, with
    the mean S. Where a few blocks have most of the outliers, some S_l then are further than
    ``reach`` from S.

    References
    ----------
    Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
    LLMs to High Sparsity", section 3.

    Examples
    --------
    >>> [str(x) for x in outlier_weighed([0.25, 0.5, 0.75], [10, 10, 10], 0.7, 0.1)]
    ['4/5', '7/10', '3/5']
    """
    mean = _checks.decimal_fraction(_checks.sparsity("sparsity", sparsity))
    most = _checks.decimal_fraction(_checks.real("reach", reach, low=0.0))
    if mean - most < 0 or mean + most >= 1:
        raise ValueError(
            f"reach must leave every sparsity in [0, 1), got {reach!r} around {float(mean):g}"
        )
    found = [Fraction(d) for d in outliers]
    weighted = sum((d * n for d, n in zip(found, entries, strict=True)), Fraction(0))
    from_mean = [d - weighted / max(1, sum(entries)) for d in found]
    widest = max(map(abs, from_mean), default=Fraction(0))
    return [mean - most * d / widest if widest else mean for d in from_mean]
