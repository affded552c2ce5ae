"""Read TOML tables as frozen dataclasses; errors name the key and what it accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from fractions import Fraction
from typing import Any, TypeVar

from safe_core import _checks
from safe_core.patterns import as_pattern

__all__ = [
    "choice",
    "either",
    "flag",
    "integer",
    "key",
    "number",
    "one_or_several",
    "options",
    "read",
    "read_some",
    "several",
    "sparsity",
    "sparsity_key",
    "text",
]  # fmt: skip

T = TypeVar("T")
Reader = Callable[[str, Any], Any]


def key(reader: Reader, default: Any = MISSING) -> Any:
    """Declare a dataclass field that is read from a key; without a default the key is required.

    Examples
    --------
    >>> key(text, "cpu").default
    'cpu'
    """
    return field(default=default, metadata={"reader": reader})


def read(cls: type[T], name: str, content: Any) -> T:
    """Return the dataclass that a table describes.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are declared with `key`.
    name : str
        Name of the table, for messages.
    content : mapping

    Raises
    ------
    TypeError, ValueError
        If a key is unknown, missing, or of the wrong type.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Model:
    ...     name: str = key(text)
    ...     width: float = key(number(low=0), 1.0)
    >>> read(Model, "model", {"name": "vgg-19"})
    Model(name='vgg-19', width=1.0)
    >>> read(Model, "model", {"name": "vgg-19", "depth": 19})
    Traceback (most recent call last):
        ...
    ValueError: model.depth is not a key of model, which takes: name, width
    """
    found = read_some(cls, name, content)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.name not in found:
            raise ValueError(f"{_prefix(name)}{f.name} is missing in {name}")
    return cls(**found)


def read_some(cls: type[Any], name: str, content: Any) -> dict[str, Any]:
    """Return the values of a table that can lack keys of the dataclass; see `read`.

    Examples
    --------
    >>> from safe_core.study.runner.training import Training
    >>> read_some(Training, "training", {"epochs": 60})
    {'epochs': 60}
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{name} must be a table, got {_checks.shown(content)}")
    known = {f.name: f for f in fields(cls) if "reader" in f.metadata}
    prefix = _prefix(name)
    for found in content:
        if found not in known:
            raise ValueError(
                f"{prefix}{found} is not a key of {name}, which takes: {', '.join(known)}"
            )
    return {k: known[k].metadata["reader"](f"{prefix}{k}", v) for k, v in content.items()}


def _prefix(name: str) -> str:
    return f"{name}." if name != "recipe" else ""


def table(cls: type[Any]) -> Reader:
    """Return a reader of tables; see `read`."""
    return lambda name, value: read(cls, name, value)


def text(name: str, value: Any) -> str:
    """Read a string that is not empty.

    Examples
    --------
    >>> text("title", "Table 4")
    'Table 4'
    """
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{name} must be a non-empty string, got {_checks.shown(value)}")
    if not value.isprintable():
        raise ValueError(f"{name} must be one line of printable characters, got {value!r}")
    return value


def options(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Read the arguments of a function as pairs.

    Examples
    --------
    >>> options("model.options", {"depth": 3, "units": [8, 8]})
    (('depth', 3), ('units', (8, 8)))
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a table, got {_checks.shown(value)}")

    def frozen(found: Any) -> Any:
        if isinstance(found, Mapping):
            raise TypeError(f"{name} must hold no tables, got {_checks.shown(found)}")
        return tuple(map(frozen, found)) if isinstance(found, list) else found

    return tuple((key, frozen(found)) for key, found in value.items())


def either(cls: type[Any], reader: Reader) -> Reader:
    """Return a reader that lets values of a class pass.

    Examples
    --------
    >>> either(int, text)("name", 3)
    3
    """
    return lambda name, value: value if isinstance(value, cls) else reader(name, value)


def flag(name: str, value: Any) -> bool:
    """Read true or false.

    Examples
    --------
    >>> flag("data.augment", True)
    True
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {_checks.shown(value)}")
    return value


def integer(low: int) -> Reader:
    """Return a reader of integers of at least ``low``.

    Examples
    --------
    >>> integer(1)("training.epochs", 200)
    200
    """
    return lambda name, value: _checks.integer(name, value, low=low)


def number(low: float, high: float | None = None, *, excluded: float | None = None) -> Reader:
    """Return a reader of finite numbers, or fractions as strings such as ``"1/255"``.

    The bounds are inclusive. ``excluded`` is one value that is not allowed.

    Examples
    --------
    >>> number(0)("radius", "3/6"), number(0)("radius", 2)
    (0.5, 2.0)
    """

    def reader(name: str, value: Any) -> float:
        if isinstance(value, str):
            try:
                value = float(Fraction(value))
            except (ValueError, ZeroDivisionError):
                raise ValueError(f'{name} must be a number or "a/b", got {value!r}') from None
        found = _checks.real(name, value, low=low)
        if high is not None and found > high:
            raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
        if found == excluded:
            raise ValueError(f"{name} must not be {excluded:g}, got {value!r}")
        return found

    return reader


def choice(*options: str) -> Reader:
    """Return a reader of strings from a list of options.

    Examples
    --------
    >>> choice("sgd", "adam")("training.optimizer", "lion")
    Traceback (most recent call last):
        ...
    ValueError: training.optimizer must be one of 'sgd', 'adam', got 'lion'
    """

    def reader(name: str, value: Any) -> Any:
        _checks.choice(name, value, options)
        return value

    return reader


def sparsity(name: str, value: Any) -> float | str:
    """Read a fraction of zeros in [0, 1), or a pattern such as ``"2:4"``.

    Examples
    --------
    >>> sparsity("sparsities", 0.95), sparsity("sparsities", "2:4")
    (0.95, '2:4')
    """
    if isinstance(value, str):
        try:
            as_pattern(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return value
    return float(_checks.sparsity(name, value))


def sparsity_key(name: str, value: str) -> float | str:
    """Read a sparsity that is a key of a table: a fraction in quotes, or a pattern.

    Examples
    --------
    >>> sparsity_key("penalty", "0.90"), sparsity_key("penalty", "2:4")
    (0.9, '2:4')
    """
    try:
        return sparsity(name, value if ":" in value else float(value))
    except ValueError:
        raise ValueError(
            f'{name} must have sparsities as keys, such as "0.9" or "2:4", got {value!r}'
        ) from None


def one_or_several(reader: Reader) -> Reader:
    """Return a reader of a value, or of a list of them; a list of one counts as its value.

    Examples
    --------
    >>> one_or_several(number(0))("width", [1, 2]), one_or_several(number(0))("width", 2)
    ((1.0, 2.0), 2.0)
    """

    def read_either(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return reader(name, value)
        found = several(reader)(name, value)
        return found if len(found) > 1 else found[0]

    return read_either


def several(reader: Reader, *, empty: bool = False) -> Reader:
    """Return a reader of lists without repeated values; they become tuples.

    Examples
    --------
    >>> several(integer(0))("seeds", [0, 1, 2])
    (0, 1, 2)
    """

    def read_list(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or (not value and not empty):
            kind = "a list" if empty else "a non-empty list"
            raise TypeError(f"{name} must be {kind}, got {_checks.shown(value)}")
        found = tuple(reader(f"{name}[{i}]", v) for i, v in enumerate(value))
        if len(set(found)) < len(found):
            raise ValueError(f"{name} must not repeat a value, got {_checks.shown(value)}")
        return found

    return read_list
