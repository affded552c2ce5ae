"""Replace the linear layers of a model that a measurement shows to be faster without zeros."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core.adapters.layer_timing import (
    HALF,
    LayerTiming,
    interleaved,
    processor,
    timing_of,
)
from safe_core.adapters.model_calls import naming_inputs
from safe_core.adapters.sparse_report import SparseModules, decided

from .example_inputs import arguments, compare, evaluation_mode
from .sparse_layers import SparseLinear, quiet_beta, sparse_forms
from .weights import hidden_weights, prunable_weights

__all__ = ["READERS", "MeasuredLayers", "sparse_modules", "timed_call"]

_NO_KERNEL = "CPU kernels take float32 and float64; pass model.float()"
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their linear layers themselves."""


@torch.no_grad()
def sparse_modules(model: nn.Module, example_inputs: Any, *, repeats: int = 9) -> SparseModules:
    """Return a model for inference whose linear layers skip zeros where that is faster here.

    Each `torch.nn.Linear` is timed on the inputs that it gets from ``example_inputs``: dense, in
    CSR, and in BSR with square blocks if at least half of these are zero; on CUDA in 2:4
    (semi-structured). All forms take turns. The fastest replaces the layer if its median time is
    at least a tenth below that of the dense layer. Then the outputs of the whole model are
    compared, and its time: if that is not a tenth shorter, nothing is replaced.

    The result holds for this machine, its number of threads and the batch size of
    ``example_inputs``, so pass inputs like those to serve. ``model`` stays as it is, and shares
    the other parameters with the result. The result cannot be trained. Its ``state_dict`` has the
    dense weights under the names of before, so that either can be saved; to load, call
    ``load_state_dict`` on the dense model, and this function again.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, in float32 or float64, or on CUDA.
    example_inputs : tensor, tuple or mapping
        One argument, all positional ones, or all by name.
    repeats : int
        Measurements of each form.

    Returns
    -------
    SparseModules
        Print it for a table of the layers, their times and why others stay dense.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, or the outputs differ.

    Examples
    --------
    >>> import safe_core
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(safe_core.project(model[0].weight, 0.95).values)
    >>> inputs = torch.randn(32, 256)
    >>> found = sparse_modules(model, inputs, repeats=3)
    >>> bool((found.model(inputs) - model(inputs)).abs().max() < 1e-5)
    True
    >>> [(layer.name, round(layer.sparsity, 2)) for layer in found.layers]
    [('0', 0.95)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    _checks.integer("repeats", repeats, low=1)
    args, kwargs = arguments(example_inputs)
    with evaluation_mode(model), quiet_beta():
        with naming_inputs([*args, *kwargs.values()]):
            model(*args, **kwargs)
        return _replaced(model, lambda m: m(*args, **kwargs), repeats)


def _replaced(model: nn.Module, call: Callable[[nn.Module], Any], repeats: int) -> SparseModules:
    described = f"{processor()}, {torch.get_num_threads()} threads"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        described = f"{torch.cuda.get_device_name(device)}"
    measured = MeasuredLayers(model, repeats)
    try:
        wanted = call(model)
    finally:
        measured.remove_hooks()
    layers = measured.layers_timed()
    chosen = {layer.name: layer.form for layer in layers if layer.form != "dense"}
    if not chosen:
        return SparseModules(model, layers, {}, described)
    # Sharing the parameters takes no memory for those that stay.
    shared = {id(x): x for x in chain(model.parameters(), model.buffers())}
    sparse = copy.deepcopy(model, shared)
    for name, form in chosen.items():
        sparse = _with(sparse, sparse.get_submodule(name), measured.make(name, form))
    compare(
        wanted,
        call(sparse),
        "model must compute the same with sparse layers, got other outputs for example_inputs: "
        "are they the same at every call?",
    )
    runs = {"dense": timed_call(call, model, device), "sparse": timed_call(call, sparse, device)}
    return decided(model, sparse, layers, interleaved(runs, repeats), described)


def timed_call(call: Callable[..., Any], module: Any, device: torch.device) -> Callable[[], None]:
    """Return a call of a module that ends when its work is done."""

    def run() -> None:
        call(module)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _with(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Return the model with another module wherever it holds one."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model


class MeasuredLayers:
    """Time the forms of linear layers as the model calls them."""

    def __init__(
        self,
        model: nn.Module,
        repeats: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.repeats, self.clock = model, repeats, clock
        self.layers: dict[str, LayerTiming] = {}
        self.forms: dict[str, dict[str, Callable[[], SparseLinear]]] = {}
        self.times: dict[str, dict[tuple[int, ...], dict[str, list[float]]]] = {}
        self.calls: dict[str, Counter[tuple[int, ...]]] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.hooks = [
            module.register_forward_pre_hook(self._hook(name, module), with_kwargs=True)
            for name, module in self._candidates()
        ]

    def _candidates(self) -> list[tuple[str, nn.Linear]]:
        """Describe the layers with zeros, and return those to measure."""
        found, known = [], prunable_weights(self.model)
        inside = {id(m) for reader in self.model.modules() if isinstance(reader, READERS)
                  for m in reader.modules()}  # fmt: skip
        for name, module in self.model.named_modules():
            for key, p in module._parameters.items():
                own = isinstance(module, nn.Linear) and key == "weight"  # tied ones too
                if p is None or not p.numel() or not (own or p in known):
                    continue
                full = name if key == "weight" else f"{name}.{key}"
                zeros = self._describe(full, p)
                reason = _reason(module, zeros, id(module) in inside)
                if zeros and not reason:
                    found.append((full, module))
                elif zeros:
                    self.layers[full] = self.layers[full]._replace(reason=reason)
        for hidden in hidden_weights(self.model):
            owner, _, key = hidden.name.rpartition(".")
            if self._describe(hidden.name, getattr(self.model.get_submodule(owner), key)):
                reason = f"the layer computes its weight, which {hidden.remove} ends"
                self.layers[hidden.name] = self.layers[hidden.name]._replace(reason=reason)
        return found

    def _describe(self, name: str, weight: Tensor) -> float:
        """Begin the row of a weight with zeros, and return their fraction."""
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        if zeros:
            self.layers[name] = LayerTiming(name, tuple(weight.shape), zeros)
        return zeros

    def _hook(self, name: str, layer: nn.Linear) -> Callable[[nn.Module, Any, Any], None]:
        self.forms[name], self.times[name] = dict(sparse_forms(layer)), {}
        self.calls[name], self.failed[name] = Counter(), {}

        def measure(module: nn.Module, given: Any, named: Any) -> None:
            x: Tensor = given[0] if given else named["input"]
            self.calls[name][tuple(x.shape)] += 1
            if tuple(x.shape) not in self.times[name]:
                self.times[name][tuple(x.shape)] = self._time(name, layer, x)

        return measure

    def _time(self, name: str, layer: nn.Linear, x: Tensor) -> dict[str, list[float]]:
        runs = {"dense": timed_call(lambda m: m.forward(x), layer, x.device)}
        for form, make in self.forms[name].items():
            try:
                run = timed_call(lambda m: m(x), make(), x.device)
                run()
            except RuntimeError as error:  # the dtype, or the shape on CUDA
                if isinstance(error, NotImplementedError) and x.device.type == "cpu":
                    self.failed[name] = {"": _NO_KERNEL}  # for all forms
                    break
                self.failed[name][form] = f"{form}: {str(error).splitlines()[0]}"
            else:
                runs[form] = run
        return interleaved(runs, self.repeats, self.clock)

    def make(self, name: str, form: str) -> SparseLinear:
        """Return the layer in a form."""
        return self.forms[name][form]()

    def remove_hooks(self) -> None:
        """Stop measuring."""
        for hook in self.hooks:
            hook.remove()

    def layers_timed(self) -> list[LayerTiming]:
        """Return all layers with zeros."""
        for name, calls in self.calls.items():
            layer = self.layers[name]
            if not calls:
                self.layers[name] = layer._replace(reason="the model does not call it")
                continue
            times = [
                {form: [n * t for t in taken] for form, taken in self.times[name][shape].items()}
                for shape, n in calls.items()
            ]
            width = layer.shape[1]
            rows = sum(n * torch.Size(shape).numel() // width for shape, n in calls.items())
            self.layers[name] = timing_of(layer._replace(rows=rows), times, self.failed[name])
        return list(self.layers.values())


def _reason(module: nn.Module, zeros: float, inside: bool) -> str:
    """Return why a layer is not measured, or nothing if it is."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} has no sparse kernel"
    if inside:
        return "attention reads the weight itself"
    if zeros < HALF:
        return "fewer than half of the entries are zero"
    return ""
