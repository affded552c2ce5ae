"""Save a model as a LiteRT file."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from safe_core import _checks
from safe_core.adapters.model_calls import naming_inputs
from safe_core.litert import LiteRTReport, UnsupportedError
from safe_core.litert.build import Builder
from safe_core.litert.export import check_settings, save_graph
from safe_core.litert.graph import Tensor as GraphTensor
from safe_core.litert.graph import as_stored

from .example_inputs import arguments, evaluation_mode, tensors
from .litert_activations import ACTIVATIONS
from .litert_operations import OPERATIONS, as_tensor

__all__ = ["litert_graph", "save_litert"]

_RULES = OPERATIONS | ACTIVATIONS


@torch.no_grad()
def save_litert(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    weights: str = "float32",
    *,
    batch_size: int | None = 1,
    compute: str = "fastest",
    tolerance: float | None = None,
) -> LiteRTReport:
    """Save a model as a LiteRT file (``.tflite``) whose runtime can skip zeros in blocks.

    LiteRT has kernels for linear layers whose zeros are in blocks of 1x4 inputs (float32) or 1x16
    (int8). Train such zeros with ``Block((1, 4), 0.9)`` or ``Block((1, 16), 0.9)``. Other zeros
    make the file smaller, and the report says so. Batch norm is folded into the layer before it.

    A process of its own then runs the file on all samples, compares the outputs with those of the
    model, and times it. The file appears at ``path`` only if they agree.

    Parameters
    ----------
    model : torch.nn.Module
        A model that `torch.export.export` can trace. It is traced in evaluation mode.
    example_inputs : tensor, tuple or mapping
        Samples: one argument, all positional ones, or all by name. For int8 they should be real
        data, because they set the ranges of all tensors.
    path : str or Path
    weights : str
        ``"float32"``, or ``"int8"`` for weights and activations of layers in 8 bits.
    batch_size : int, optional
        Samples that the file takes at once. It must divide the first axis of all inputs. None
        keeps the shapes of ``example_inputs``.
    compute : str
        ``"sparse"`` skips zeros in blocks, ``"dense"`` never does; ``"fastest"`` is the faster
        one of both on this machine.
    tolerance : float, optional
        The largest relative error allowed; by default 0.001 for float32 and 0.25 for int8.

    Returns
    -------
    LiteRTReport
        Formats of layers, sizes, error and times; print it for a table.

    Raises
    ------
    ModuleNotFoundError
        If ai-edge-litert is missing, which the extra ``litert`` installs.
    TypeError
        If an argument is of another kind.
    UnsupportedError
        If LiteRT cannot express an operation. The message names its module. This is a ValueError.
    ValueError
        If an argument is out of range, the model is in float16 or bfloat16 or cannot take
        ``example_inputs``, or the file computes something else than the model.

    Examples
    --------
    >>> import tempfile
    >>> import safe_core
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> with torch.no_grad():
    ...     found = safe_core.project(model[0].weight, safe_core.Block((1, 4), 0.9))
    ...     _ = model[0].weight.copy_(found.values)
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> report = save_litert(model, torch.randn(8, 64), path, compute="sparse")
    >>> [(layer.name, layer.format) for layer in report.layers]
    [('0', '1x4'), ('2', 'dense')]
    """
    settings = check_settings(
        "save_litert", weights=weights, batch_size=batch_size, compute=compute, tolerance=tolerance
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype.itemsize < 4:
            raise ValueError(
                f"model must be in float32, got {p.dtype} in {name}: pass model.float(), because "
                "the file is float32"
            )
    args, kwargs = arguments(example_inputs)
    given = [*args, *kwargs.values()]
    for x in given:
        if not torch.is_tensor(x):
            raise TypeError(f"example_inputs must hold tensors only, got {_checks.shown(x)}")
    shapes = [tuple(x.shape) for x in given]
    batches = [[x[part] for x in given] for part in settings.batches(shapes)]

    def call(batch: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return tuple(batch[: len(args)]), dict(zip(kwargs, batch[len(args) :], strict=True))

    with evaluation_mode(model):
        with naming_inputs(given):
            expected = [_outputs(model, *call(batch)) for batch in batches]
        graph, _ = litert_graph(model, *call(batches[0]))
    samples = [[_array(x) for x in batch] for batch in batches]
    return save_graph(graph, samples, expected, path, settings)


def litert_graph(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[Builder, list[np.ndarray[Any, Any]]]:
    """Return the graph of a model in evaluation mode, and the inputs as its file takes them.

    Raises
    ------
    ValueError
        If the model cannot be traced, or LiteRT cannot express an operation.
    """
    return _Trace(model, args, kwargs).run(), [_array(x) for x in (*args, *kwargs.values())]


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """Return an input or output as the file has it."""
    x = x.detach().cpu()
    return as_stored((x.float() if x.is_floating_point() else x).numpy())


def _outputs(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> list[np.ndarray[Any, Any]]:
    return [_array(x) for x in tensors(model(*args, **kwargs))]


class _Trace:
    """Translate the operations of a model, as torch.export finds them, into a graph."""

    def __init__(
        self, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        self.graph = Builder()
        self.values: dict[Node, Any] = {}
        self.program = self.exported(model, args, kwargs)

    def exported(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore", FutureWarning)  # that torch's own parts cause
            try:
                program = torch.export.export(model, args, kwargs, strict=False)
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                raise ValueError(
                    f"model must be one that torch.export.export can trace, got "
                    f"{type(error).__name__}: {text[0]}"
                ) from error
            return self.decomposed(program)

    def decomposed(self, program: Any) -> Any:
        """Return a program without operations in place, and with unknown ones in simpler ones."""
        calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
        unknown = {
            target for target in calls if hasattr(target, "_schema") and _name(target) not in _RULES
        }
        if unknown:
            table: Any = torch.export.default_decompositions()
            some = {key: rule for key, rule in table.items() if key in unknown}
            program = program.run_decompositions(some)
        return program

    def run(self) -> Builder:
        """Return the graph.

        Raises
        ------
        UnsupportedError
            If LiteRT cannot express an operation.
        """
        from torch.export.graph_signature import InputKind

        held = {**self.program.state_dict, **self.program.constants}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    self.values[node] = self.input(node)
                else:
                    self.values[node] = held[spec.target]
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            elif node.op == "output":
                used = set(self.program.graph_signature.user_outputs)
                nodes = [x for x in node.args[0] if isinstance(x, Node) and x.name in used]
                self.graph.outputs = [as_tensor(self.graph, self.values[x]) for x in nodes]
        return self.graph

    def input(self, node: Node) -> GraphTensor:
        value = node.meta["val"]
        kind = _array(torch.empty(0, dtype=value.dtype)).dtype
        return self.graph.input(node.name, tuple(value.shape), kind)

    def read(self, arguments: Any) -> Any:
        return torch.fx.node.map_arg(arguments, lambda node: self.values[node])

    def call(self, node: Node) -> Any:
        """Return the value of a call: a constant, or the output of operations of the graph."""
        target: Any = node.target
        args, kwargs = self.read(node.args), self.read(node.kwargs)
        if not any(_depends(self.values[x]) for x in node.all_input_nodes):
            return target(*args, **kwargs)
        if not hasattr(target, "_schema"):  # operator.getitem, of a list of results
            return target(*args, **kwargs)
        if not target._schema.returns and not target._schema.is_mutable:
            return None  # an assertion, such as that of the dtype which .to() adds
        path, kind = _module(node)
        self.graph.source = path or _name(target)
        rule = _RULES.get(_name(target))
        if rule is None:
            raise UnsupportedError(
                f"LiteRT must be able to express every operation, got {target} in "
                f"{_place(path, kind)}"
            )
        named = _named(target, args, kwargs)
        value = node.meta["val"]
        several = isinstance(value, (list, tuple))
        named.update(
            name=_name(target),
            target=target,
            rest=(args[1:], kwargs),
            shape=[tuple(x.shape) for x in value] if several else tuple(value.shape),
            dtype_out=None if several else value.dtype,
        )
        try:
            return rule(self.graph, SimpleNamespace(**named))
        except UnsupportedError as error:
            raise UnsupportedError(f"{_place(path, kind)}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch.export logs and prints of an error that it raises, too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _depends(value: Any) -> bool:
    """Return whether a value depends on the inputs of the model."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(x, GraphTensor) for x in several)


def _name(target: Any) -> str:
    """Return the name of an operation without its overload."""
    return str(target._schema.name).split("::")[-1]


def _named(target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operation by name, with their defaults."""
    found = {}
    for i, argument in enumerate(target._schema.arguments):  # type: ignore[attr-defined]
        if i < len(args):
            found[argument.name] = args[i]
        elif argument.name in kwargs or argument.has_default_value():
            found[argument.name] = kwargs.get(argument.name, argument.default_value)
    return found


def _module(node: Node) -> tuple[str, str]:
    """Return the path and the class of the module that called an operation."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return str(path), kind.rpartition(".")[2]


def _place(path: str, kind: str) -> str:
    return f"module {path!r} ({kind})" if path else f"the model ({kind})"
