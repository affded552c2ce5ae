"""Say how the settings of two runs differ."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping

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
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def changed_settings(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the settings in which two runs differ, with their values.

    Where both values are calls of the same name, such as of a solver, only the arguments that
    differ are named.

    Parameters
    ----------
    then, now : mapping of str to str
        Settings as `safe_core.adapters.torch.blocks.task.Task.described` returns them.

    Examples
    --------
    >>> changed_settings(
    ...     {"seed": "0", "solver": "Safe(epochs=5, rho=None)"},
    ...     {"seed": "1", "solver": "Safe(epochs=6, rho=None)"},
    ... )
    'seed was 0, now 1; epochs was 5, now 6'
    """
    keys = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
    causes = [key for key in keys if not set(_CAUSES.get(key, ())).intersection(keys)]
    found = [text for key in causes for text in _changes(key, then.get(key), now.get(key))]
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more


def _changes(key: str, was: str | None, got: str | None) -> Iterator[str]:
    """Yield what differs in the value of a setting."""
    if was is None or got is None:
        then, now = (_excerpt(text or "not set", "") for text in (was, got))
        yield f"{key} was {then}, now {now}"
    elif key == "batches":
        yield "the calibration samples differ"
    elif key == "weights":
        yield _other_weight(was, got)
    else:
        yield from _differing(key, was, got)


def _differing(name: str, was: str, got: str, *, nested: bool = False) -> Iterator[str]:
    """Yield what differs in two values: arguments of the same call, or the values."""
    (old, before), (new, after) = _parsed(was), _parsed(got)
    # Values in brackets, such as those of a fraction, are told together.
    apart = list(before) == list(after) and sum(not key.isidentifier() for key in before) < 2
    if old and old == new and apart:
        for key, value in before.items():
            # The only argument of a schedule, such as its value, is that of the setting.
            own = key.isidentifier() and not (nested and len(before) == 1)
            if value != after[key]:
                yield from _differing(key if own else name, value, after[key], nested=True)
    elif old != new and len(was) + len(got) > _LONG:
        yield f"{name} was {_short(was, old)}, now {_short(got, new)}"
    else:
        yield f"{name} was {_excerpt(was, got)}, now {_excerpt(got, was)}"


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """Return the name of a call and its arguments by name or place; "" for anything else."""
    match = re.fullmatch(r"([\w.<>]+)\((.*)\)", text, re.DOTALL)
    if match is None:
        return "", {}
    arguments = {}
    for place, part in enumerate(_parts(match[2])):
        key, equals, value = part.partition("=")
        named = bool(equals) and key.isidentifier()
        arguments[key if named else str(place)] = value if named else part
    return match[1], arguments


def _parts(text: str) -> Iterator[str]:
    """Cut a text at the commas that are outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
        else:
            depth += _BRACKETS.get(character, 0)
    if text[start:].strip():
        yield text[start:].strip()


def _short(text: str, name: str) -> str:
    """Return a call without its arguments if they are long."""
    if not name or len(text) <= _LONG // 2:
        return _excerpt(text, "")
    return f"{name.rpartition('.')[2]}(...)"


def _excerpt(text: str, other: str) -> str:
    """Return a text, shortened to the part where it begins to differ from another."""
    if len(text) <= _LONG:
        return text
    pairs = itertools.zip_longest(text, other)
    same = next(i for i, (a, b) in enumerate(pairs) if a != b)
    start = max(0, same - _LONG // 4)
    more = "..." if start + _LONG < len(text) else ""
    return f"{'...' if start else ''}{text[start : start + _LONG]}{more}"


def _other_weight(was: str, got: str) -> str:
    """Describe the first weight that only one of two runs prunes."""
    try:
        blocks = [[set(names) for names in ast.literal_eval(text)] for text in (was, got)]
    except (ValueError, SyntaxError, TypeError):  # the manifest is damaged
        return "the pruned weights differ"
    for i, (old, new) in enumerate(zip(*blocks, strict=False)):
        for name in sorted(old ^ new):
            states = ("pruned", "dense") if name in old else ("dense", "pruned")
            return f"{name} of block {i} was {states[0]}, and is {states[1]} now"
    return "the number of blocks differs"
