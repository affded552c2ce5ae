"""Remove channels that are zero from a network, which becomes smaller and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core._installed import require
from safe_core.adapters.model_calls import naming_inputs

from .channel_layers import ChannelLayers
from .example_inputs import arguments, compare, evaluation_mode, tensors
from .optimizer import SparseOptimizer
from .removed_channels import RemovedChannels

__all__ = ["shrink", "silence_channels"]

_COUPLED = "they go together with channels that are not zero"
_OUTPUT = "they are outputs of the network"
_LAST = "each layer keeps at least one channel"


@torch.no_grad()
def shrink(
    model: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer | None = None,
) -> RemovedChannels:
    """Remove the output channels of linear and convolution layers whose weights are all zero.

    Layers that read a channel lose their inputs for it, and norms, depthwise convolutions and
    layers whose outputs are added to it lose it too, as torch-kirigami finds by tracing the model
    with torch.fx. A channel goes only if nothing but zeros is written to it, so the outputs stay
    equal up to rounding. This is checked on ``example_inputs`` before the model changes.

    A bias, or the shift of a batch norm, makes a channel constant instead of zero. Masks of
    weights leave them free. So call `silence_channels` first, and both before the last stage of
    training, which adapts to it.

    The model is changed in place, like its parameters in ``optimizer``, whose buffers of the shape
    of a parameter, such as momentum, keep the entries of the channels that stay. Create a
    `SparseOptimizer` for the smaller model afterwards.

    Parameters
    ----------
    model : torch.nn.Module
        A model that torch.fx can trace.
    example_inputs : tensor, tuple or mapping
        One argument, all positional ones, or all by name. Random values will do.
    optimizer : torch.optim.Optimizer, optional
        Optimizer of the model's parameters; of a `SparseOptimizer`, its ``base``.

    Returns
    -------
    RemovedChannels

    Raises
    ------
    ModuleNotFoundError
        If torch-kirigami is missing, which the extra ``channels`` installs.
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, cannot be traced, has channels that are
        constant, or would compute something else; if ``example_inputs`` hold NaN; or if the
        optimizer holds no parameter of the model, or a buffer with another shape than its
        parameter. Nothing has changed then.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[1].zero_(), model[0].bias[1].zero_()
    >>> shrink(model, torch.randn(5, 4)).removed
    {'0': 1}
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    require("shrink", "torch_kirigami", extra="channels")
    _check(model, optimizer)
    args, kwargs = arguments(example_inputs)
    _check_numbers(args, kwargs)
    with evaluation_mode(model), _naming_the_model():
        with naming_inputs([*args, *kwargs.values()]):
            model(*args, **kwargs)
        return _remove(model, lambda m: m(*args, **kwargs), args, kwargs, optimizer)


@torch.no_grad()
def silence_channels(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Set to zero what keeps channels without weights from being zero, in place.

    A channel whose weights are all zero still has the value of its bias, or of the shift of the
    batch norm after it. This sets such biases, and the scales and shifts of the norms, to zero,
    for the channels that `shrink` can take out. The outputs change, so do it before the last
    stage of training: either `shrink` the model then, or keep the zeros of all its parameters by
    `safe_core.keep_zeros`, with ``where=``.

    Parameters
    ----------
    model : torch.nn.Module
        A model that torch.fx can trace.
    example_inputs : tensor, tuple or mapping
        One argument, all positional ones, or all by name. Random values will do.

    Returns
    -------
    dict of str to int
        Number of channels that are silent now, by the name of the layer or the norm.

    Raises
    ------
    ModuleNotFoundError
        If torch-kirigami is missing, which the extra ``channels`` installs.
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, they hold NaN, or it cannot be traced.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[1].zero_()
    >>> silence_channels(model, torch.randn(5, 4))
    {'0': 1}
    >>> model[0].bias[1].item()
    0.0
    """
    require("silence_channels", "torch_kirigami", extra="channels")
    _check(model, None)
    args, kwargs = arguments(example_inputs)
    _check_numbers(args, kwargs)
    with evaluation_mode(model), _naming_the_model():
        with naming_inputs([*args, *kwargs.values()]):
            model(*args, **kwargs)
        found = _Removable(model, args, kwargs)
        found.layers.drop(found.constants)
    return {name: len(indices) for name, indices in found.constants.items()}


@contextmanager
def _naming_the_model() -> Iterator[None]:
    """Raise errors of torch-kirigami as those of an argument."""
    from torch_kirigami import KirigamiError

    try:
        yield
    except KirigamiError as error:
        raise ValueError(f"model must be one that torch-kirigami can cut: {error}") from error


class _Removable:
    """The channels of a model that can be removed.

    Attributes
    ----------
    layers : ChannelLayers
    graph : DependencyGraph or None
        None if no channel is zero.
    kept : dict of str to str
        Layers with channels that are zero and stay, and why.
    removed, constants : dict of str to list of int
        Output channels that go, and those of them that are constant instead of zero.
    selections : list
        The former, as torch-kirigami takes them.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from torch_kirigami import DependencyGraph

        self.layers = layers = ChannelLayers(model)
        self.graph, self.kept = None, dict[str, str]()
        self.removed: dict[str, list[int]] = {}
        self.constants: dict[str, list[int]] = {}
        dead, silent = (layers.quiet(args, kwargs, constants=flag) for flag in (False, True))
        zero = {name: indices for name, indices in layers.zero().items() if name in dead}
        if not zero:
            return
        self.graph = DependencyGraph.build(model, args=args, kwargs=kwargs)
        found = _Closure(self.graph, layers, dead)
        self.kept = found.close(zero)
        if not found.seeds:
            return
        self.removed, self.selections = found.outputs(), found.selections()
        for name, indices in self.removed.items():
            constant = [i for i in indices if name in silent and not silent[name][i]]
            if constant:
                self.constants[name] = constant


def _remove(
    model: nn.Module,
    call: Callable[[nn.Module], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    optimizer: Optimizer | None,
) -> RemovedChannels:
    from torch_kirigami.pruning import Pruner

    found, size = _Removable(model, args, kwargs), _size(model)
    if not found.removed:
        return RemovedChannels(model, {}, found.kept, (size, size))
    layers, constants = found.layers, found.constants
    if constants and layers.have_effect(constants, args, kwargs):
        counts = ", ".join(f"{len(indices)} of {name}" for name, indices in constants.items())
        raise ValueError(
            "channels without weights must have no bias, and no scale and shift of a norm, got "
            f"constant channels: {counts}. Call silence_channels first to set these to zero"
        )
    pruner = Pruner(model, graph=found.graph)
    plan = pruner.plan_remove(found.selections)
    trial = copy.deepcopy(model)
    wanted = call(trial)
    Pruner(trial).apply(plan)
    compare(
        wanted,
        call(trial),
        "model must compute the same without its zero channels, got other outputs for "
        "example_inputs: does an activation map 0 to another number, as sigmoid does?",
    )
    del trial
    buffers = _Buffers(model, optimizer)
    result = pruner.apply(plan)[1]
    maps = {path: way for ref, way in result.coordinate_maps.items() for path in ref.paths}
    buffers.cut(result.parameter_map, maps)
    gone = {name: len(ids) for name, ids in found.removed.items() if not layers.is_norm(name)}
    return RemovedChannels(model, gone, found.kept, (size, _size(model)))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class _Closure:
    """The channels to remove, and all that goes with them.

    Attributes
    ----------
    seeds : dict of str to set of int
        Output channels of layers to remove.
    """

    def __init__(
        self, graph: Any, layers: ChannelLayers, dead: Mapping[str, Sequence[bool]]
    ) -> None:
        self.graph, self.layers, self.dead = graph, layers, dead
        self.seeds: dict[str, set[int]] = {}

    def close(self, zero: Mapping[str, set[int]]) -> dict[str, str]:
        """Leave the channels that can go without a change; return those that stay, and why."""
        self.seeds = {name: set(indices) for name, indices in zero.items()}
        kept: dict[str, str] = {}
        for name, own in self.seeds.items():
            if len(own) == len(self.dead[name]):
                own.remove(min(own))
                kept[name] = _LAST
        self._drop_empty()
        while self.seeds:
            impact = self._impact()
            outputs = [impact.selection(ref) for ref in impact.interfaces]
            alive, unknown = self._alive(impact), self._unknown(impact)
            if not outputs and not alive and not unknown and impact.status == "resolved":
                break
            # Network outputs are handled later. Seeds that cover all inputs of a layer together
            # seem to remove all its outputs, and the layers after it as well.
            if alive:
                self._leave_alive(alive, impact, kept)
                continue
            left = self._leave(outputs, _OUTPUT, kept)
            if not self._leave(unknown, _COUPLED, kept) and not left:
                self._leave_layers(impact, kept)
        return kept

    def selections(self) -> list[Any]:
        """Return the seeds as torch-kirigami takes them."""
        return [self._select(name, indices) for name, indices in self.seeds.items()]

    def outputs(self) -> dict[str, list[int]]:
        """Return the output channels of all modules that go with the seeds."""
        impact = self._impact()
        found = {name: self._of(impact, name) for name in self.layers.modules}
        return {name: indices for name, indices in found.items() if indices}

    def _impact(self) -> Any:
        return self.graph.propagate(remove=self.selections())

    def _select(self, name: str, indices: Sequence[int] | set[int]) -> Any:
        return self._tensor(name).axis(self.layers.axes[name]).select(sorted(indices))

    def _of(self, impact: Any, name: str) -> list[int]:
        """Return the output channels of a module that an impact removes."""
        chosen = impact.selection(self._tensor(name))
        return list(chosen.fully_selected_indices(self.layers.axes[name])) if chosen else []

    def _tensor(self, name: str) -> Any:
        """Return the reference to the tensor whose channels are those of a module's outputs."""
        if self.layers.modules[name].weight is None:  # of a norm without a scale
            return self.graph.buffer(_join(name, "running_mean"))
        return self.graph.parameter(_join(name, "weight"))

    def _alive(self, impact: Any) -> dict[str, list[int]]:
        """Return the channels that an impact would remove although they are not zero."""
        found = {}
        for name in self.layers.modules:
            dead = self.dead.get(name)  # None for a module that is not called
            alive = [i for i in self._of(impact, name) if dead is not None and not dead[i]]
            if alive:
                found[name] = alive
        return found

    def _unknown(self, impact: Any) -> list[Any]:
        """Return what an impact would remove of modules that may not map zero to zero."""
        tensors = ((chosen, chosen.tensor) for chosen in impact.selections.values())
        return [
            chosen
            for chosen, tensor in tensors
            if tensor.kind in ("parameter", "buffer") and not self._is_known(tensor.paths[0])
        ]

    def _is_known(self, path: str) -> bool:
        """Return whether the module of a tensor maps channels that are zero to zero."""
        owner = path.rpartition(".")[0]
        return owner in self.layers.modules or isinstance(
            self.layers.model.get_submodule(owner), nn.PReLU
        )

    def _leave_alive(
        self, alive: Mapping[str, list[int]], impact: Any, kept: dict[str, str]
    ) -> None:
        """Keep at least one of the seeds that cannot go without channels that are not zero."""
        pairs = [(name, i) for name, own in alive.items() for i in own]
        if self._leave_pairs(pairs, kept) or self._leave_coupled_layers(kept):
            return
        causes = [self._select(*entry) for entry in alive.items()]
        if not self._leave(causes, _COUPLED, kept):
            self._leave_layers(impact, kept)

    def _leave_pairs(self, pairs: Sequence[tuple[str, int]], kept: dict[str, str]) -> bool:
        """Keep the seeds that cannot go without some channels; return whether there are any."""
        causes: dict[str, list[int]] = {}
        for name, i in pairs:
            causes.setdefault(name, []).append(i)
        back = self.graph.propagate(remove=[self._select(*entry) for entry in causes.items()])
        if not self._empties_a_module(back):
            return self._leave_with(back, _COUPLED, kept)
        # A layer that loses all its inputs takes all its outputs along, so that seeds of other
        # layers seem to depend on these channels. Fewer channels leave it some inputs.
        if len(pairs) == 1:
            return False
        middle = len(pairs) // 2
        first = self._leave_pairs(pairs[:middle], kept)
        return self._leave_pairs(pairs[middle:], kept) or first

    def _leave_coupled_layers(self, kept: dict[str, str]) -> bool:
        """Keep the layers whose seeds alone need other channels; return whether there are any."""
        before = len(self.seeds)
        for name, indices in list(self.seeds.items()):
            if self._alive(self.graph.propagate(remove=[self._select(name, indices)])):
                kept[name] = _COUPLED
                del self.seeds[name]
        return len(self.seeds) < before

    def _empties_a_module(self, impact: Any) -> bool:
        """Return whether an impact removes all of several channels of a module."""
        return any(len(self._of(impact, name)) == len(dead) > 1 for name, dead in self.dead.items())

    def _leave(self, causes: Sequence[Any], reason: str, kept: dict[str, str]) -> bool:
        """Keep the seeds that cannot go without ``causes``; return whether there are any."""
        if not causes:
            return False
        return self._leave_with(self.graph.propagate(remove=causes), reason, kept)

    def _leave_with(self, impact: Any, reason: str, kept: dict[str, str]) -> bool:
        """Keep the seeds that an impact removes; return whether there are any."""
        before = sum(map(len, self.seeds.values()))
        for name in list(self.seeds):
            left = self.seeds[name] - set(self._of(impact, name))
            if left != self.seeds[name]:
                kept[name] = reason
                self.seeds[name] = left
        self._drop_empty()
        return sum(map(len, self.seeds.values())) < before

    def _drop_empty(self) -> None:
        self.seeds = {name: indices for name, indices in self.seeds.items() if indices}

    def _leave_layers(self, impact: Any, kept: dict[str, str]) -> None:
        """Keep the layers whose channels torch-kirigami cannot follow, or raise."""
        before = len(self.seeds)
        for name, indices in list(self.seeds.items()):
            own = self.graph.propagate(remove=[self._select(name, indices)])
            bad = own.interfaces or self._alive(own) or self._unknown(own)
            if bad or own.status != "resolved":
                kept[name] = _messages(own) or _COUPLED
                del self.seeds[name]
        if len(self.seeds) == before:
            raise ValueError(f"channels must be removable together, got {_messages(impact)}")


def _messages(impact: Any) -> str:
    return "; ".join(dict.fromkeys(d.message for d in impact.diagnostics))


class _Buffers:
    """Buffers of an optimizer that follow the parameters of a model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        for p, held in self._held():
            for key, value in held.items():
                if torch.is_tensor(value) and value.numel() > 1 and value.shape != p.shape:
                    raise ValueError(
                        f"optimizer must keep buffers of the shapes of its parameters, got {key} "
                        f"of shape {tuple(value.shape)} for {self.names[p]} of {tuple(p.shape)}"
                    )

    def _held(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        state = {} if self.optimizer is None else self.optimizer.state
        yield from ((p, held) for p, held in state.items() if p in self.names)

    def cut(self, replaced: Mapping[Any, Tensor], maps: Mapping[str, Sequence[Any]]) -> None:
        """Put the new parameters into the optimizer, with the entries of the buffers that stay."""
        if self.optimizer is None:
            return
        for p, held in list(self._held()):
            if p not in replaced:
                continue
            new, way = replaced[p], maps[self.names[p]]
            self.optimizer.state[new] = {
                key: _cut(value, new, way)
                if torch.is_tensor(value) and value.shape == p.shape
                else value
                for key, value in held.items()
            }
            del self.optimizer.state[p]
        for group in self.optimizer.param_groups:
            group["params"] = [replaced.get(p, p) for p in group["params"]]


def _cut(value: Tensor, like: Tensor, segments: Sequence[Any]) -> Tensor:
    """Return the entries of a buffer that stay."""
    found = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    for segment in segments:
        part, place = value, []
        for axis, (old, new) in enumerate(
            zip(segment.source.axes, segment.destination.axes, strict=True)
        ):
            part = part.index_select(axis, torch.tensor(list(old), device=value.device))
            place.append(slice(min(new), max(new) + 1))
        found[tuple(place)] = part
    return found


def _check(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    if isinstance(optimizer, SparseOptimizer):
        raise TypeError(
            "optimizer must be the base of the SparseOptimizer, optimizer.base, got the "
            "SparseOptimizer, whose masks are those of the larger model"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)!r}")
    own = set(model.parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    if groups and not any(p in own for group in groups for p in group["params"]):
        raise ValueError(
            "optimizer must hold parameters of the model, got none of them: was it created for "
            "another model, or for a copy?"
        )


def _check_numbers(args: Any, kwargs: Any) -> None:
    """Raise if a tensor holds NaN, since outputs that are NaN cannot be compared."""
    for x in tensors((args, kwargs)):
        read = x.is_floating_point() and x.layout == torch.strided and not x.is_nested
        if read and not x.is_meta and bool(x.isnan().any()):
            raise ValueError(f"example_inputs must hold no NaN, got some in shape {tuple(x.shape)}")


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
