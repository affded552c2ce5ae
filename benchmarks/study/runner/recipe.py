"""The recipes of studies as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from safe_core import _checks
from safe_core.study.data.datasets import DATASETS

from .methods import Entry, Sparsity, read_entries
from .own import Own
from .tables import (
    choice,
    either,
    flag,
    integer,
    key,
    number,
    one_or_several,
    options,
    several,
    sparsity,
    sparsity_key,
    table,
    text,
)
from .training import Training

__all__ = [
    "AXES", "MOMENTS", "Attack", "Data", "Evaluation", "Model", "Quote", "Recipe", "Report",
]  # fmt: skip

_STEPS = 60  # per epoch, when methods are built only to check them
MOMENTS = ("moment_2", "moment_3", "moment_4")
AXES = ("method", "sparsity", "noise", "framework", "width", "metric")


@dataclass(frozen=True)
class Data:
    """``[data]``: the images, and the fraction of training labels drawn at random.

    If ``validation`` is positive, that fraction of the training images, the last ones, replaces
    the test images. A function of your own, called with ``options``, returns a
    `safe_core.study.data.Dataset`.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> read(Data, "data", {"name": "digits", "label_noise": [0, 0.5]}).label_noise
    (0.0, 0.5)
    """

    name: str | Own = key(either(Own, choice(*DATASETS)))
    options: tuple[tuple[str, Any], ...] = key(options, ())
    folder: str | None = key(text, None)
    augment: bool = key(flag, False)
    label_noise: tuple[float, ...] = key(several(number(0, 1)), (0.0,))
    train_images: int | None = key(integer(1), None)
    validation: float = key(number(0, 1), 0.0)

    def __post_init__(self) -> None:
        _only_for_functions("data", self.name, self.options)


@dataclass(frozen=True)
class Model:
    """``[model]``: a network of `safe_core.study.models`, or a function of your own.

    ``width`` is one number, or a list. ``dense_layers`` names the layers that no method prunes,
    such as ``dense3``.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> read(Model, "model", {"name": "resnet-20", "width": 2}).width
    2.0
    """

    name: str | Own = key(either(Own, choice("lenet-300-100", "resnet-20", "resnet-32", "vgg-19")))
    options: tuple[tuple[str, Any], ...] = key(options, ())
    width: float | tuple[float, ...] = key(one_or_several(number(0, excluded=0)), 1.0)
    dense_layers: tuple[str, ...] = key(several(text, empty=True), ())

    def __post_init__(self) -> None:
        _only_for_functions("model", self.name, self.options)
        if isinstance(self.name, Own) and self.width != 1:
            raise ValueError("model.width must be an option of a network of your own")


def _only_for_functions(table_: str, name: str | Own, given: tuple[Any, ...]) -> None:
    if given and not isinstance(name, Own):
        raise ValueError(
            f'{table_}.options must be given for a function, "my_{table_}.py:function", only, '
            f"got them for {name!r}"
        )


@dataclass(frozen=True)
class Attack:
    """An attack by projected gradient ascent; see `safe_core.study.robustness.PGD`.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> read(Attack, "attack", {"norm": "linf", "radius": "1/255"}).steps
    10
    """

    norm: str = key(choice("linf", "l2"))
    radius: float = key(number(0))
    steps: int = key(integer(1), 10)


@dataclass(frozen=True)
class Evaluation:
    """``[evaluation]``: the measurements besides test accuracy.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> found = read(Evaluation, "evaluation", {"flatness": ["eigenvalue"], "corruptions": [3]})
    >>> found.metrics()[3:]
    ('seconds', 'eigenvalue', 'corruption_3', 'peak_memory')
    """

    batch_norm_tuning: bool = key(flag, False)
    batch_norm_samples: int = key(integer(1), 10000)
    flatness: tuple[str, ...] = key(
        several(choice("eigenvalue", "trace", "sharpness", *MOMENTS), empty=True), ()
    )
    flatness_images: int = key(integer(1), 1000)
    moment_batch: int | None = key(integer(1), None)
    flatness_rho: float = key(number(0, excluded=0), 0.1)
    landscape_points: int = key(integer(0), 0)
    weight_bins: int = key(integer(0), 0)
    corruptions: tuple[int, ...] = key(several(integer(1), empty=True), ())
    corruption_folder: str | None = key(text, None)
    corruption_ratio: bool = key(flag, False)
    attacks: tuple[Attack, ...] = key(several(table(Attack), empty=True), ())
    history_epochs: int = key(integer(0), 0)

    def __post_init__(self) -> None:
        for severity in self.corruptions:
            if severity > 5:
                raise ValueError(f"evaluation.corruptions must be from 1 to 5, got {severity}")
        if self.landscape_points == 1:
            raise ValueError("evaluation.landscape_points must be 0, or at least 2, got 1")
        norms = [attack.norm for attack in self.attacks]
        if len(set(norms)) < len(norms):
            raise ValueError(f"evaluation.attacks must have different norms, got {norms}")

    def metrics(self) -> tuple[str, ...]:
        """Return the names of the measured numbers."""
        return (
            "accuracy",
            *(("accuracy_untuned",) if self.batch_norm_tuning else ()),
            "dense_accuracy",
            "distance",
            "seconds",
            *self.flatness,
            *(f"corruption_{severity}" for severity in self.corruptions),
            *(f"corruption_ratio_{i}" for i in self.corruptions if self.corruption_ratio),
            *(f"pgd_{attack.norm}" for attack in self.attacks),
            "peak_memory",
        )


@dataclass(frozen=True)
class Report:
    """``[report]``: the layout of the tables.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> read(Report, "report", {"rows": ["sparsity", "method"], "columns": "noise"}).metrics
    ('accuracy',)
    """

    rows: tuple[str, ...] = key(several(choice(*AXES)), ("method",))
    columns: str = key(choice(*AXES), "sparsity")
    metrics: tuple[str, ...] = key(several(text), ("accuracy",))
    ranked: tuple[str, ...] | None = key(several(text, empty=True), None)

    def __post_init__(self) -> None:
        if "method" not in (*self.rows, self.columns) or self.columns in self.rows:
            raise ValueError(
                "report.rows and report.columns must be different and one of them the method, "
                f"got {list(self.rows)} and {self.columns!r}"
            )


def _quoted_values(name: str, value: Any) -> tuple[tuple[str, tuple[float, ...]], ...]:
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"{name} must be a table by sparsity, got {_checks.shown(value)}")
    found = []
    for k, v in value.items():
        pair = v if isinstance(v, list) else [v]
        if not 1 <= len(pair) <= 2:
            raise ValueError(f"{name}.{k} must be a mean, or [mean, standard error], got {v!r}")
        sparsity_key(name, k)
        found.append((k, tuple(_checks.real(f"{name}.{k}", x) for x in pair)))
    return tuple(found)


@dataclass(frozen=True)
class Quote:
    """``[[quoted]]``: figures from another source, shown beside those of the study.

    ``values`` holds, for each sparsity, a mean or a mean and its standard error.

    Examples
    --------
    >>> from safe_core.study.runner.tables import read
    >>> table = {"source": "Lee et al. 2025", "method": "GMP", "values": {"0.9": [92.94, 0.08]}}
    >>> read(Quote, "quoted[0]", table).values
    (('0.9', (92.94, 0.08)),)
    """

    source: str = key(text)
    method: str = key(text)
    values: tuple[tuple[str, tuple[float, ...]], ...] = key(_quoted_values)
    metric: str = key(text, "accuracy")
    noise: float = key(number(0, 1), 0.0)


@dataclass(frozen=True)
class Recipe:
    """A complete study.

    Attributes
    ----------
    title : str
    data, model, training : Data, Model, Training
    methods : tuple of Entry
    sparsities : tuple of float or str
        Fractions of zeros, or patterns such as ``"2:4"``.
    seeds : tuple of int
        Seeds of initial weights, order and augmentation of the images, and label noise.
    frameworks : tuple of {"torch", "jax"}
    evaluation, report : Evaluation, Report
    quoted : tuple of Quote
    """

    title: str = key(text)
    data: Data = key(table(Data))
    model: Model = key(table(Model))
    training: Training = key(table(Training))
    methods: tuple[Entry, ...] = key(lambda _, tables: read_entries(tables))
    sparsities: tuple[Sparsity, ...] = key(several(sparsity))
    seeds: tuple[int, ...] = key(several(integer(0)))
    frameworks: tuple[str, ...] = key(several(choice("torch", "jax")), ("jax",))
    evaluation: Evaluation = key(table(Evaluation), Evaluation())
    report: Report = key(table(Report), Report())
    quoted: tuple[Quote, ...] = key(several(table(Quote)), ())

    def __post_init__(self) -> None:
        measured = self.evaluation.metrics()
        for metric in self.report.metrics:
            if metric not in measured:
                raise ValueError(
                    f"report.metrics must be measured: {', '.join(measured)}; got {metric!r}"
                )
        if self.evaluation.corruption_folder is not None and self.data.name != "cifar-10":
            raise ValueError(
                "evaluation.corruption_folder holds CIFAR-10-C, so data must be cifar-10, "
                f"got {self.evaluation.corruption_folder!r} for {self.data.name}"
            )
        for i, quote in enumerate(self.quoted):
            if quote.metric not in measured:
                raise ValueError(
                    f"quoted[{i}].metric must be measured: {', '.join(measured)}; got "
                    f"{quote.metric!r}"
                )
        files = self.files
        if len({file.name for file in files}) < len(files):
            raise ValueError(
                "files of code must have different names, because copies share a folder, "
                f"got {', '.join(map(str, files))}"
            )
        if self.quoted and len(self.widths) > 1:
            raise ValueError("quoted must be left out with several widths, which it does not name")
        for entry in self.methods:
            entry.check_sparsities(self.sparsities)
            self._check_widths(entry)
            if entry.against is not None:
                self._check_against(entry)
            epochs = entry.trained(self.training).epochs
            for s in entry.examples(self.sparsities) if entry.runs else ():
                entry.build(s, epochs=epochs, steps_per_epoch=_STEPS, seed=0)

    def _check_against(self, entry: Entry) -> None:
        plain = {e.label: e for e in self.methods if not e.swept}
        base = plain.get(str(entry.against))
        if base is None:
            raise ValueError(
                f"{entry.place}.against must be the label of a method without a sweep: "
                f"{', '.join(plain)}; got {entry.against!r}"
            )
        for width in self.widths:
            there = self.targets(base, width)
            if not all(None in there or s in there for s in self.targets(entry, width)):
                raise ValueError(
                    f"{entry.place}.against must be a method that is trained at the same widths "
                    f"and sparsities, got {entry.against!r}"
                )

    def _check_widths(self, entry: Entry) -> None:
        if entry.weights_of_width is None:
            return
        if isinstance(self.model.name, Own):
            raise ValueError(
                f"{entry.place}.weights_of_width must be left out for a network of your own, got "
                f"{entry.weights_of_width:g}"
            )
        if not any(self.targets(entry, width) for width in self.widths):
            raise ValueError(
                f"{entry.place}.weights_of_width must be below a width of the study, "
                f"{_checks.shown(self.model.width)}, got {entry.weights_of_width:g}"
            )

    @property
    def widths(self) -> tuple[float | None, ...]:
        """The widths of the runs; (None,) if there is one only."""
        return self.model.width if isinstance(self.model.width, tuple) else (None,)

    def width(self, width: float | None) -> float:
        """Return the width of a run, given that of its cell."""
        found = self.model.width if width is None else width
        assert not isinstance(found, tuple)
        return found

    def targets(self, entry: Entry, width: float | None) -> tuple[Sparsity | None, ...]:
        """Return the sparsities of a method at a width; None if the study's do not apply."""
        if entry.weights_of_width is not None:
            return (None,) if self.width(width) > entry.weights_of_width else ()
        return (None,) if entry.is_dense else self.sparsities

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of code that the recipe names."""
        named = [self.data.name, self.model.name, *(entry.method for entry in self.methods)]
        files = {own.file for own in named if isinstance(own, Own) and own.file}
        return tuple(sorted(files))

    @property
    def dense(self) -> frozenset[str]:
        """The labels of the methods that prune nothing."""
        return frozenset(entry.label for entry in self.methods if entry.is_dense)

    @property
    def without_sparsities(self) -> frozenset[str]:
        """The labels of the methods to which the sparsities of the study do not apply."""
        follow = {e.label for e in self.methods if e.weights_of_width is not None}
        return self.dense | follow

    @property
    def has_sparsities(self) -> bool:
        """Whether the sparsities of the study apply to a method."""
        return any(entry.label not in self.without_sparsities for entry in self.methods)

    def entry(self, label: str) -> Entry:
        """Return the method with a label."""
        return next(entry for entry in self.methods if entry.label == label)

    def training_of(self, label: str) -> Training:
        """Return the training settings of the method with a label."""
        return self.entry(label).trained(self.training)

    def settings(
        self, label: str, target: Sparsity | None, width: float | None = None
    ) -> dict[str, Any]:
        """Return everything that the results of a method at a sparsity and width depend on.

        Other methods, the report and folders do not count.
        """
        entry = self.entry(label)
        found: dict[str, Any] = {"method": entry.method}
        for place, part in (
            ("data", self.data),
            ("model", self.model),
            ("training", self.training_of(label)),
            ("evaluation", self.evaluation),
        ):
            found |= {f"{place}.{f.name}": getattr(part, f.name) for f in fields(part)}
        found["model.width"] = self.width(width)
        found |= {f"method.{name}": value for name, value in entry.values(target).items()}
        if entry.weights_of_width is not None:
            found["method.weights_of_width"] = entry.weights_of_width
        for name in ("data.folder", "data.label_noise", "evaluation.corruption_folder"):
            del found[name]
        # Results that were written before these keys existed count as well.
        if not found["training.dense_epochs"]:
            del found["training.dense_epochs"], found["training.dense_learning_rate"]
        for name in ("model.dense_layers", "evaluation.corruption_ratio"):
            if not found[name]:
                del found[name]
        for name in ("training.eps", "evaluation.moment_batch"):
            if found[name] is None:
                del found[name]
        return {name: _as_json(value) for name, value in found.items()}


def _as_json(value: Any) -> Any:
    """Return a setting as JSON gives it back."""
    if isinstance(value, Own):
        return value.identity()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value
