"""The methods that a recipe can name, with parameters for each sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safe_core import SAM, AtEnd, Method, RandomOrder, Unstructured, _checks, importance, schedules
from safe_core.patterns import as_pattern

from .kinds import OF_PATTERN, OF_RUN, RECIPE_METHODS, Kind, Pruning
from .own import Own, load
from .tables import number, read_some, sparsity_key, text
from .training import Training

__all__ = ["Entry", "read_entries"]

Sparsity = float | str


_RISES = {
    "cubic": schedules.cubic,
    "exponential": schedules.exponential_sparsity,
    "linear": schedules.linear_sparsity,
}
_PENALTIES = {"constant": None, "linear": schedules.linear, "cosine": schedules.cosine}
# Keys of a method's table that are not parameters of the method.
_OF_ENTRY = ("method", "label", "sweep", "training", "against", "weights_of_width")
_IMPORTANCES = {"squared_gradient": importance.SquaredGradient()}


@dataclass(frozen=True)
class Entry:
    """A method of a study, with its label.

    Attributes
    ----------
    method : str or Own
        One of `RECIPE_METHODS`, or a user's function.
    label : str
        Its name in tables and figures.
    options : tuple of (str, value)
        Parameters. A `BySparsity` holds one value for each sparsity.
    swept : tuple of (str, value) or None
        The parameter and value of the ``sweep`` that this entry belongs to.
    training : tuple of (str, value)
        Training settings that differ from those of the study.
    against : str or None
        Label of the method that it is compared with.
    weights_of_width : float or None
        In the place of a sparsity: the width of the dense network that has as many weights.

    Examples
    --------
    >>> entry = read_entries([{"method": "safe", "penalty": {"0.9": 1e-3, "default": 1e-2}}])[0]
    >>> entry.values(0.9)["penalty"], entry.values(0.99)["penalty"]
    (0.001, 0.01)
    >>> entry.build(0.9, epochs=2, steps_per_epoch=5, seed=0).constraint.dual_update_interval
    32
    """

    method: str | Own
    label: str
    options: tuple[tuple[str, Any], ...] = ()
    swept: tuple[str, Any] | None = None
    training: tuple[tuple[str, Any], ...] = ()
    against: str | None = field(default=None, compare=False)
    weights_of_width: float | None = None
    # Names the entry in messages, so it does not count in comparisons.
    place: str = field(default="methods", compare=False)

    @property
    def is_dense(self) -> bool:
        """True for dense training, to which no sparsity applies."""
        return self.method == "dense"

    @property
    def family(self) -> str:
        """The label without the suffix of a sweep."""
        return self.label.removesuffix(_suffix(*self.swept)) if self.swept else self.label

    @property
    def kind(self) -> Kind:
        """The constructor of the method and its kind of sparsity."""
        return (
            Kind(load(self.method)) if isinstance(self.method, Own) else RECIPE_METHODS[self.method]
        )

    @property
    def runs(self) -> bool:
        """Whether the method can be built here; False for code that is only read."""
        return not isinstance(self.method, Own) or self.method.runs

    def examples(self, sparsities: tuple[Sparsity, ...]) -> tuple[Sparsity | None, ...]:
        """Return sparsities to build the method with, to check it."""
        if self.weights_of_width is not None:
            return (0.5,)
        return (None,) if self.is_dense else sparsities

    def pruning(self, sparsity: Sparsity | None, seed: int) -> Pruning | None:
        """Return how the initial weights are pruned, or None if they are not.

        ``seed`` draws random weights.
        """
        if not self.kind.prunes_start:
            return None
        values = self.values(sparsity)
        order = RandomOrder(seed) if values["score"] == "random" else None
        method = Method(_pattern(sparsity, values, self.kind), AtEnd(), importance=order)
        return Pruning(method, values["score"])

    def check_sparsities(self, sparsities: tuple[Sparsity, ...]) -> None:
        """Refuse parameters for sparsities that the study does not have."""
        for name, value in self.options:
            for key, _ in value.pairs if isinstance(value, BySparsity) else ():
                if key != "default" and sparsity_key(name, key) not in sparsities:
                    raise ValueError(
                        f"{self.place}.{name} ({self.label}) must have keys that are sparsities of "
                        f'the study, {", ".join(map(str, sparsities))}, or "default", got "{key}"'
                    )

    def trained(self, training: Training) -> Training:
        """Return the training settings of this method, given those of the study."""
        try:
            return training.changed(dict(self.training))
        except ValueError as error:
            raise ValueError(f"{self.place} ({self.label}): {error}") from None

    def values(self, sparsity: Sparsity | None) -> dict[str, Any]:
        """Return the parameters at a sparsity."""
        found = {}
        for name, value in self.options:
            if isinstance(value, BySparsity):
                value = value.at(f"{self.place}.{name}", sparsity)
            found[name] = value
        return found

    def build(
        self, sparsity: Sparsity | None, *, epochs: int, steps_per_epoch: int, seed: int
    ) -> Method | None:
        """Return the method of one run, or None for dense training without a radius.

        ``seed`` draws random sparsities.
        """
        kind, values = self.kind, self.values(sparsity)
        if kind.constructor is None or sparsity is None:
            return self._dense(**values)
        try:
            course = self._course(kind, sparsity, values, epochs, steps_per_epoch, seed)
            pattern = _pattern(course, values, kind)
            self._schedule(values, epochs * steps_per_epoch)
            if "importance" in values:
                _checks.choice("importance", values["importance"], tuple(_IMPORTANCES))
                values["importance"] = _IMPORTANCES[values["importance"]]
            of_run = (epochs * steps_per_epoch, epochs, steps_per_epoch, seed)
            given = {
                name: value
                for name, value in zip(OF_RUN, of_run, strict=True)
                if name in kind.parameters()
            }
            # What the recipe says is not derived from the steps.
            if kind.course == "rising" or (kind.derives and "penalty" in values):
                given.pop("steps", None)
            found = kind.constructor(pattern, **kind.fixed, **given, **values)
            if not isinstance(found, Method):
                raise TypeError(
                    f"method must return a safe_core.Method, got {_checks.shown(found)}"
                )
        except (TypeError, ValueError) as error:
            where = f"{self.place} ({self.label}) at sparsity {sparsity}"
            raise type(error)(f"{where}: {error}") from error
        return found

    def _dense(self, rho: float = 0.0) -> Method | None:
        """Return dense training by SAM, or None if the radius is 0."""
        try:
            perturbation = SAM(rho)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.place} ({self.label}): {error}") from error
        return (
            None
            if perturbation.is_zero
            else Method(Unstructured(0.0), AtEnd(), perturbation=perturbation)
        )

    def _course(
        self,
        kind: Kind,
        sparsity: Any,
        values: dict[str, Any],
        epochs: int,
        steps_per_epoch: int,
        seed: int,
    ) -> Any:
        """Return the sparsity over time; remove its parameters from ``values``."""
        if kind.course == "fixed":
            return sparsity
        if isinstance(sparsity, str):
            raise ValueError(f"sparsity must be a fraction for {self.method}, got {sparsity!r}")
        if kind.course == "drawn":
            among = values.pop("among", None)
            if not isinstance(among, tuple):
                raise TypeError(f"among must be a list of sparsities, got {among!r}")
            lower = [_checks.sparsity("among", s) for s in among if s < sparsity]
            return schedules.random_sparsity((*lower, sparsity), seed)
        rise = values.pop("rise", "cubic")
        _checks.choice("rise", rise, tuple(_RISES))
        length = _checks.integer("rise_epochs", values.pop("rise_epochs", epochs), low=1)
        every = _checks.integer("prune_every_epochs", values.pop("prune_every_epochs", 1), low=1)
        if length > epochs or length % every:
            raise ValueError(
                f"rise_epochs must be at most the {epochs} epochs and a multiple of "
                f"prune_every_epochs, {every}, got {length}"
            )
        return _RISES[rise](sparsity, steps=length * steps_per_epoch, every=every * steps_per_epoch)

    def _schedule(self, values: dict[str, Any], steps: int) -> None:
        """Replace ``penalty`` and ``penalty_schedule`` by a schedule over all steps."""
        name = values.pop("penalty_schedule", "constant")
        _checks.choice("penalty_schedule", name, tuple(_PENALTIES))
        rises = _PENALTIES[name]
        if rises is not None:
            if "penalty" not in values:
                raise ValueError(f"penalty must be given for penalty_schedule {name!r}, got none")
            values["penalty"] = rises(values["penalty"], steps=steps)


def _pattern(course: Any, values: dict[str, Any], kind: Kind) -> Any:
    """Return the pattern of a course; remove the parameters of patterns from ``values``."""
    names = ("scope", "distribution", "floor")
    pools = {name: values.pop(name) for name in names if name in values}
    ragged = values.pop("ragged", "error")
    if isinstance(course, str):
        return replace(as_pattern(course), ragged=ragged)  # type: ignore[call-arg]  # N:M has it
    _checks.choice("ragged", ragged, ("error", "dense"))
    return kind.pattern(course, **pools) if pools else course


@dataclass(frozen=True)
class BySparsity:
    """A parameter for each sparsity.

    Examples
    --------
    >>> BySparsity((("0.9", 1), ("2:4", 2))).at("penalty", "2:4")
    2
    """

    pairs: tuple[tuple[str, Any], ...]

    def at(self, name: str, sparsity: Sparsity | None) -> Any:
        """Return the value at a sparsity, else the one under ``default``."""
        values = dict(self.pairs)
        for key, value in self.pairs:
            if key != "default" and sparsity_key(name, key) == sparsity:
                return value
        if "default" in values:
            return values["default"]
        raise ValueError(
            f'{name} must have a value for sparsity "{sparsity}" or "default", got '
            f"{', '.join(map(repr, values))}"
        )


def read_entries(tables: Any) -> tuple[Entry, ...]:
    """Return the methods of a recipe, with one entry for each value of a sweep.

    Raises
    ------
    TypeError, ValueError
        If a method or a parameter is unknown, or two methods have the same label.

    Examples
    --------
    >>> read_entries([{"method": "dense", "penalty": 0.1}])
    Traceback (most recent call last):
        ...
    ValueError: methods[0].penalty is not a parameter of dense, which takes: rho
    >>> found = read_entries([{"method": "safe", "sweep": {"rho": [0.1, 0.2]}}])
    >>> [entry.label for entry in found]
    ['safe, rho = 0.1', 'safe, rho = 0.2']
    """
    if not isinstance(tables, list) or not tables:
        raise TypeError(f"methods must be tables, [[methods]], got {_checks.shown(tables)}")
    entries = [e for i, table in enumerate(tables) for e in _expanded(f"methods[{i}]", table)]
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"methods must have different labels, got {label!r} twice")
    return tuple(entries)


def _expanded(place: str, table: Any) -> Iterator[Entry]:
    if not isinstance(table, Mapping):
        raise TypeError(f"{place} must be a table, got {_checks.shown(table)}")
    method = table.get("method")
    if not isinstance(method, Own) and method not in RECIPE_METHODS:
        raise ValueError(
            f"{place}.method must be one of {', '.join(map(repr, RECIPE_METHODS))}, or a function, "
            f'"my_methods.py:function", got {_checks.shown(method)}'
        )
    name = method.function if isinstance(method, Own) else str(method)
    label = text(f"{place}.label", table.get("label", name))
    # Code that may not run was checked when it ran.
    unknown = isinstance(method, Own) and not method.runs
    accepted = tuple(table) if unknown else _options(place, name, method)
    given = {k: v for k, v in table.items() if k not in _OF_ENTRY}
    sweep = table.get("sweep", {})
    if not isinstance(sweep, Mapping) or len(sweep) > 1:
        raise TypeError(f"{place}.sweep must be a table of one list, got {_checks.shown(sweep)}")
    for key in (*given, *(() if unknown else sweep)):
        if key not in accepted:
            takes = f"which takes: {', '.join(accepted)}"
            raise ValueError(f"{place}.{key} is not a parameter of {name}, {takes}")
    options = tuple((key, _frozen(value)) for key, value in given.items())
    for key, value in options:
        for of, _ in value.pairs if isinstance(value, BySparsity) else ():
            if of != "default":
                sparsity_key(f"{place}.{key}", of)
    training = read_some(Training, f"{place}.training", table.get("training", {}))
    against, width = table.get("against"), table.get("weights_of_width")
    if width is not None and method == "dense":
        raise ValueError(f"{place}.weights_of_width must be left out for dense, got {width!r}")
    entry = Entry(
        method,
        label,
        options,
        training=tuple(training.items()),
        against=None if against is None else text(f"{place}.against", against),
        weights_of_width=None
        if width is None
        else number(0, excluded=0)(f"{place}.weights_of_width", width),
        place=place,
    )
    if not sweep:
        yield entry
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise TypeError(f"{place}.sweep.{key} must be a list, got {_checks.shown(values)}")
        for value in values:
            rest = tuple(pair for pair in options if pair[0] != key)
            yield replace(
                entry,
                label=label + _suffix(key, value),
                options=(*rest, (key, _frozen(value))),
                swept=(key, value),
            )


def _options(place: str, name: str, method: str | Own) -> tuple[str, ...]:
    """Return the parameters that a recipe can set; refuse functions that use reserved names."""
    try:
        kind = Entry(method, name).kind
    except ValueError as error:
        raise ValueError(f"{place}.method: {error}") from error
    taken = {*_OF_ENTRY, *OF_PATTERN} - set(kind.fixed)  # the recipe does not set what is fixed
    clash = [n for n in kind.parameters() if n in taken]
    if clash:
        raise ValueError(
            f"{place}.method must not have the parameter {clash[0]}, which is a key of every "
            f"method, got {name}"
        )
    return kind.options()


def _suffix(key: str, value: Any) -> str:
    """Return the suffix that a swept value adds to a label."""
    if isinstance(value, str):
        return f", {value}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f", {key} = {value:g}" if number else f", {key} = {value}"


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return BySparsity(tuple((key, _frozen(v)) for key, v in value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
