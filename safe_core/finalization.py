"""Describe what `finalize` removed, and warn where the run was too short or the removal large.

`measure` reads one parameter and its final support. Its numbers are sums over entries, so those
of local shards add up. `describe` names them, and `warn` tells the user what they mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from ._calls import level_of_caller
from .backends import Array
from .constraints import Constraint
from .direction import norm
from .importance import Importance
from .patterns import Pattern
from .sparsity_tables import Cubic

__all__ = [
    "LARGE_DISTANCE",
    "LONG_RUN",
    "FinalizeWarning",
    "Finalized",
    "FinalizedTensor",
    "describe",
    "listed",
    "measure",
    "other_length",
    "planned_steps",
    "pruning_a_block",
    "shortfalls",
    "warn",
    "without_gradient",
]

LONG_RUN = 1.5
"""`finalize`, and in PyTorch the step that exceeds it, warn if the run took more than this many
times the steps of its method."""

LARGE_DISTANCE = 0.1
"""`finalize` warns if it removes more than this fraction of the norm of the weights."""

# Longer lists of names would hide the message.
_NAMES = 5
_COUNTS = ("entries", "nonzero")


class FinalizeWarning(UserWarning):
    """`finalize` changed the network a lot, or the length of the run does not fit the method.

    Steps after `finalize` that make zeros non-zero warn with it, too.
    """


class FinalizedTensor(NamedTuple):
    """Hold the changes that `finalize` made to one parameter.

    Attributes
    ----------
    name : str
    entries : int
    zeroed : int
        Non-zero entries that were set to zero.
    nonzero : int
        Non-zero entries that are left.
    norm : float
        ``|x|_2`` before.
    removed : float
        ``|x - proj(x)|_2``.
    emptied : bool
        Whether the projection made the whole parameter zero.
    """

    name: str
    entries: int
    zeroed: int
    nonzero: int
    norm: float
    removed: float
    emptied: bool

    @property
    def distance(self) -> float:
        """The relative distance ``|x - proj(x)|_2 / |x|_2``; 0 if x was zero."""
        return self.removed / self.norm if self.norm else 0.0


class Finalized(NamedTuple):
    """Hold the changes that `finalize` made to all sparse parameters.

    ``str`` gives the totals in one line.

    Attributes
    ----------
    steps : int
        Number of base steps before.
    tensors : list of FinalizedTensor

    Examples
    --------
    >>> found = Finalized(100, [FinalizedTensor("0.weight", 4, 2, 2, 5.0, 3.0, False)])
    >>> found.distance, found.zeroed, found.emptied
    (0.6, 2, [])
    >>> print(found)  # doctest: +ELLIPSIS
    finalized after 100 steps: 1 sparse parameters with 2 zeros in 4 entries (2 set to zero now)...
    """

    steps: int
    tensors: list[FinalizedTensor]

    def __str__(self) -> str:
        entries, left = (sum(getattr(row, key) for row in self.tensors) for key in _COUNTS)
        text = (
            f"finalized after {self.steps:,} steps: {len(self.tensors):,} sparse parameters with "
            f"{entries - left:,} zeros in {entries:,} entries ({self.zeroed:,} set to zero now), "
            f"{self.distance:.2g} of the norm removed"
        )
        return f"{text}; all zero: {listed(self.emptied)}" if self.emptied else text

    @property
    def distance(self) -> float:
        """The relative distance ``|x - proj(x)|_2 / |x|_2`` over all parameters together."""
        whole = math.hypot(*(row.norm for row in self.tensors))
        return math.hypot(*(row.removed for row in self.tensors)) / whole if whole else 0.0

    @property
    def zeroed(self) -> int:
        """Number of non-zero entries that were set to zero."""
        return sum(row.zeroed for row in self.tensors)

    @property
    def emptied(self) -> list[str]:
        """Names of the parameters that the projection made zero as a whole."""
        return [row.name for row in self.tensors if row.emptied]


def measure(x: Array, kept: Array) -> list[Array]:
    """Return two norms and four counts of one parameter, as scalar arrays.

    They are ``|x - proj(x)|`` and ``|x|``; the numbers of non-zero entries off and on the support
    ``kept``; the size of the support; and the number of entries that are not finite. The
    squares of the norms and the counts of local shards add up to those of the parameter.

    Examples
    --------
    >>> import numpy
    >>> found = measure(numpy.asarray([3.0, 4.0, 0.0]), numpy.asarray([False, True, True]))
    >>> [float(number) for number in found]
    [3.0, 5.0, 1.0, 1.0, 2.0, 0.0]
    """
    xp = array_namespace(x)
    filled = x != 0
    masks = (filled & ~kept, filled & kept, kept, ~xp.isfinite(x))
    norms = [norm([xp.where(kept, xp.zeros_like(x), x)]), norm([x])]
    return norms + [xp.count_nonzero(mask) for mask in masks]


def describe(
    steps: int, names: Sequence[str], entries: Sequence[int], numbers: Sequence[Sequence[float]]
) -> Finalized:
    """Return what `finalize` does, from the numbers of `measure` for every parameter.

    Raises
    ------
    ValueError
        If a parameter holds NaN or infinity. The message names it.

    Examples
    --------
    >>> describe(100, ["w"], [3], [(3.0, 5.0, 1, 1, 2, 0)]).tensors[0].distance
    0.6
    >>> describe(100, ["w"], [3], [(3.0, 5.0, 1, 1, 2, 1)])
    Traceback (most recent call last):
        ...
    ValueError: parameters must be finite, got NaN or infinity in w (1 of 3 entries)
    """
    found, broken = [], []
    for name, size, values in zip(names, entries, numbers, strict=True):
        removed, whole = (float(value) for value in values[:2])
        zeroed, nonzero, kept, infinite = (int(value) for value in values[2:])
        # A parameter that was zero already, such as a new head, was not emptied here.
        emptied = size > 0 and nonzero == 0 and (zeroed > 0 or kept == 0)
        found.append(FinalizedTensor(name, size, zeroed, nonzero, whole, removed, emptied))
        broken += [f"{name} ({infinite} of {size} entries)"] if infinite else []
    if broken:
        raise ValueError(f"parameters must be finite, got NaN or infinity in {listed(broken)}")
    return Finalized(steps, found)


def warn(
    found: Finalized,
    constraint: Constraint,
    patterns: Sequence[Pattern],
    importance: Importance | None = None,
    *,
    frozen: bool = False,
    idle: Sequence[str] = (),
    halted: Sequence[str] = (),
) -> None:
    """Warn once, at the caller's line, about everything that a user should look at.

    Parameters
    ----------
    found : Finalized
    constraint : Constraint
        The constraint of the run.
    patterns : sequence of Pattern
        The patterns of the parameters.
    importance : Importance, optional
        The source of P, if the projection used the P of the run.
    frozen : bool
        Whether the support was final before, so that steps of fine-tuning count too.
    idle : sequence of str
        Names of the parameters that had no gradient in ten or more steps.
    halted : sequence of str
        Names of the parameters that were frozen at the last step.

    Examples
    --------
    >>> from safe_core import ADMM, Unstructured
    >>> warn(Finalized(100, []), ADMM(), [Unstructured(0.5)])
    """
    texts = _unfinished(found, constraint, patterns, importance)
    planned = planned_steps(constraint, constraint.penalty)
    if not frozen and planned is not None and found.steps > LONG_RUN * planned:
        texts.append(other_length(found.steps, planned))
    # A run that was too short is far from the constraint for no other reason.
    texts += _large(found, constraint, halted, "" if texts else f" ({constraint.if_far})")
    texts += [without_gradient(idle)] if idle else []
    if found.emptied:
        texts.append(f"the projection sets all entries to zero in {listed(found.emptied)}")
    if texts:
        text = "finalize: " + "; ".join(texts)
        warnings.warn(text, FinalizeWarning, stacklevel=level_of_caller())


def planned_steps(constraint: Constraint, penalty: Any) -> int | None:
    """Return the steps of the run that the method was made for, or None if it has none.

    Examples
    --------
    >>> from safe_core import ADMM, Pull, schedules
    >>> penalty = schedules.cosine(0.4, steps=1000)
    >>> planned_steps(Pull(penalty), penalty), planned_steps(ADMM(penalty), penalty)
    (1000, None)
    """
    planned = getattr(penalty, "steps", None)
    return planned if isinstance(planned, int) and constraint.penalty_spans_run else None


def other_length(steps: int, planned: int) -> str:
    """Return the text for a run that is not as long as its method was made for."""
    return (
        f"the run takes {steps} steps, and the method was made for {planned} (give the method the "
        "steps of the run)"
    )


@contextmanager
def pruning_a_block(constraint: Constraint, pattern: Pattern, steps: int) -> Iterator[None]:
    """Warn about a run too short for its method, and about nothing else that `finalize` finds.

    Pruning a block of a network reports the error of the block, so the distance needs no
    warning. The text is the same for all blocks, so Python shows it once.

    Examples
    --------
    >>> from safe_core import ADMM, Unstructured
    >>> with pruning_a_block(ADMM(), Unstructured(0.5), 100):
    ...     warn(Finalized(0, []), ADMM(), [Unstructured(0.5)])
    """
    text = constraint.unfinished(pattern, steps)
    if text:
        text = f"pruning a block: {text}"
        warnings.warn(text, FinalizeWarning, stacklevel=level_of_caller())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FinalizeWarning)
        yield


def _unfinished(
    found: Finalized,
    constraint: Constraint,
    patterns: Sequence[Pattern],
    importance: Importance | None,
) -> list[str]:
    """Return why the run was too short for its method, as texts."""
    steps = found.steps
    if not found.zeroed:  # the weights were in C already
        return []
    texts = shortfalls(constraint, patterns, steps)
    reads = importance is not None and importance.reads is not None
    if reads and not texts and not constraint.has_updated(_parts(patterns), steps):
        texts.append(f"the importance was never refreshed in {steps} steps, so P is 1")
    return texts


def shortfalls(constraint: Constraint, patterns: Sequence[Pattern], steps: int) -> list[str]:
    """Return what a run of ``steps`` leaves unfinished: the constraint, and sparsity schedules.

    Examples
    --------
    >>> from safe_core import Mask, Unstructured
    >>> from safe_core.schedules import cubic
    >>> shortfalls(Mask(), [Unstructured(cubic(0.5, steps=200, every=100))], 100)
    ['the sparsity was at 0.438 of 0.5 after 100 steps, because its schedule has 200 (train to its \
end, or give the method the steps of the run)']
    """
    parts = _parts(patterns)
    texts = [constraint.unfinished(part, steps) for part in parts]
    left = [_schedule_left(part, steps) for part in parts]
    return [text for text in texts if text][:1] + [text for text in left if text][:1]


def _parts(patterns: Sequence[Pattern]) -> list[Pattern]:
    return list(dict.fromkeys(part for pattern in patterns for part in pattern.parts))


def _schedule_left(pattern: Pattern, steps: int) -> str:
    """Return a text if the sparsity schedule has not reached its end."""
    schedule = pattern.schedule
    if not isinstance(schedule, Cubic):  # it is constant, or drawn at random
        return ""
    stage, last = pattern.stage(steps), pattern.stage(None)
    if stage == last:
        return ""
    now, end = _told_apart(*(float(pattern.fractions()[i]) for i in (stage, last)))
    # The stages end where the schedule has risen, which may be long before the end of the run.
    whole = schedule.start + schedule.steps
    return (
        f"the sparsity was at {now} of {end} after {steps} steps, because its schedule has {whole} "
        "(train to its end, or give the method the steps of the run)"
    )


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Return two different numbers with as many digits as show that they differ."""
    shown = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in range(3, 18))
    return next((pair for pair in shown if pair[0] != pair[1]), (f"{a:g}", f"{b:g}"))


def without_gradient(idle: Sequence[str]) -> str:
    """Return a text about parameters that never had a gradient, or "" if there are none.

    Examples
    --------
    >>> without_gradient(["auxiliary.weight"])
    'auxiliary.weight never had a gradient, but its entries count towards the sparsity (leave it \
out by where=)'
    """
    if not idle:
        return ""
    its, it = ("its", "it") if len(idle) == 1 else ("their", "them")
    return (
        f"{listed(idle)} never had a gradient, but {its} entries count towards the sparsity (leave "
        f"{it} out by where=)"
    )


def _large(
    found: Finalized, constraint: Constraint, halted: Sequence[str], remedy: str
) -> list[str]:
    """Return a text if the projection removes much, unless the method prunes at the end."""
    if not all(math.isfinite(row.norm) for row in found.tensors):
        return ["the norm of the weights is not finite (lower the learning rate or clip gradients)"]
    if constraint.prunes_at_end or found.distance <= LARGE_DISTANCE:
        return []
    rows = sorted(found.tensors, key=lambda row: row.removed, reverse=True)
    most = listed([f"{row.name} {row.distance:.2f}" for row in rows if row.removed])
    still = [row.name for row in rows if row.name in halted and row.distance > LARGE_DISTANCE]
    if still:
        remedy += f" ({listed(still)} did not move in the last step: requires_grad is False)"
    return [
        f"the projection removes |x - proj(x)| / |x| = {found.distance:.2f} of the weights "
        f"({most}), so x was far from the sparse weights{remedy}"
    ]


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first few, and how many more there are.

    Examples
    --------
    >>> listed(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
