"""Prepare a run for both frameworks: data, initial weights, learning rates and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safe_core import Method
from safe_core.study.data import Dataset, Normalisation, Split, batches, load, pixels
from safe_core.study.models import Architecture, Variables, architecture, initial_variables
from safe_core.study.noise import symmetric_label_noise

from .cells import Cell
from .kinds import Pruning
from .networks import OwnNetwork, own_dataset
from .own import Own
from .recipe import Data, Recipe
from .training import Training

__all__ = ["Learner", "Plan", "Subject", "layer_of", "plan"]

# Random streams of a seed. `safe_core.study.data.batches` draws the order of the images.
_WEIGHTS, _NOISE, _MASK = 1, 2, 3


@dataclass(frozen=True)
class Plan:
    """One run, ready to train.

    Attributes
    ----------
    data : Dataset
        With label noise in its training labels.
    architecture : Architecture or OwnNetwork
    training : Training
    method : Method or None
        None for dense training.
    seed : int
    augment : bool
    start : Variables or None
        Weights to start from, those of a trained network. None draws them at random.
    dense_layers : tuple of str
        Layers that no method prunes.
    pruning : Pruning or None
        How the weights are pruned before training.
    """

    data: Dataset
    architecture: Architecture | OwnNetwork
    training: Training
    method: Method | None
    seed: int
    augment: bool
    start: Variables | None = None
    dense_layers: tuple[str, ...] = ()
    pruning: Pruning | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete batches in the training images."""
        return len(self.data.train.labels) // self.training.batch_size

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the pixels."""
        return self.data.normalisation

    @property
    def dual_updates(self) -> int | None:
        """Number of dual updates in the run; None for methods that have none."""
        interval = getattr(getattr(self.method, "constraint", None), "dual_update_interval", None)
        return None if interval is None else self.steps_per_epoch * self.training.epochs // interval

    @property
    def weight_seed(self) -> int:
        """A seed of the initial weights, for networks of your own."""
        return int(np.random.SeedSequence([self.seed, _WEIGHTS]).generate_state(1)[0])

    def check_layers(self, paths: Iterable[str]) -> None:
        """Raise unless the layers that stay dense are among those of these weights."""
        known = dict.fromkeys(map(layer_of, paths))
        for name in self.dense_layers:
            if name not in known:
                raise ValueError(
                    f"model.dense_layers must name layers with weights, {', '.join(known)}, got "
                    f"{name!r}"
                )

    def initial_variables(self) -> Variables:
        """Draw the initial weights of a network of the library."""
        if isinstance(self.architecture, OwnNetwork):
            raise TypeError("a network of your own draws its weights in its framework")
        return initial_variables(self.architecture, [self.seed, _WEIGHTS])

    def rates(self) -> NDArray[np.float64]:
        """Return the learning rate of every step."""
        each = self.steps_per_epoch
        return np.asarray(
            [self.training.rate(step, each) for step in range(self.training.epochs * each)]
        )

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of an epoch: pixels in [0, 1], and labels."""
        found = batches(
            self.data.train,
            self.training.batch_size,
            seed=self.seed,
            epoch=epoch,
            augment=self.augment,
        )
        return ((pixels(images), labels) for images, labels in found)


class Learner(Protocol):
    """A network in training, in one framework."""

    def step(self, images: Any, labels: Any) -> Any:
        """Take one step on a batch; return its loss, which may still be computing."""

    def variables(self) -> Variables:
        """Return the current weights as NumPy arrays."""

    def kept_by_gradient(self, method: Method, images: Any, labels: Any) -> Variables:
        """Return the weights after a projection by ``|w g|``, with the gradient g on a batch."""

    def projected(self, method: Method | None) -> Variables:
        """Return the weights after the final projection, without changing the network.

        A network that was trained without a method is projected by the one that is given.
        """


class Subject(Protocol):
    """A trained network in evaluation mode, in one framework."""

    def logits(self, images: Any) -> NDArray[Any]:
        """Return the logits of pixels in [0, 1]."""

    def recalibrated(self, batches: Any) -> Variables:
        """Return the variables with batch statistics recomputed over these images."""

    def surface(self, batches: Any) -> Any:
        """Return the `safe_core.flatness.LossSurface` on these batches."""

    def attacked(self, attack: Any, images: Any, labels: Any, seed: int) -> Any:
        """Return adversarial images as NumPy arrays."""


def layer_of(path: str) -> str:
    """Return the layer of a weight, with slashes, from its path in either framework.

    Examples
    --------
    >>> layer_of("stage1_block1.conv1.weight"), layer_of("stage1_block1/conv1/kernel")
    ('stage1_block1/conv1', 'stage1_block1/conv1')
    """
    return path.replace(".", "/").rpartition("/")[0]


def plan(recipe: Recipe, cell: Cell, folder: Path | None = None) -> Plan:
    """Prepare a run.

    Parameters
    ----------
    recipe : Recipe
    cell : Cell
        One of its `cells`.
    folder : Path, optional
        Folder of the data files; by default that of the recipe.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import cells, read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> made = plan(recipe, cells(recipe)[0])
    >>> made.steps_per_epoch, made.method.plan().perturbs
    (19, False)
    """
    corrupted = recipe.evaluation.corruption_folder
    if corrupted is not None and not Path(corrupted).is_dir():
        raise ValueError(
            f"evaluation.corruption_folder must be an existing folder, got {corrupted!r}"
        )
    clean = _loaded(recipe.data, folder or recipe.data.folder)
    images = clean.train.images[: recipe.data.train_images]
    labels = clean.train.labels[: recipe.data.train_images]
    if recipe.data.validation:
        count = len(labels) - max(1, round(recipe.data.validation * len(labels)))
        clean = clean._replace(test=Split(images[count:], labels[count:]))
        images, labels = images[:count], labels[:count]
    training = recipe.training_of(cell.method)
    if len(labels) < training.batch_size:
        raise ValueError(
            f"training.batch_size must be at most the {len(labels)} training images, got "
            f"{training.batch_size}"
        )
    noisy = symmetric_label_noise(
        labels, cell.noise, classes=clean.classes, seed=[cell.seed, _NOISE]
    )
    entry, shape = recipe.entry(cell.method), images.shape[1:]
    sparsity = cell.sparsity
    if entry.weights_of_width is not None:
        widths = (entry.weights_of_width, recipe.width(cell.width))
        narrow, wide = (_network(recipe, cell.framework, clean.classes, shape, w) for w in widths)
        sparsity = _sparsity_of(narrow, wide, recipe.model.dense_layers)
    mask_seed = int(np.random.SeedSequence([cell.seed, _MASK]).generate_state(1)[0])
    return Plan(
        data=clean._replace(train=Split(images, noisy)),
        architecture=_network(
            recipe, cell.framework, clean.classes, shape, recipe.width(cell.width)
        ),
        training=training,
        method=entry.build(
            sparsity,
            epochs=training.epochs,
            steps_per_epoch=len(labels) // training.batch_size,
            seed=cell.seed,
        ),
        seed=cell.seed,
        augment=recipe.data.augment,
        dense_layers=recipe.model.dense_layers,
        pruning=entry.pruning(sparsity, mask_seed),
    )


def _network(
    recipe: Recipe, framework: str, classes: int, image: tuple[int, int, int], width: float
) -> Architecture | OwnNetwork:
    model = recipe.model
    if isinstance(model.name, Own):
        return OwnNetwork(model.name, model.options, framework, classes, image)
    return architecture(model.name, classes=classes, image=image, width=width)


def _sparsity_of(narrow: Any, wide: Any, dense_layers: tuple[str, ...]) -> float:
    """Return the sparsity at which a wide network has as many weights as a narrow one.

    >>> from safe_core.study.models import LeNet
    >>> 100 * _sparsity_of(LeNet((2,), image=(2, 2, 1)), LeNet((4,), image=(2, 2, 1)), ())
    50.89285714285714
    """
    kept, whole = (network.weights(dense_layers) for network in (narrow, wide))
    # The half lies between two counts, so that rounding cannot reach the next one.
    return (whole - kept + 0.5) / whole


@lru_cache(maxsize=1)
def _loaded(data: Data, folder: Path | str | None) -> Dataset:
    if isinstance(data.name, Own):
        return own_dataset(data.name, data.options, folder)
    return load(data.name, folder)
