"""Refuse to keep the zeros of a network that has none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from ._calls import level_of_caller
from .coverage import DenseWeightWarning
from .method import Method
from .patterns import FixedZeros

__all__ = ["check_own_zeros", "has_zero", "warn_without_zeros"]


def has_zero(x: Array) -> bool:
    """Return whether an array has a zero, or True if its values cannot be read.

    Examples
    --------
    >>> import numpy
    >>> has_zero(numpy.zeros(2)), has_zero(numpy.ones(2))
    (True, False)
    """
    backend = backend_of(x)
    if not backend.is_concrete(x):
        return True
    # In a traced program of JAX, operations on concrete arrays are traced too.
    found = array_namespace(x).any(x == 0)
    return not backend.is_concrete(found) or bool(found)


def check_own_zeros(
    method: Method,
    names: Sequence[str],
    params: Sequence[Array],
    contains_zero: Callable[[Array], bool] = has_zero,
) -> None:
    """Raise or warn if no weight has a zero, of those that should keep their own zeros.

    A method that perturbs still does something for a dense network, so it warns.

    Parameters
    ----------
    method : Method
    names, params : sequence
        Names and values of the sparse parameters before the first step.
    contains_zero : callable
        Returns whether an array has a zero.

    Warns
    -----
    DenseWeightWarning
        If there is no zero and the method perturbs.

    Raises
    ------
    ValueError
        If there is no zero and the method does not perturb.

    Examples
    --------
    >>> import numpy
    >>> import safe_core
    >>> check_own_zeros(safe_core.keep_zeros(), ["w"], [numpy.ones(2)])
    Traceback (most recent call last):
    ValueError: keep_zeros() needs a weight with zeros before the first step, got none in w: \
load the pruned weights, not the dense ones
    """
    pairs = zip(names, params, strict=True)
    own = {key: x for key, x in pairs if isinstance(method.sparsity.of(key), FixedZeros)}
    if not own or any(map(contains_zero, own.values())):
        return
    if method.plan().perturbs:
        _warn("keep_zeros()", tuple(own))
        return
    raise ValueError(
        "keep_zeros() needs a weight with zeros before the first step, got none in "
        f"{_counted(tuple(own))}: load the pruned weights, not the dense ones"
    )


def warn_without_zeros(user: str, names: Sequence[str], params: Sequence[Array]) -> None:
    """Warn if no weight has a zero, of those whose zeros a function keeps.

    Parameters
    ----------
    user : str
        The function, for the message.
    names, params : sequence
        Names and values of the sparse parameters.

    Warns
    -----
    DenseWeightWarning

    Examples
    --------
    >>> import numpy
    >>> warn_without_zeros("fixed_support", ["w"], [numpy.zeros(2)])
    """
    if names and not any(map(has_zero, params)):
        _warn(user, names)


def _warn(user: str, names: Sequence[str]) -> None:
    text = f"{user} found no zeros in {_counted(names)}, so these weights stay dense"
    warnings.warn(text, DenseWeightWarning, stacklevel=level_of_caller())


def _counted(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
