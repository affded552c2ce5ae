"""Name example inputs in the errors of a model that cannot take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .memory_errors import lacks_memory

__all__ = ["naming_inputs"]


@contextmanager
def naming_inputs(
    inputs: Sequence[Any], *, other: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise what a model raises as an error of its example inputs.

    Parameters
    ----------
    inputs : sequence
        The arguments of the model.
    other : tuple of types
        Errors that inputs do not cause.

    Raises
    ------
    ValueError
        With the shapes and dtypes of the inputs.

    Examples
    --------
    >>> import numpy as np
    >>> with naming_inputs([np.ones((2, 3))]):
    ...     raise TypeError("the width must be 4")
    Traceback (most recent call last):
    ValueError: example_inputs must be inputs of the model, got shape (2, 3) float64: the width \
must be 4; the first axis counts samples
    """
    try:
        yield
    except Exception as error:
        if lacks_memory(error) or isinstance(error, other):
            raise
        arrays = [x for x in inputs if hasattr(x, "shape") and hasattr(x, "dtype")]
        shown = [f"shape {tuple(x.shape)} {str(x.dtype).rpartition('.')[2]}" for x in arrays]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            "example_inputs must be inputs of the model, got "
            f"{', '.join(shown) or 'no array'}: {lines[0].rstrip('.:')}; the first axis counts "
            "samples"
        ) from error
