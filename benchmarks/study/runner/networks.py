"""Networks and data of your own, from functions that a recipe names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from safe_core import _checks
from safe_core.study.data import Dataset
from safe_core.study.data.splits import checked

from .own import Own, load

__all__ = ["OwnNetwork", "own_dataset"]


@dataclass(frozen=True)
class OwnNetwork:
    """A network that a function makes: a `torch.nn.Module`, or a Flax Linen module.

    Attributes
    ----------
    own : Own
        Takes ``classes``, ``image`` and ``framework`` if it has such parameters.
    options : tuple of (str, value)
        Further arguments.
    framework : {"torch", "jax"}
    classes : int
    image : tuple of int
        Height, width and channels.
    """

    own: Own
    options: tuple[tuple[str, Any], ...]
    framework: str
    classes: int
    image: tuple[int, ...]

    def make(self, kind: type[Any]) -> Any:
        """Return a new network of a class.

        Raises
        ------
        TypeError
            If the function does not accept the options, or returns something else.
        """
        given = {"classes": self.classes, "image": self.image, "framework": self.framework}
        found = _called("model", self.own, self.options, given)
        if not isinstance(found, kind):
            raise TypeError(
                f"model.name must return a {kind.__module__}.{kind.__name__} for "
                f"{self.framework}, got {_checks.shown(found)}"
            )
        return found


def own_dataset(own: Own, options: tuple[tuple[str, Any], ...], folder: Any) -> Dataset:
    """Return the data set that a function returns, after checking it.

    The function takes ``folder`` if it has such a parameter.
    """
    found = _called("data", own, options, {"folder": folder})
    if not isinstance(found, Dataset):
        raise TypeError(
            f"data.name must return a safe_core.study.data.Dataset, got {_checks.shown(found)}"
        )
    splits = []
    for name, (images, labels) in (("train", found.train), ("test", found.test)):
        shape, dtype = getattr(images, "shape", ()), str(getattr(images, "dtype", "no array"))
        if len(shape) != 4 or dtype != "uint8":
            raise ValueError(
                f"data.name must return {name} images of shape (n, height, width, channels) and "
                f"dtype uint8, got {shape} and {dtype}"
            )
        splits.append(checked(images, labels, found.classes, f"{own.source}, {name}"))
    return found._replace(train=splits[0], test=splits[1])


def _called(
    table: str, own: Own, options: tuple[tuple[str, Any], ...], given: dict[str, Any]
) -> Any:
    function = load(own)
    signature = inspect.signature(function)
    arguments = {k: v for k, v in given.items() if k in signature.parameters} | dict(options)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(f"{table}.options must fit {own.function}{signature}: {error}") from None
    return function(**arguments)
