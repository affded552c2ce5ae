"""Check the arguments of the projection and bring them into lists.

Callers may pass one array, a list, a tuple or a mapping; everything below works on lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import check_real, check_real_floating
from .layout import Layout, default_layout, place_importance
from .patterns import Pattern, as_pattern

__all__ = [
    "Arguments",
    "check_importance",
    "read_arguments",
    "read_sparsity",
    "refuse",
    "refuse_filled",
]


class Arguments(NamedTuple):
    """Checked arguments of `project`, as lists.

    ``rebuild`` turns a list of arrays back into the structure that the caller passed.
    """

    arrays: list[Array]
    importance: list[Array | None]
    layouts: list[Layout | None]
    names: list[str]
    rebuild: Callable[[list[Array]], Any]


def read_arguments(arrays: Any, importance: Any, layout: Any) -> Arguments:
    """Check the arguments of `project` and give importance the axes of its array."""
    listed, names, rebuild = _listed(arrays)
    first = None
    for x, name in zip(listed, names, strict=True):
        if not is_array_api_obj(x):
            raise TypeError(f"{name} must be an array, got {type(x)!r}")
        xp = array_namespace(x)
        first = xp if first is None else first
        if xp is not first:
            raise TypeError(
                f"arrays must be of one library, got {type(listed[0])!r} and {type(x)!r}"
            )
        check_real_floating(xp, x, name)
    layouts = [
        default_layout(x.ndim) if given is None else given
        for x, given in zip(listed, _matched("layout", layout, arrays, names), strict=True)
    ]
    matched = _matched("importance", importance, arrays, names)
    for p, name in zip(matched, names, strict=True):
        if is_array_api_obj(p):
            check_real(array_namespace(p), p, f"importance of {name}")
    weights = [
        None if p is None else place_importance(p, x, given, name)
        for p, x, given, name in zip(matched, listed, layouts, names, strict=True)
    ]
    _refuse_nan(listed, names)
    check_importance(weights, names)
    return Arguments(listed, weights, layouts, names, rebuild)


def read_sparsity(sparsity: Any, arrays: Any) -> Pattern:
    """Return the pattern for ``sparsity``.

    A distribution by name uses the keys of ``arrays``. They are renamed to the names that
    messages use, such as ``arrays['head']``, so that both match.
    """
    pattern = as_pattern(sparsity)
    if pattern.named_arrays and not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays must be a mapping for a distribution by name, got {type(arrays)!r}"
        )
    return pattern.renamed(lambda name: f"arrays[{name!r}]")


def check_importance(importance: Sequence[Array | None], names: Sequence[str]) -> None:
    """Raise if P does not hold real numbers, or an entry is negative or not finite.

    Traced arrays are not checked, since their values cannot be read. All arrays share one
    read of the device.
    """
    given = [(p, name) for p, name in zip(importance, names, strict=True) if p is not None]
    for p, name in given:
        check_real(array_namespace(p), p, f"importance of {name}")
    refuse(
        [(p, ~((p >= 0) & array_namespace(p).isfinite(p))) for p, _ in given],
        [f"importance of {name} must be finite and non-negative" for _, name in given],
    )


def refuse_filled(argument: str, names: Sequence[str], counts: Sequence[int], advice: str) -> None:
    """Raise ValueError if arrays that must be sparse hold too many non-zeros.

    ``counts`` holds the number of surplus non-zeros of each array, and ``advice`` says why.
    """
    broken = [f"{name} ({n} too many)" for name, n in zip(names, counts, strict=True) if n]
    if broken:
        raise ValueError(
            f"{argument} must be sparse, got non-zeros in {', '.join(broken)}: {advice}"
        )


def _refuse_nan(arrays: Sequence[Array], names: Sequence[str]) -> None:
    if not arrays or not all(backend_of(x).is_concrete(x) for x in arrays):
        return
    # One read of the device says whether there is a NaN; only then look for the array.
    if backend_of(arrays[0]).has_nan(arrays):
        for x, name in zip(arrays, names, strict=True):
            if bool(array_namespace(x).any(array_namespace(x).isnan(x))):
                raise ValueError(f"{name} must not hold NaN, got nan")


def refuse(checks: Sequence[tuple[Array, Array]], rules: Sequence[str]) -> None:
    """Raise ValueError with the first rule that is broken and the first value that breaks it.

    Each check is an array and a mask of its bad entries. Nothing is raised while tracing.
    """
    if not checks or not all(backend_of(bad).is_concrete(bad) for _, bad in checks):
        return
    xp = array_namespace(checks[0][0])
    # Reading one flag for all arrays synchronises the device once, not once per array.
    flags = [xp.any(bad) for _, bad in checks]
    if bool(xp.any(xp.stack(flags))):
        broken = next(i for i, flag in enumerate(flags) if bool(flag))
        x, bad = checks[broken]
        raise ValueError(f"{rules[broken]}, got {_first(xp, x, bad)}")


def _first(xp: Any, x: Array, bad: Array) -> float:
    return float(xp.reshape(x, (-1,))[xp.reshape(bad, (-1,))][0])


def _listed(arrays: Any) -> tuple[list[Array], list[str], Callable[[list[Array]], Any]]:
    """Return the arrays as a list, their names, and a function that restores the structure."""
    if is_array_api_obj(arrays):
        return [arrays], ["arrays"], lambda listed: listed[0]
    if isinstance(arrays, Mapping):
        keys = list(arrays)
        names = [f"arrays[{key!r}]" for key in keys]
        return list(arrays.values()), names, lambda out: dict(zip(keys, out, strict=True))
    if isinstance(arrays, (list, tuple)):
        kind = tuple if isinstance(arrays, tuple) else list
        return list(arrays), [f"arrays[{i}]" for i in range(len(arrays))], kind
    raise TypeError(
        f"arrays must be an array, or a list, tuple or mapping of arrays, got {type(arrays)!r}"
    )


def _matched(argument: str, given: Any, arrays: Any, names: Sequence[str]) -> list[Any]:
    """Return ``given`` as a list with one entry per array.

    ``given`` has the structure of ``arrays``, or is one `Layout` for all of them. A mapping
    may leave arrays out.
    """
    if given is None:
        return [None] * len(names)
    if argument == "layout" and is_array_api_obj(arrays) and not isinstance(given, Layout):
        raise TypeError(f"layout must be a Layout, got {_checks.shown(given)}")
    if isinstance(arrays, Mapping) and isinstance(given, Mapping):
        unknown = [key for key in given if key not in arrays]
        if unknown:
            raise ValueError(f"{argument} must name keys of arrays, got {unknown[0]!r}")
        return [given.get(key) for key in arrays]
    if isinstance(given, Layout):
        return [given] * len(names)
    if is_array_api_obj(arrays):
        return [given]
    if type(given) in (list, tuple) and not isinstance(arrays, Mapping):
        if len(given) != len(names):
            raise ValueError(
                f"{argument} must have one entry per array ({len(names)}), got {len(given)}"
            )
        return list(given)
    raise TypeError(f"{argument} must have the structure of arrays, got {type(given)!r}")
