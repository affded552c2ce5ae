"""The sparsity of each weight, from texts: a default, and patterns for names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from safe_core import _checks
from safe_core.adapters.loading import load_named, names_object
from safe_core.patterns import Pattern, Unstructured, as_pattern, outlier_weighed

from .output import numbers_left_out

__all__ = [
    "OutlierRule",
    "SparsityRules",
    "check_matches",
    "parse_rules",
    "parse_sparsity",
    "takes_scope",
]

_OUTLIERS = "owl:"
_SHOWN = 10  # names in a message


def parse_sparsity(text: str, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """Return the pattern for a text: a fraction of zeros, "N:M", or the name of a pattern.

    "my_parts.py:PATTERN" and "package.module:PATTERN" name a pattern of your own, whose code is
    run.

    Parameters
    ----------
    text : str
    scope : {"tensor", "row"}
        Where entries compete under a fraction: within each weight, or each of its outputs.

    Raises
    ------
    ValueError
        If the text is none of these.

    Examples
    --------
    >>> parse_sparsity("0.29", "row"), parse_sparsity("2:4")
    (Unstructured(sparsity=0.29, scope='row', distribution=None), NM(n=2, m=4, ragged='error'))
    >>> parse_sparsity("half")
    Traceback (most recent call last):
    ValueError: sparsity must be a fraction such as 0.5, N:M such as 2:4, or owl:0.5, got 'half'
    """
    if names_object(text):
        return as_pattern(load_named("sparsity", text), scope)
    try:
        if ":" in text:
            return as_pattern(text)
        # Decimal refuses "nan", "50%" and the like in the same way.
        return as_pattern(float(_checks.sparsity("sparsity", Decimal(text))), scope)
    except (ValueError, TypeError, OverflowError, InvalidOperation):
        raise ValueError(
            f"sparsity must be a fraction such as 0.5, N:M such as 2:4, or owl:0.5, got {text!r}"
            f"{_groups_meant(text) or _checks.percent_meant(text)}"
        ) from None


def _groups_meant(text: str) -> str:
    """Return a hint for a text that is nearly N:M, or an empty text.

    Examples
    --------
    >>> _groups_meant("4:2"), _groups_meant("2-4")
    (': N of every M weights are kept, so N must be below M', ': write 2:4 to keep 2 of every 4')
    >>> _groups_meant("3/4")
    ': write 3:4 to keep 3 of every 4, or 0.75 for that fraction of zeros'
    """
    found = re.fullmatch(r"(\d+) ?([-:/]) ?(\d+)", text.strip())
    if found is None:
        return ""
    n, m = int(found[1]), int(found[3])
    if n >= m:
        return ": N of every M weights are kept, so N must be below M"
    if not n or found[2] == ":":
        return ""
    fraction = f", or {n / m:.4g} for that fraction of zeros" if found[2] == "/" else ""
    return f": write {n}:{m} to keep {n} of every {m}{fraction}"


def takes_scope(text: str) -> bool:
    """Return whether a scope matters for the text of a sparsity.

    Examples
    --------
    >>> [takes_scope(text) for text in ("0.5", "2:4", "owl:0.7")]
    [True, False, True]
    """
    return ":" not in text or text.startswith(_OUTLIERS)


@dataclass(frozen=True)
class OutlierRule:
    """A sparsity for each block by its outliers, see `outlier_sparsities`.

    Attributes
    ----------
    sparsity : float
        The mean over the blocks.
    threshold, reach : float
        M and lambda of the paper.

    Examples
    --------
    >>> OutlierRule.parsed("owl:0.7"), OutlierRule.parsed("owl:0.7:7:0.1").describe()
    (OutlierRule(sparsity=0.7, threshold=5.0, reach=0.08), '0.7 by outliers (M 7, lambda 0.1)')
    """

    sparsity: float
    threshold: float = 5.0
    reach: float = 0.08

    @classmethod
    def parsed(cls, text: str) -> OutlierRule:
        """Return the rule of a text "owl:SPARSITY", "owl:SPARSITY:M" or "owl:SPARSITY:M:LAMBDA".

        Raises
        ------
        ValueError
            If the text is none of these, or a number is out of its range.
        """
        try:
            sparsity, *others = map(float, text.removeprefix(_OUTLIERS).split(":"))
            found = cls(_checks.sparsity("sparsity", sparsity), *others)
            _checks.real("threshold", found.threshold, low=0.0)
        except (ValueError, TypeError):
            given = text.removeprefix(_OUTLIERS)
            hint = _checks.percent_meant(given.partition(":")[0])
            if not hint and re.fullmatch(r"\d+:\d+", given):
                hint = ": an N:M pattern cannot differ by block"
            raise ValueError(
                "sparsity by outliers must be owl:SPARSITY, owl:SPARSITY:M or "
                "owl:SPARSITY:M:LAMBDA with a fraction as SPARSITY, such as owl:0.7:5:0.08, got "
                f"{text!r}{hint}"
            ) from None
        try:
            outlier_weighed([], [], found.sparsity, found.reach)
        except ValueError:
            raise ValueError(
                "sparsity by outliers must leave every block a sparsity in [0, 1): it varies by "
                f"LAMBDA = {found.reach:g}, got {text!r}"
            ) from None
        return found

    def describe(self) -> str:
        """Return a text for tables."""
        return f"{self.sparsity:g} by outliers (M {self.threshold:g}, lambda {self.reach:g})"


@dataclass(frozen=True)
class SparsityRules:
    """Give each weight the pattern of the first rule whose regular expression its name contains.

    Attributes
    ----------
    default : Pattern or None
        For names that no rule matches; None leaves their weights dense.
    rules : tuple of (str, Pattern)
    outliers : OutlierRule or None
        How the sparsity of ``default`` differs from block to block.

    Examples
    --------
    >>> rules = parse_rules(["0.5", r"down_proj=2:4"])
    >>> rules("layers.0.mlp.down_proj.weight"), rules("layers.0.mlp.up_proj.weight").sparsity
    (NM(n=2, m=4, ragged='error'), 0.5)
    """

    default: Pattern | None
    rules: tuple[tuple[str, Pattern], ...] = ()
    outliers: OutlierRule | None = None

    def __call__(self, name: str, weight: object = None) -> Pattern | None:
        """Return the pattern of a weight, or None for a weight that stays dense."""
        return self.default if (own := self.own(name)) is None else own

    def own(self, name: str) -> Pattern | None:
        """Return the pattern of the first rule that matches a name, or None."""
        return next((pattern for regex, pattern in self.rules if re.search(regex, name)), None)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """All patterns, the default first."""
        found = [pattern for _, pattern in self.rules]
        return tuple(found if self.default is None else [self.default, *found])

    def describe(self) -> str:
        """Return a text for tables."""
        parts = ["" if self.default is None else self.default.describe()]
        if self.outliers is not None:
            parts = [self.outliers.describe()]
        parts += [f"{pattern.describe()} for {regex}" for regex, pattern in self.rules]
        return "; ".join(part for part in parts if part)


def parse_rules(texts: Sequence[str], scope: Literal["tensor", "row"] = "tensor") -> SparsityRules:
    """Return the rules for texts: at most one sparsity, the default, and "REGEX=SPARSITY".

    The default may be by outliers, see `OutlierRule.parsed`.

    Raises
    ------
    ValueError
        If there are two defaults, a text is wrong, or every sparsity is 0.

    Examples
    --------
    >>> parse_rules(["q_proj=0.5"]).default is None
    True
    >>> parse_rules(["0.5", "0.7"])
    Traceback (most recent call last):
    ValueError: sparsity must give one default, got 0.5 and 0.7: others are REGEX=SPARSITY
    """
    plain = [text for text in texts if "=" not in text]
    if not texts:
        raise ValueError("sparsity must be given, got none")
    if len(plain) > 1:
        raise ValueError(
            f"sparsity must give one default, got {' and '.join(plain)}: others are REGEX=SPARSITY"
        )
    found = _read_rules(texts, plain, scope)
    if all(isinstance(p, Unstructured) and not p.fractions()[-1] for p in found.patterns):
        raise ValueError(f"sparsity must be above 0 for some weight, got {' and '.join(texts)}")
    return found


def _read_rules(
    texts: Sequence[str], plain: Sequence[str], scope: Literal["tensor", "row"]
) -> SparsityRules:
    rules = []
    for text in texts:
        regex, given, value = text.rpartition("=")
        if given:
            check_regex("sparsity", regex)
            if value.startswith(_OUTLIERS):
                raise ValueError(
                    f"sparsity by outliers must be the default for all weights, got {text!r}"
                )
            rules.append((regex, parse_sparsity(value, scope)))
    if not plain:
        return SparsityRules(None, tuple(rules))
    if plain[0].startswith(_OUTLIERS):
        outliers = OutlierRule.parsed(plain[0])
        return SparsityRules(as_pattern(outliers.sparsity, scope), tuple(rules), outliers)
    return SparsityRules(parse_sparsity(plain[0], scope), tuple(rules))


def check_regex(argument: str, regex: str) -> None:
    """Raise ValueError unless a text is a regular expression that says something.

    Examples
    --------
    >>> check_regex("only", "(")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: only must be a regular expression, got '(': missing ), ...
    """
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"{argument} must be a regular expression, got {regex!r}: {error}"
        ) from None
    if not regex:
        raise ValueError(f"{argument} must be a regular expression of a name, got an empty one")


def check_matches(
    argument: str, regexes: Iterable[str], names: Iterable[str], what: str = "a weight"
) -> None:
    """Raise ValueError for a regular expression that matches no name: it is misspelled.

    The message lists one name of each kind of weight, the most frequent kinds first.

    Examples
    --------
    >>> check_matches("ignore", ["gate"], ["layers.0.up.weight", "layers.0.down.weight"])
    Traceback (most recent call last):
    ValueError: ignore must match the name of a weight, got 'gate': names are such as \
layers.0.up.weight, layers.0.down.weight
    """
    known: list[Any] = list(names)
    for regex in regexes:
        if not any(re.search(regex, name) for name in known):
            kinds: dict[str, list[str]] = {}
            for name in known:
                kinds.setdefault(numbers_left_out(name), []).append(name)
            shown = sorted(kinds.values(), key=len, reverse=True)[:_SHOWN]
            raise ValueError(
                f"{argument} must match the name of {what}, got {regex!r}: names are such as "
                f"{', '.join(alike[0] for alike in shown)}"
            )
