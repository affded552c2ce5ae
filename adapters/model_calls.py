"""Read example inputs, and name them in the errors of a model that cannot take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .memory_errors import lacks_memory

__all__ = ["naming_inputs", "read_arguments"]


def read_arguments(
    example_inputs: Any, is_array: Callable[[Any], bool], kind: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments that example inputs stand for, or raise.

    ``is_array`` tells whether they are one array, which messages call ``kind``.

    Examples
    --------
    >>> import numpy as np
    >>> read_arguments({"train": False}, lambda x: isinstance(x, np.ndarray), "an array")
    ((), {'train': False})
    >>> read_arguments("x", lambda x: isinstance(x, np.ndarray), "an array")
    Traceback (most recent call last):
    TypeError: example_inputs must be an array, a tuple or a mapping of arguments, got <class 'str'>
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif is_array(example_inputs):
        args = (example_inputs,)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise TypeError(
            f"example_inputs must be {kind}, a tuple or a mapping of arguments, got "
            f"{type(example_inputs)!r}"
        )
    return args, kwargs


@contextmanager
def naming_inputs(
    inputs: Sequence[Any],
    *,
    other: tuple[type[Exception], ...] = (),
    hint: str = "the first axis counts samples",
) -> Iterator[None]:
    """Raise what a model raises as an error of its example inputs.

    Parameters
    ----------
    inputs : sequence
        The arguments of the model.
    other : tuple of types
        Errors that inputs do not cause.
    hint : str
        What the inputs must be, at the end of the message.

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
            f"{', '.join(shown) or 'no array'}: {lines[0].rstrip('.:')}; {hint}"
        ) from error
