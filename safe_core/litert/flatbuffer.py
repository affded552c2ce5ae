"""Write a graph as a LiteRT file, by the schema that `ai_edge_litert` brings."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from .graph import Compressed, Graph, Operation, Tensor

__all__ = ["SPARSE_VERSION", "File", "serialized"]

SPARSE_VERSION = 8
"""XNNPACK takes operators of later versions, and reads compressed weights as dense ones."""

_TYPES = {"float32": "FLOAT32", "int32": "INT32", "int8": "INT8", "bool": "BOOL", "int64": "INT64"}
_LARGEST = 2**31 - 2**16  # a flatbuffer has offsets of 31 bits

_OPTIONS = {
    "ADD": "Add",
    "ARG_MAX": "ArgMax",
    "AVERAGE_POOL_2D": "Pool2D",
    "BATCH_MATMUL": "BatchMatMul",
    "BROADCAST_TO": "BroadcastTo",
    "CAST": "Cast",
    "CONCATENATION": "Concatenation",
    "CONV_2D": "Conv2D",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2D",
    "DIV": "Div",
    "FULLY_CONNECTED": "FullyConnected",
    "GATHER": "Gather",
    "GELU": "Gelu",
    "LEAKY_RELU": "LeakyRelu",
    "MAXIMUM": "MaximumMinimum",
    "MAX_POOL_2D": "Pool2D",
    "MEAN": "Reducer",
    "MINIMUM": "MaximumMinimum",
    "MUL": "Mul",
    "REDUCE_MAX": "Reducer",
    "REDUCE_MIN": "Reducer",
    "SOFTMAX": "Softmax",
    "STRIDED_SLICE": "StridedSlice",
    "SUB": "Sub",
    "SUM": "Reducer",
}


class File(NamedTuple):
    """The bytes of a file, and the index of each tensor in it, by its ``id``."""

    content: bytes
    indices: dict[int, int]


def serialized(graph: Graph) -> File:
    """Return the bytes of a file.

    Raises
    ------
    ValueError
        If the file would be larger than a flatbuffer can be.
    """
    writer = _Writer(graph)
    return File(writer.run(), writer.indices)


class _Writer:
    def __init__(self, graph: Graph) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.graph = graph
        self.buffers: list[Any] = [schema.BufferT()]  # the first one is empty, by convention
        self.tensors: list[Any] = []
        self.indices: dict[int, int] = {}
        self.codes: dict[tuple[str, int], int] = {}
        self.names: set[str] = set()
        self.contents: dict[bytes, int] = {}

    def run(self) -> bytes:
        """Return the bytes of the file."""
        schema = self.schema
        inputs = [self.index(tensor) for tensor in self.graph.inputs]
        operators = [self.operator(op) for op in self.graph.operations]
        outputs = [self.index(tensor) for tensor in self.graph.outputs]
        part = schema.SubGraphT(
            tensors=self.tensors, inputs=inputs, outputs=outputs, operators=operators, name="main"
        )
        model = schema.ModelT(
            version=3,
            operatorCodes=[self.code(kind, version) for kind, version in self.codes],
            subgraphs=[part],
            description="safe_core",
            buffers=self.buffers,
            signatureDefs=[self.signature()],
        )
        return self.packed(model)

    def index(self, tensor: Tensor | None) -> int:
        """Return the index of a tensor in the file, where it is added at its first use."""
        if tensor is None:
            return -1
        if id(tensor) not in self.indices:
            self.indices[id(tensor)] = len(self.tensors)
            self.tensors.append(self.tensor(tensor))
        return self.indices[id(tensor)]

    def tensor(self, tensor: Tensor) -> Any:
        schema = self.schema
        found = schema.TensorT(
            shape=list(tensor.shape),
            type=getattr(schema.TensorType, _TYPES[tensor.dtype.name]),
            name=self.unique(tensor.name or f"t{len(self.tensors)}"),
            hasRank=True,
        )
        if tensor.data is not None:
            data = tensor.data
            if tensor.compressed is not None:
                found.sparsity = self.sparsity(tensor.compressed)
                data = tensor.compressed.values
            found.buffer = self.buffer(np.ascontiguousarray(data).tobytes())
        if tensor.quantization is not None:
            scale, zero, axis = tensor.quantization
            found.quantization = schema.QuantizationParametersT(
                scale=np.asarray(scale, np.float32),
                zeroPoint=np.full(len(scale), zero, np.int64),
                quantizedDimension=axis,
            )
        return found

    def buffer(self, content: bytes) -> int:
        """Return the index of a buffer; equal contents, such as tied weights, share one."""
        key = hashlib.sha256(content).digest()
        if key not in self.contents:
            self.contents[key] = len(self.buffers)
            self.buffers.append(self.schema.BufferT(data=np.frombuffer(content, np.uint8)))
        return self.contents[key]

    def sparsity(self, compressed: Compressed) -> Any:
        schema = self.schema

        def dense(size: int) -> Any:
            return schema.DimensionMetadataT(format=schema.DimensionType.DENSE, denseSize=size)

        columns = schema.DimensionMetadataT(format=schema.DimensionType.SPARSE_CSR)
        columns.arraySegmentsType, columns.arraySegments = self.indices_of(compressed.segments)
        columns.arrayIndicesType, columns.arrayIndices = self.indices_of(compressed.indices)
        dimensions = [*map(dense, compressed.outer), columns]
        blocks = compressed.block > 1
        if blocks:
            dimensions.append(dense(compressed.block))
        return schema.SparsityParametersT(
            traversalOrder=list(range(len(dimensions))),
            blockMap=[len(compressed.outer)] if blocks else None,
            dimMetadata=dimensions,
        )

    def indices_of(self, values: Any) -> tuple[int, Any]:
        """Return the kind of a vector of indices, and the vector."""
        name = {1: "Uint8Vector", 2: "Uint16Vector", 4: "Int32Vector"}[values.itemsize]
        vector = getattr(self.schema, f"{name}T")(values=values)
        return getattr(self.schema.SparseIndexVector, name), vector

    def operator(self, op: Operation) -> Any:
        schema = self.schema
        found = schema.OperatorT(
            opcodeIndex=self.codes.setdefault((op.kind, self.version(op)), len(self.codes)),
            inputs=[self.index(tensor) for tensor in op.inputs],
            outputs=[self.index(op.output)],
        )
        if op.kind in _OPTIONS:
            name = f"{_OPTIONS[op.kind]}Options"
            found.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            found.builtinOptions = getattr(schema, f"{name}T")(**op.options)
        return found

    def version(self, op: Operation) -> int:
        """Return the lowest version of an operator that does what the graph asks."""
        weight = op.weight
        if weight is not None and weight.compressed is not None:
            return SPARSE_VERSION
        if op.output.dtype != np.int8 and not any(
            x is not None and x.dtype == np.int8 for x in op.inputs
        ):
            if op.kind == "FULLY_CONNECTED":
                return 1 if len(op.output.shape) == 2 else 5
            return 2 if op.kind == "BROADCAST_TO" else 1  # its first version is 2
        return _INT8_VERSIONS.get(op.kind, 2)

    def code(self, kind: str, version: int) -> Any:
        value = getattr(self.schema.BuiltinOperator, kind)
        return self.schema.OperatorCodeT(
            builtinCode=value, deprecatedBuiltinCode=min(value, 127), version=version
        )

    def signature(self) -> Any:
        """Return the names of inputs and outputs, which later runtimes ask for."""
        schema = self.schema

        def named(tensors: list[Tensor], kind: str) -> list[Any]:
            return [
                schema.TensorMapT(name=f"{kind}_{i}", tensorIndex=self.index(tensor))
                for i, tensor in enumerate(tensors)
            ]

        return schema.SignatureDefT(
            inputs=named(self.graph.inputs, "args"),
            outputs=named(self.graph.outputs, "output"),
            signatureKey="serving_default",
        )

    def unique(self, name: str) -> str:
        found, count = name, 1
        while found in self.names:
            found, count = f"{name}_{count}", count + 1
        self.names.add(found)
        return found

    def packed(self, model: Any) -> bytes:
        import flatbuffers

        size = sum(len(buffer.data) for buffer in self.buffers if buffer.data is not None)
        if size > _LARGEST:
            raise ValueError(f"the weights must take less than 2 GiB in the file, got {size} bytes")

        class Builder(flatbuffers.Builder):  # type: ignore[misc]
            """A builder that aligns vectors at 16 bytes, as the schema asks of buffers."""

            def StartVector(self, size: int, count: int, alignment: int) -> Any:  # noqa: N802
                return super().StartVector(size, count, max(alignment, 16))

        builder = Builder(size + size // 8 + 4096)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


# Per-channel scales of int8 weights need 3 and 12; 4 is the first int8 version of linear layers.
_INT8_VERSIONS = {
    "CONV_2D": 3,
    "DENSIFY": 1,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 12,
    "LEAKY_RELU": 2,
    "QUANTIZE": 1,
    "RESHAPE": 1,
}
