"""Say how the settings of two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safe_core._readable import excerpt

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
_LONG = 120  # characters of two values
_MOST = 4  # settings that are named
_ROWS = {"tuple": "({})", "list": "[{}]", "dict": "{{{}}}"}


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
        # A manifest may be damaged, or of an earlier version.
        yield _other_weight(was, got) if _are_names(was, got) else "the pruned weights differ"
    else:
        yield from _differing(key, was, got)


def _differing(name: str, was: Any, got: Any, *, nested: bool = False) -> Iterator[str]:
    """Yield what differs in two descriptions: arguments of the same call, or the values."""
    if (rows := _pairs(was)) and list(rows) == list(others := _pairs(got)):
        for key, value in rows.items():
            if value != others[key]:
                yield from _both(key, value, others[key])
        return
    (old, before), (new, after) = _call(was), _call(got)
    # Values in a row, such as those of a shape, are told together.
    apart = list(before) == list(after) and sum(key.isdecimal() for key in before) < 2
    if old and old == new and apart:
        for key, value in before.items():
            # The only argument of a schedule, such as its value, is that of the setting.
            own = key.isidentifier() and not (nested and len(before) == 1)
            if value != after[key]:
                yield from _differing(key if own else name, value, after[key], nested=True)
        return
    yield from _both(name, was, got)


def _both(name: str, was: Any, got: Any) -> Iterator[str]:
    """Yield a text with two values."""
    (old, _), (new, _) = _call(was), _call(got)
    full = old != new and old.rpartition(".")[2] == new.rpartition(".")[2]
    then, now = _told(was, full=full), _told(got, full=full)
    if (old != new or _pairs(was)) and len(then) + len(now) > _LONG:
        yield f"{name} was {_short(was, full=full)}, now {_short(got, full=full)}"
    else:
        yield f"{name} was {excerpt(then, now)}, now {excerpt(now, then)}"


def _pairs(found: Any) -> dict[str, Any]:
    """Return the values of a row of pairs by their names; empty for anything else."""
    name, items = _call(found)
    pairs = [_call(item) for item in items.values()]
    if name not in _ROWS or any(kind != "tuple" or len(pair) != 2 for kind, pair in pairs):
        return {}
    rows = {str(pair.get("0")).strip("'"): pair.get("1") for _, pair in pairs}
    return rows if len(rows) == len(pairs) else {}


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
    parts = ", ".join(_arguments(arguments, full=full))
    if name in _ROWS:
        return _ROWS[name].format(parts)
    return f"{name if full else name.rpartition('.')[2]}({parts})"


def _arguments(arguments: Mapping[str, Any], *, full: bool = False) -> Iterator[str]:
    """Yield the arguments of a call as texts."""
    for key, found in arguments.items():
        text = _told(found, full=full)
        yield text if key.isdecimal() else f"{key}={text}"


def _short(found: Any, *, full: bool) -> str:
    """Return a description as a text, a call with its first arguments only if it is long."""
    text, (name, arguments) = _told(found, full=full), _call(found)
    if not name or name in _ROWS or len(text) <= _LONG // 2:
        return excerpt(text, "")
    shown = f"{name if full else name.rpartition('.')[2]}("
    for part in _arguments(arguments, full=full):
        if len(shown) + len(part) > _LONG // 2:
            break
        shown += f"{part}, "
    return f"{shown}...)"


def _are_names(*settings: Any) -> bool:
    """Return whether each setting is a list of lists of names."""
    blocks = [found if isinstance(found, list) else [None] for found in settings]
    return all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for found in blocks
        for names in found
    )


def _other_weight(was: Sequence[Sequence[str]], got: Sequence[Sequence[str]]) -> str:
    """Describe the first weight that only one of two runs prunes."""
    for i, (old, new) in enumerate(zip(was, got, strict=False)):
        for name in sorted(set(old) ^ set(new)):
            states = ("pruned", "dense") if name in old else ("dense", "pruned")
            return f"{name} of block {i} was {states[0]}, and is {states[1]} now"
    return "the number of blocks differs"
