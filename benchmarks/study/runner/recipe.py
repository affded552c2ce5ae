"""Read the recipes of studies: TOML files as frozen dataclasses."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from safe_core import _checks

from .methods import Entry, Sparsity, read_entries
from .own import Find, Own, own_method
from .tables import (
    choice,
    flag,
    integer,
    key,
    number,
    read,
    several,
    sparsity,
    sparsity_key,
    table,
    text,
)
from .training import Training

__all__ = [
    "AXES", "RECIPE", "Attack", "Data", "Evaluation", "Model", "Quote", "Recipe", "Report",
    "keep_recipe", "kept_recipe", "parse_recipe", "read_recipe", "recipe_source",
]  # fmt: skip

RECIPE = "recipe.toml"
_STEPS = 60  # per epoch, when methods are built only to check them
AXES = ("method", "sparsity", "noise", "framework", "metric")


@dataclass(frozen=True)
class Data:
    """``[data]``: the images, and the fraction of training labels drawn at random.

    If ``validation`` is positive, that fraction of the training images, the last ones, replaces
    the test images.

    Examples
    --------
    >>> read(Data, "data", {"name": "digits", "label_noise": [0, 0.5]}).label_noise
    (0.0, 0.5)
    """

    name: str = key(choice("digits", "mnist", "cifar-10", "cifar-100"))
    folder: str | None = key(text, None)
    augment: bool = key(flag, False)
    label_noise: tuple[float, ...] = key(several(number(0, 1)), (0.0,))
    train_images: int | None = key(integer(1), None)
    validation: float = key(number(0, 1), 0.0)


@dataclass(frozen=True)
class Model:
    """``[model]``: a network of `safe_core.study.models`.

    Examples
    --------
    >>> read(Model, "model", {"name": "resnet-20", "width": 2})
    Model(name='resnet-20', width=2.0)
    """

    name: str = key(choice("lenet-300-100", "resnet-20", "resnet-32", "vgg-19"))
    width: float = key(number(0, excluded=0), 1.0)


@dataclass(frozen=True)
class Attack:
    """An attack by projected gradient ascent; see `safe_core.study.robustness.PGD`.

    Examples
    --------
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
    >>> found = read(Evaluation, "evaluation", {"flatness": ["eigenvalue"], "corruptions": [3]})
    >>> found.metrics()
    ('accuracy', 'dense_accuracy', 'distance', 'seconds', 'eigenvalue', 'corruption_3')
    """

    batch_norm_tuning: bool = key(flag, False)
    batch_norm_samples: int = key(integer(1), 10000)
    flatness: tuple[str, ...] = key(
        several(choice("eigenvalue", "trace", "sharpness"), empty=True), ()
    )
    flatness_images: int = key(integer(1), 1000)
    flatness_rho: float = key(number(0, excluded=0), 0.1)
    landscape_points: int = key(integer(0), 0)
    weight_bins: int = key(integer(0), 0)
    corruptions: tuple[int, ...] = key(several(integer(1), empty=True), ())
    corruption_folder: str | None = key(text, None)
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
            *(f"pgd_{attack.norm}" for attack in self.attacks),
        )


@dataclass(frozen=True)
class Report:
    """``[report]``: the layout of the tables.

    Examples
    --------
    >>> read(Report, "report", {"rows": ["sparsity", "method"], "columns": "noise"}).metrics
    ('accuracy',)
    """

    rows: tuple[str, ...] = key(several(choice(*AXES)), ("method",))
    columns: str = key(choice(*AXES), "sparsity")
    metrics: tuple[str, ...] = key(several(text), ("accuracy",))

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
        files = {m.file for e in self.methods if isinstance(m := e.method, Own) and m.file}
        if len({file.name for file in files}) < len(files):
            raise ValueError(
                "methods must come from files with different names, because copies share a folder, "
                f"got {', '.join(sorted(map(str, files)))}"
            )
        for entry in self.methods:
            epochs = entry.trained(self.training).epochs
            for s in self.sparsities:
                entry.build(s, epochs=epochs, steps_per_epoch=_STEPS, seed=0)

    @property
    def dense(self) -> frozenset[str]:
        """The labels of the methods that prune nothing."""
        return frozenset(entry.label for entry in self.methods if entry.is_dense)

    def entry(self, label: str) -> Entry:
        """Return the method with a label."""
        return next(entry for entry in self.methods if entry.label == label)

    def training_of(self, label: str) -> Training:
        """Return the training settings of the method with a label."""
        return self.entry(label).trained(self.training)

    def digest(self, label: str, target: Sparsity | None) -> str:
        """Return a digest of everything that the results of a method at a sparsity depend on.

        Other methods, the report and folders do not count.
        """
        entry = self.entry(label)
        method = entry.method.identity() if isinstance(entry.method, Own) else entry.method
        content: dict[str, Any] = {
            "data": asdict(self.data),
            "model": asdict(self.model),
            "training": asdict(self.training_of(label)),
            "evaluation": asdict(self.evaluation),
            "method": [method, {} if target is None else entry.values(target)],
        }
        for name in ("folder", "label_noise"):
            del content["data"][name]
        del content["evaluation"]["corruption_folder"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def parse_recipe(source: str, folder: Path | None = None) -> Recipe:
    """Return the recipe that a TOML text describes.

    Parameters
    ----------
    source : str
    folder : Path, optional
        Folder to look up files of methods in, before the current folder.

    Raises
    ------
    TypeError, ValueError
        If the text is not TOML, or a key is missing, unknown or of the wrong type. The message
        names the key and what it accepts.

    Examples
    --------
    >>> parse_recipe('title = "mine"')
    Traceback (most recent call last):
        ...
    ValueError: data is missing in recipe
    """

    def find(path: Path) -> Path:
        beside = (folder or Path()) / path
        return beside if beside.is_file() else path

    return _parsed(source, find)


def kept_recipe(out: Path) -> Recipe:
    """Return the recipe in the folder of a study, with the copies of method files kept there."""
    return _parsed((out / RECIPE).read_text(encoding="utf-8"), lambda path: out / path.name)


def keep_recipe(recipe: Recipe, source: str, out: Path) -> Recipe:
    """Copy a recipe and its method files to the folder of a study; return the recipe there."""
    for method in {entry.method for entry in recipe.methods}:
        if isinstance(method, Own) and method.file:
            (out / method.file.name).write_bytes(method.file.read_bytes())
    (out / RECIPE).write_text(source, encoding="utf-8")
    return kept_recipe(out)


def _parsed(source: str, find: Find) -> Recipe:
    try:
        content = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe must be TOML: {error}") from None
    for i, method in enumerate(_tables(content.get("methods"))):
        value = method.get("method")
        if isinstance(value, str) and ":" in value:
            method["method"] = own_method(f"methods[{i}].method", value, find)
    return read(Recipe, "recipe", content)


def _tables(value: Any) -> list[dict[str, Any]]:
    """Return the tables in a list. Other values are refused elsewhere."""
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def read_recipe(path: Path | Traversable) -> Recipe:
    """Return the recipe in a file; see `parse_recipe`.

    Examples
    --------
    >>> from importlib.resources import files
    >>> read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml").model
    Model(name='lenet-300-100', width=1.0)
    """
    folder = path.parent if isinstance(path, Path) else None
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), folder)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def recipe_source(path: Path) -> tuple[str, str]:
    """Return the name and the text of a recipe, given a file or the name of an installed recipe.

    Raises
    ------
    ValueError
        If there is no such file or recipe.

    Examples
    --------
    >>> name, source = recipe_source(Path("table-2-digits"))
    >>> name, parse_recipe(source).title
    ('table-2-digits', 'Noisy labels, digits')
    """
    if path.is_file():
        return path.stem, path.read_text(encoding="utf-8")
    folder = files("safe_core.study") / "recipes"
    shipped = {file.name.removesuffix(".toml"): file for file in folder.iterdir()}
    if path.name != str(path) or path.stem not in shipped:
        raise ValueError(
            f"recipe must be an existing file, or one of {', '.join(sorted(shipped))}, got "
            f"{str(path)!r}"
        )
    return path.stem, shipped[path.stem].read_text(encoding="utf-8")
