"""Say how the settings of two runs differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from .fingerprints import Description

__all__ = ["changed_settings"]

# Settings that change if another does: the cause alone says what is to be done.
_CAUSES = {
    "sparsity": ("weights",),
    "method": ("weights", "sparsity", "solver"),
    "start": ("solver",),
    "peak": ("solver",),
    "warmup": ("solver",),
    "batches": ("seed",),
}
_LONG = 120  # characters of a value
_MOST = 4  # settings that are named


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the settings in which two runs differ, with their values.

    Where both values are calls of the same name, such as of a solver, only the arguments that
    differ are named.

    Parameters
    ----------
    then, now : mapping of str to description
        Settings as `safe_core.adapters.torch.blocks.task.Task.described` returns them.

    Examples
    --------
    >>> changed_settings(
    ...     {"seed": "0", "solver": {"Safe": {"epochs": "5", "rho": "None"}}},
    ...     {"seed": "1", "solver": {"Safe": {"epochs": "6", "rho": "None"}}},
    ... )
    'seed was 0, now 1; epochs was 5, now 6'
    """
    keys = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
    causes = [key for key in keys if not set(_CAUSES.get(key, ())).intersection(keys)]
    found = [text for key in causes for text in _changes(key, then.get(key), now.get(key))]
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more


def _changes(key: str, was: Any, got: Any) -> Iterator[str]:
    """Yield what differs in the value of a setting."""
    if key == "batches" and was and got:
        yield "the calibration samples differ"
    elif key == "weights" and was and got:
        yield _other_weight(was, got)
    else:
        yield from _differing(key, was, got)


def _differing(name: str, was: Any, got: Any, *, nested: bool = False) -> Iterator[str]:
    """Yield what differs in two descriptions: arguments of the same call, or the values."""
    (old, before), (new, after) = _call(was), _call(got)
    if old and old == new and list(before) == list(after):
        for key, value in before.items():
            # The only argument of a schedule, such as its value, is that of the setting.
            own = key.isidentifier() and not (nested and len(before) == 1)
            if value != after[key]:
                yield from _differing(key if own else name, value, after[key], nested=True)
        return
    then, now = _told(was), _told(got)
    if then == now:  # two classes of one name
        then, now = _told(was, full=True), _told(got, full=True)
    if old != new and len(then) + len(now) > _LONG:
        yield f"{name} was {_short(was, then)}, now {_short(got, now)}"
    else:
        yield f"{name} was {_excerpt(then, now)}, now {_excerpt(now, then)}"


def _call(found: Any) -> tuple[str, dict[str, Description]]:
    """Return the name of a call and its arguments by name or place; "" for anything else."""
    if isinstance(found, dict) and len(found) == 1:
        ((name, arguments),) = found.items()
        if isinstance(arguments, dict):
            return name, arguments
    return "", {}


def _told(found: Any, *, full: bool = False) -> str:
    """Return a description as a text, with the modules of calls if ``full``."""
    if found is None:
        return "not set"
    name, arguments = _call(found)
    if not name:
        return str(found)
    parts = _arguments(arguments, full=full)
    return f"{name if full else name.rpartition('.')[2]}({', '.join(parts)})"


def _arguments(arguments: Mapping[str, Any], *, full: bool = False) -> Iterator[str]:
    for key, found in arguments.items():
        text = _told(found, full=full)
        yield text if key.isdecimal() else f"{key}={text}"


def _short(found: Any, text: str) -> str:
    """Return a call with no more than its first arguments if all are long."""
    name, arguments = _call(found)
    if not name or len(text) <= _LONG // 2:
        return _excerpt(text, "")
    shown = f"{name.rpartition('.')[2]}("
    for part in _arguments(arguments):
        if len(shown) + len(part) > _LONG // 2:
            break
        shown += f"{part}, "
    return f"{shown}...)"


def _excerpt(text: str, other: str) -> str:
    """Return a text, shortened to the part where it begins to differ from another."""
    if len(text) <= _LONG:
        return text
    pairs = itertools.zip_longest(text, other)
    same = next(i for i, (a, b) in enumerate(pairs) if a != b)
    start = max(0, same - _LONG // 4)
    more = "..." if start + _LONG < len(text) else ""
    return f"{'...' if start else ''}{text[start : start + _LONG]}{more}"


def _other_weight(was: Any, got: Any) -> str:
    """Describe the first weight that only one of two runs prunes."""
    try:
        blocks = [[set(names) for names in found] for found in (was, got)]
    except TypeError:  # the manifest is damaged
        return "the pruned weights differ"
    for i, (old, new) in enumerate(zip(*blocks, strict=False)):
        for name in sorted(old ^ new):
            states = ("pruned", "dense") if name in old else ("dense", "pruned")
            return f"{name} of block {i} was {states[0]}, and is {states[1]} now"
    return "the number of blocks differs"
