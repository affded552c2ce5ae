"""A small graph of LiteRT operations on NumPy arrays, which front ends of frameworks build."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Compressed",
    "Graph",
    "Operation",
    "Quantization",
    "Tensor",
    "UnsupportedError",
    "as_stored",
    "stored_type",
]

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]


def stored_type(dtype: Any) -> np.dtype[Any]:
    """Return the type that stands for another one in a file: float32, int32 or bool."""
    found = np.dtype(dtype)
    if found == np.bool_:
        return found
    return np.dtype(np.int32 if found.kind in "iu" else np.float32)


def as_stored(data: Any) -> Array:
    """Return an array in the type that a file has for it."""
    array = np.asarray(data)
    return np.asarray(array.astype(stored_type(array.dtype), copy=False), order="C")


class UnsupportedError(ValueError):
    """A model has an operation that a LiteRT file cannot express; nothing was written."""


class Quantization(NamedTuple):
    """Scales and zero points: a number r is stored as ``round(r / scale) + zero_point``.

    Attributes
    ----------
    scale : array of float32
        One entry, or one for each index of ``axis``.
    zero_point : int
    axis : int
        The axis along which the scales differ.
    """

    scale: Array
    zero_point: int = 0
    axis: int = 0


class Compressed(NamedTuple):
    """An array that stores, along its last axis, only the blocks that are not zero.

    Attributes
    ----------
    values : array
        The blocks, one after another.
    segments : array of integers
        Where the blocks of each row begin; one entry more than rows. The leading axes together
        count the rows.
    indices : array of integers
        The column of each block, counted in blocks.
    outer : tuple of int
        Sizes of the leading axes.
    block : int
        Consecutive inputs in a block.
    """

    values: Array
    segments: Array
    indices: Array
    outer: tuple[int, ...]
    block: int

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes in a file."""
        return int(self.values.nbytes + self.segments.nbytes + self.indices.nbytes)


@dataclass(eq=False)
class Tensor:
    """An array of the graph: an input, a constant, or the result of an operation.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    data : array, optional
        The value of a constant.
    name : str
    quantization : Quantization, optional
    compressed : Compressed, optional
        How the file stores the value, where it is not dense.
    """

    shape: Shape
    dtype: np.dtype[Any]
    data: Array | None = None
    name: str = ""
    quantization: Quantization | None = None
    compressed: Compressed | None = None

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Operation:
    """One operation of LiteRT.

    Attributes
    ----------
    kind : str
        Its name in the schema, such as ``"FULLY_CONNECTED"``.
    inputs : list of Tensor
        None stands for an input that is left out, such as a bias.
    output : Tensor
    options : dict
        Fields of its options in the schema.
    source : str
        The module or operation of the model that it comes from, for messages and reports.
    """

    kind: str
    inputs: list[Tensor | None]
    output: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def weight(self) -> Tensor | None:
        """Return the constant weights of a linear layer or convolution."""
        if self.kind not in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"):
            return None
        weight = self.inputs[1]
        return weight if weight is not None and weight.data is not None else None


@dataclass(eq=False)
class Graph:
    """Operations in the order in which they run.

    Attributes
    ----------
    inputs, outputs : list of Tensor
    operations : list of Operation
    source : str
        What operations that are added now come from.
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    source: str = ""

    def input(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> Tensor:
        """Add an input."""
        found = Tensor(tuple(shape), np.dtype(dtype), name=name)
        self.inputs.append(found)
        return found

    def constant(self, data: Any, name: str = "") -> Tensor:
        """Return a constant of a type that files have."""
        array = as_stored(data)
        return Tensor(array.shape, array.dtype, array, name)

    def add(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        shape: Sequence[int],
        dtype: Any = np.float32,
        **options: Any,
    ) -> Tensor:
        """Add an operation and return its output."""
        output = Tensor(tuple(int(n) for n in shape), np.dtype(dtype))
        self.operations.append(Operation(kind, list(inputs), output, options, self.source))
        return output

    def users(self, tensor: Tensor) -> list[Operation]:
        """Return the operations that read a tensor."""
        return [op for op in self.operations if any(x is tensor for x in op.inputs)]

    def producers(self) -> dict[int, Operation]:
        """Return the operation that makes a tensor, by the ``id`` of the tensor."""
        return {id(op.output): op for op in self.operations}
