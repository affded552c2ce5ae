"""Measure in which forms zeros of a model pay on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safe_core._checks import shown
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.export_measurements import (
    LITERT,
    Collected,
    check_call,
    check_fit,
    check_plan,
    first_line,
    measure_litert,
    resized,
    single_sample,
)
from safe_core.adapters.layer_timing import processor
from safe_core.adapters.memory_errors import lacks_memory

from .example_inputs import arguments, evaluation_mode
from .export_timing import compressed_bytes, measure_layers, measure_whole, smaller_models
from .litert import litert_graph
from .sparse_layers import quiet_beta
from .weights import prunable_weights

__all__ = ["advise"]

_KNOWN = ("dense", "litert", "int8", "1x4", "1x16", "csr", "bsr", "channels", "2:4")


@torch.no_grad()
def advise(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Collection[int] | None = None,
    sparsities: Collection[float] = (0.8, 0.9, 0.95),
    forms: Collection[str] | None = None,
    device: torch.device | str | None = None,
    repeats: int = 9,
    progress: Callable[[int, int], object] | None = None,
) -> ExportAdvice:
    """Measure in which forms zeros would pay on this machine, before or after training.

    Random weights with zeros at random positions replace those of the linear layers. Only shapes
    matter, so the model need not be trained. It measures

    - files of the whole model for LiteRT: dense in float32 and int8, and with zeros in blocks of
      1x4 (float32) and 1x16 (int8);
    - its linear layers in CSR and in BSR with blocks of 16x16, and on CUDA in 2:4;
    - the whole model without some of its channels.

    If at least a hundredth of the weights are zero, the same is measured with these zeros. A form
    pays if it takes at most nine tenths of the time of dense float32. One thread runs all forms on
    the CPU, in float32.

    The model and the global random state stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        Trained or not, dense or sparse.
    example_inputs : tensor, tuple or mapping
        One argument, all positional ones, or all by name. Random values will do.
    batch_sizes : list of int, optional
        Numbers of samples of a call, along the first axis of all inputs, which are repeated or
        cut to that size. By default 1 if the inputs hold one sample, and otherwise the inputs are
        used as they are.
    sparsities : list of float
        Fractions of zeros in the weights of linear layers.
    forms : list of str, optional
        Forms to measure beside the dense ones: ``"1x4"``, ``"1x16"``, ``"csr"``, ``"bsr"``,
        ``"channels"`` and ``"2:4"``; by default all.
    device : torch.device or str, optional
        Where to run the model; by default where it is.
    repeats : int
        Timed samples of each form. LiteRT files are called at least this often, and for about a
        second in all.
    progress : callable, optional
        Called with the number of finished parts and the total.

    Returns
    -------
    ExportAdvice
        Print it for a table with the advice. Forms that cannot be measured are in it with their
        reasons.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If an argument is out of range, or the model fails on ``example_inputs``.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> found = advise(model, torch.randn(4, 64), sparsities=[0.9], forms=["csr"], repeats=2)
    >>> sorted(found.form("csr").seconds[None]), found.form("1x4").reason
    ([0.9], 'forms= leaves it out')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    args, kwargs = arguments(example_inputs)
    if batch_sizes is None:
        batch_sizes = single_sample([*args, *kwargs.values()])
    given = _dtype(model)
    model, where = _placed(model, device)
    plan = check_plan(
        "PyTorch",
        _KNOWN,
        forms=forms,
        batch_sizes=batch_sizes,
        sparsities=sparsities,
        repeats=repeats,
        zeros=_zeros(model),
        dtype=_dtype(model),
    )
    dtype = torch.float32 if where.type == "cpu" else None
    inputs = {n: _resized(example_inputs, n, where, dtype) for n in plan.batch_sizes}
    found = Collected(plan, parts=1 + 3 * len(inputs), progress=progress)
    if given != plan.dtype:
        found.note(f"times and sizes are those of the model in {plan.dtype}, instead of {given}")
    devices = [where] if where.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        evaluation_mode(model),
        _one_thread(),
        quiet_beta(),
    ):
        _measure(found, model, inputs, where)
    return found.advice(_machine(where))


def _measure(
    found: Collected, model: nn.Module, inputs: dict[int | None, Any], where: torch.device
) -> None:
    """Add the figures of all forms."""
    calls = {batch: _call(given) for batch, given in inputs.items()}
    for batch, call in calls.items():
        check_call(partial(call, model), found.plan.place(batch))
    known = prunable_weights(model)
    named = [(name, p) for name, p in model.named_parameters() if p in known]
    check_fit(found, [(name, tuple(p.shape), known[p]) for name, p in named])
    _note_devices(found, where)
    if found.plan.own is not None:
        found.compressed = compressed_bytes(model)
    smaller = smaller_models(found, model, inputs[found.plan.batch_sizes[0]])
    found.finish()
    for batch, call in calls.items():
        measure_whole(found, batch, model, smaller, call, where)
        found.finish()
        measure_layers(found, batch, model, call, where)
        found.finish()
        if where.type == "cpu":
            measure_litert(found, batch, _traced(model, *arguments(inputs[batch])))
        found.finish()
    if smaller and "litert" in found.seconds:
        found.note(
            "channels removed: measured in PyTorch only; save_litert of the smaller network may "
            "be faster"
        )


def _call(given: Any) -> Callable[[nn.Module], Any]:
    args, kwargs = arguments(given)
    return lambda module: module(*args, **kwargs)


def _dtype(model: nn.Module) -> str:
    """Return the dtype of the weights that can be pruned."""
    names = {str(p.dtype).removeprefix("torch.") for p in prunable_weights(model)}
    return " and ".join(sorted(names))


def _placed(model: nn.Module, device: torch.device | str | None) -> tuple[nn.Module, torch.device]:
    """Return a model on a device, in float32 on the CPU; a copy if that changes it."""
    held = [*model.parameters(), *model.buffers()]
    own = held[0].device if held else torch.device("cpu")
    try:
        where = own if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of PyTorch, got {device!r}: {error}") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be on the CPU or CUDA, got {str(where)!r}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {str(where)!r} and no CUDA GPU")
    wide = {x.dtype for x in held if x.is_floating_point()} <= {torch.float32}
    if all(x.device == where for x in held) and (where.type != "cpu" or wide):
        return model, where
    try:
        placed = copy.deepcopy(model).to(where)
    except (RuntimeError, TypeError) as error:
        if lacks_memory(error):
            raise
        raise ValueError(
            "model must be one that can be copied, to run in float32 or on another device, got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return (placed.float() if where.type == "cpu" else placed), where


def _zeros(model: nn.Module) -> float:
    weights = list(prunable_weights(model))
    if not weights:
        raise ValueError("model must have weights that can be pruned, got none")
    entries = sum(p.numel() for p in weights)
    return 1 - sum(int(p.count_nonzero()) for p in weights) / max(entries, 1)


def _resized(
    example_inputs: Any, batch: int | None, device: torch.device, dtype: torch.dtype | None
) -> Any:
    """Return inputs with a number of samples, on a device."""

    def each(x: Any) -> Any:
        if batch is not None:
            x = resized(x, batch)
        if not torch.is_tensor(x):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    args, kwargs = arguments(example_inputs)
    return {key: each(x) for key, x in kwargs.items()} or tuple(each(x) for x in args)


def _note_devices(found: Collected, device: torch.device) -> None:
    """Tell which forms do not run on a device."""
    if device.type == "cuda":
        found.not_measured(LITERT, "LiteRT runs on the CPU here, and the model is on CUDA")
        found.not_measured(["csr", "bsr"], "sparse_modules has no such layers on CUDA")
    elif torch.cuda.is_available():
        found.not_measured(["2:4"], 'the model is on the CPU; pass device="cuda"')
    else:
        found.not_measured(["2:4"], "there is no CUDA GPU")


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], tuple[Any, Any]]:
    def trace() -> tuple[Any, Any]:
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor):
                raise TypeError(f"LiteRT takes tensors only, and example_inputs has {shown(x)}")
        return litert_graph(model, args, kwargs)

    return trace


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as LiteRT does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, one thread"
