"""Keep buffers and random state fixed in the second pass; recalibrate batch norm."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from safe_core import _checks
from safe_core.backends.torch_sharding import local

__all__ = [
    "JoinedModules",
    "RandomState",
    "forget_copies",
    "joined",
    "names_of",
    "recalibrate",
    "statistics_kept",
]


class RandomState(NamedTuple):
    """States of torch's random number generators, to draw the same numbers again.

    Attributes
    ----------
    cpu : uint8 tensor
    cuda : list of uint8 tensors
        One state per device; empty if CUDA is not initialised.

    Examples
    --------
    >>> state = RandomState.record()
    >>> first = torch.rand(3)
    >>> with RandomState.replayed(state):
    ...     second = torch.rand(3)
    >>> bool((first == second).all())
    True
    """

    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def record(cls) -> RandomState:
        """Return the current states."""
        # Asking for CUDA states would initialise CUDA, which takes memory and time.
        on_device = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_device else [])

    @staticmethod
    @contextmanager
    def replayed(state: RandomState | None) -> Iterator[None]:
        """Draw from ``state`` within the block, and restore the current states on exit.

        With None, do nothing.
        """
        if state is None:
            yield
            return
        before = RandomState.record()
        state._restore()
        try:
            yield
        finally:
            before._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def forget_copies(model: nn.Module | None) -> None:
    """Drop cached copies of parameters after they were moved in-place.

    Otherwise the next forward pass would use the old values: autocast caches 16-bit casts until
    its outermost block ends, and FSDP can keep the parameters that it has gathered.
    """
    torch.clear_autocast_cache()
    # No model is sharded by FSDP unless its module is imported, and importing it is slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is not None and fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


class JoinedModules(nn.Module):
    """Several modules as one, by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # Not add_module, which refuses names such as "training" that nn.Module uses itself.
        self._modules.update(modules)


def joined(model: Any) -> nn.Module | None:
    """Return the argument ``model`` of `SparseOptimizer` as one module, or raise.

    Examples
    --------
    >>> names_of(joined([nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)])).values()
    dict_values(['model[0].weight', 'model[1].weight'])
    """
    if model is None or isinstance(model, nn.Module):
        return model
    if isinstance(model, Mapping):
        named = dict(model)
    elif isinstance(model, (list, tuple)):
        named = {f"model[{i}]": module for i, module in enumerate(model)}
    else:
        raise TypeError(f"model must be a torch.nn.Module, or several, got {_instead(model)}")
    for name, module in named.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"model must hold instances of torch.nn.Module, got {_instead(module)} for {name!r}"
            )
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"model must name modules by strings without dots, got {name!r}")
    if not named:
        raise ValueError("model must be a module or several, got none")
    return JoinedModules(named)


def _instead(value: Any) -> str:
    """Describe what was passed instead of a module."""
    if isinstance(value, type):
        return f"the class {value.__qualname__}: pass an instance"
    return repr(type(value))


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """Return the parameters of a model with their names.

    Those of several modules get the name of their module as a prefix only if two modules share a
    name.
    """
    full: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    if not isinstance(model, JoinedModules):
        return full
    short = {p: name.partition(".")[2] for p, name in full.items()}
    return short if len(set(short.values())) == len(short) else full


@contextmanager
def statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Restore the buffers of a model on exit, such as the running statistics of batch norm.

    A second forward pass would otherwise update them twice in a step: the statistics of
    normalisation layers, observers of quantisation, codebooks and queues that follow a moving
    average, the vectors of spectral normalisation, and counters. Within the block the layers
    work as in training mode.
    """
    held = [] if model is None else _buffers(model)
    buffers = list({id(b): b for _, _, b in held if _can_be_copied(b)}.values())
    with torch.no_grad():
        saved = [torch.empty_like(local(b)) for b in buffers]
        _copy(saved, [local(b) for b in buffers])
    try:
        yield
    finally:
        for module, name, buffer in held:  # a module may assign a new tensor
            if name in module._buffers:
                module._buffers[name] = buffer
        with torch.no_grad():
            # Through `.data`, which counts no change of version: a graph that saved the buffer,
            # as that of batch norm does, can still be differentiated, and its value is restored.
            now = [local(b).data for b in buffers]
            for buffer, x, value in zip(buffers, now, saved, strict=True):
                if x.shape != value.shape:  # an observer resized it
                    buffer.data = value
            same = [i for i, x in enumerate(now) if x.shape == saved[i].shape]
            _copy([now[i] for i in same], [saved[i] for i in same])


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return every place that holds a buffer."""
    return [
        (module, name, b)
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]


def _can_be_copied(b: Tensor) -> bool:
    """Return whether a buffer can be written in-place.

    The model cannot write to one that is expanded, or was made in inference mode, either.
    """
    strided = b.layout is torch.strided
    overlaps = strided and any(n > 1 and b.stride(i) == 0 for i, n in enumerate(b.shape))
    return not (overlaps or b.is_inference() or b.is_meta) and strided


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors, by one kernel for those of one device and dtype."""
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(values):
        groups.setdefault((x.device, x.dtype), []).append(i)
    for places in groups.values():
        torch._foreach_copy_([targets[i] for i in places], [values[i] for i in places])


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Recompute the running statistics of batch normalisation after `finalize`.

    Pruning shifts the activations, so the old statistics no longer fit. This resets them to
    the plain averages over ``batches``, by `torch.optim.swa_utils.update_bn`.

    Parameters
    ----------
    model : torch.nn.Module
        A model without batch normalisation does not change.
    batches : iterable
        Input tensors, or tuples or lists whose first entry is the input.
    samples : int, optional
        Stop after the batch that reaches this number of inputs. The default uses all batches.
    device : torch.device, optional
        Move the inputs to this device.

    Raises
    ------
    TypeError, ValueError
        If ``samples`` is not a positive integer, or ``batches`` is empty or holds no tensors.

    References
    ----------
    Lee et al. 2025, section 5.1 and appendix F.2 (batch-norm tuning, with 10000 samples).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> recalibrate(model, [torch.ones(8, 4)] * 10, samples=16)
    >>> int(model[1].num_batches_tracked)
    2
    """
    if samples is not None:
        _checks.integer("samples", samples, low=1)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if torch.is_tensor(batches):
        raise TypeError(
            "batches must be an iterable of batches, got one tensor: pass [x] or x.split(size)"
        )
    first, rest = _first(batches)
    batches = itertools.chain([first], rest)
    with _restored_on_error(model):
        update_bn(batches if samples is None else _limited(batches, samples), model, device)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the settings and statistics of batch normalisation if an error is raised.

    `update_bn` resets the statistics, and sets the momentum to None while it runs.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [(layer, layer.momentum) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for layer in layers for b in layer.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        raise


def _first(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    rest = iter(batches)
    for first in rest:
        if not torch.is_tensor(_inputs(first)):
            raise TypeError(
                "batches must be tensors, or tuples or lists that begin with one, got "
                f"{type(_inputs(first))!r}"
            )
        return first, rest
    raise ValueError("batches must not be empty, because the statistics are reset, got none")


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (list, tuple)) else batch


def _limited(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(_inputs(batch))
        if seen >= samples:
            return
