"""Give arrays patterns of their own, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from safe_core import _checks
from safe_core.layout import Layout

from .base import Pattern

__all__ = ["ByName"]


@dataclass(frozen=True)
class ByName(Pattern):
    """Pattern that gives each array a pattern of its own, by name.

    Arrays with equal patterns are projected together, so under a pattern of scope "global"
    they compete with one another, and with no other array.

    Attributes
    ----------
    patterns : mapping of str to pattern
        The pattern of each array by name, as reports show it: a pattern, a fraction of zeros
        or ``"N:M"``.
    default : pattern, optional
        The pattern of every other array. Without it, an array that is not named is an error.
    scope : {"global", "tensor", "row"}
        Where entries compete under a fraction.

    Raises
    ------
    TypeError, ValueError
        If a value is not a pattern, or an array is not named.

    Examples
    --------
    >>> pattern = ByName({"head": 0.5}, default="2:4")
    >>> pattern.of("head").sparsity, pattern.of("body")
    (0.5, NM(n=2, m=4, ragged='error'))
    """

    patterns: Mapping[str, Any] | tuple[tuple[str, Pattern], ...]
    default: Any = None
    scope: Literal["global", "tensor", "row"] = "global"

    def __post_init__(self) -> None:
        from .parsing import as_pattern  # a circular import: it reads mappings as `ByName`

        _checks.choice("scope", self.scope, ("global", "tensor", "row"))

        def read(name: str, value: Any) -> Pattern:
            try:
                pattern = as_pattern(value, self.scope)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            if isinstance(pattern, ByName):
                raise ValueError(f"{name} must not be a pattern by name itself, got {value!r}")
            return pattern

        pairs = dict(self.patterns)
        if not pairs:
            raise ValueError("patterns must name at least one array, got {}")
        if not all(isinstance(name, str) for name in pairs):
            raise TypeError(
                f"patterns must be a mapping of names to patterns, got {_checks.shown(pairs)}"
            )
        named = tuple((name, read(f"patterns of {name!r}", x)) for name, x in pairs.items())
        object.__setattr__(self, "patterns", named)
        if self.default is not None:
            object.__setattr__(self, "default", read("default", self.default))

    @property
    def _by_name(self) -> dict[str, Pattern]:
        return dict(self.patterns)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns that `of` can return, each once."""
        given = self._by_name.values()
        return tuple(dict.fromkeys(given if self.default is None else (*given, self.default)))

    def of(self, name: str) -> Pattern:
        """Return the pattern of the array ``name``."""
        found = self._by_name.get(name, self.default)
        if not isinstance(found, Pattern):
            raise ValueError(
                f"sparsity must name every sparse array or have a default, got none for {name}: "
                "ByName takes default=, and where= leaves arrays out"
            )
        return found

    @property
    def joint(self) -> bool:
        """Whether the units of several arrays compete in one pool."""
        return any(pattern.joint for pattern in self.parts)

    @property
    def counts_in_tensors(self) -> bool:
        """Whether it matters which axes of an array stack several tensors."""
        return any(pattern.counts_in_tensors for pattern in self.parts)

    @property
    def couples_arrays(self) -> bool:
        """Whether the mask of one array depends on the other arrays."""
        return any(pattern.couples_arrays for pattern in self.parts)

    @property
    def changes(self) -> bool:
        """Whether the sparsity of some array changes from step to step."""
        return any(pattern.changes for pattern in self.parts)

    def rising(self, steps: int, every: int) -> ByName:
        """Return the pattern in which the sparsity of every array rises."""
        named = {name: pattern.rising(steps, every) for name, pattern in self._by_name.items()}
        default = None if self.default is None else self.default.rising(steps, every)
        return ByName(named, default, self.scope)

    @property
    def named_arrays(self) -> tuple[str, ...]:
        """Names of the arrays with a pattern of their own."""
        return tuple(self._by_name)

    def fractions(self) -> tuple[Fraction, ...]:
        """Return the largest fraction of zeros of any array."""
        return (max(pattern.fractions()[-1] for pattern in self.parts),)

    def sparsity_of(self, name: str) -> float:
        """Return the final fraction of zeros required of the array ``name``."""
        return self.of(name).sparsity_of(name)

    def describe(self) -> str:
        """Return a short text for tables, such as ``"0.5 and 2:4 by name"``."""
        return f"{' and '.join(dict.fromkeys(p.describe() for p in self.parts))} by name"

    def renamed(self, rename: Callable[[str], str]) -> ByName:
        """Return the pattern with ``rename`` applied to its names."""
        named = {rename(name): pattern.renamed(rename) for name, pattern in self._by_name.items()}
        default = None if self.default is None else self.default.renamed(rename)
        return ByName(named, default, self.scope)

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError if the pattern of an array does not fit it."""
        self.of(name).check(shape, layout, name)

    def why_whole(self, shape: Sequence[int], layout: Layout | None, name: str) -> str:
        """Return why the pattern of an array leaves it dense as a whole, or an empty text."""
        return self.of(name).why_whole(shape, layout, name)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if the pattern, or a distribution in it, names an unknown array."""
        unknown = [name for name in self._by_name if name not in names]
        if unknown:
            raise ValueError(
                f"sparsity must name sparse arrays, {', '.join(names)}, got {', '.join(unknown)}"
                f"{_checks.weight_meant(unknown[0], names)}"
            )
        found = {name: self._by_name.get(name, self.default) for name in names}
        named = {name for name, own in found.items() if own and name in own.named_arrays}
        for pattern in self.parts:
            # Patterns may share one distribution. Each then also names arrays of the others,
            # which is right if the array's own pattern names it too.
            pattern.check_names([n for n, own in found.items() if own == pattern or n in named])
