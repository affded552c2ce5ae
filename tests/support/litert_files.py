"""Read LiteRT files in tests, without the code that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter


def run(path: Path, *inputs: Any) -> list[np.ndarray[Any, Any]]:
    """Return the outputs of a file."""
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    for detail, x in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], x)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def operators(path: Path) -> list[tuple[str, int]]:
    """Return the name and the version of each operator of a file."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    codes = [(names[code.builtinCode], code.version) for code in model.operatorCodes]
    return [codes[op.opcodeIndex] for op in model.subgraphs[0].operators]


def types(path: Path) -> set[str]:
    """Return the types of the results of all operators of a file."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    part = model.subgraphs[0]
    names = {value: name for name, value in vars(schema.TensorType).items()}
    return {names[part.tensors[op.outputs[0]].type] for op in part.operators}


def scales_of_compressed(path: Path) -> list[int]:
    """Return the number of scales of each compressed tensor of a file that is not packed."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    part = model.subgraphs[0]
    held = [part.tensors[op.inputs[1]] for op in part.operators if len(op.inputs) == 3]
    return [len(x.quantization.scale) for x in held if x.sparsity is not None]
