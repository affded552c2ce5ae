"""The repeated blocks of a model, and how the model calls each of them.

Everything is found by structure. The blocks are the `torch.nn.ModuleList` with the most
parameters. What each of them receives besides the hidden states (rotary embeddings, masks,
positions) is learned by running the model around its blocks: they are replaced by functions
that take note of their arguments and hand the hidden states on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .transformers_resume import fingerprint

__all__ = ["BlockCalls", "Structure", "evaluated", "find_blocks", "learn_structure", "record"]

_HIDDEN = "hidden states"


class _Done(BaseException):
    """The last block was called: what the model does after it is not needed."""


class _Shared(NamedTuple):
    """A tensor of the pool that does not grow with the batch."""

    ref: int


class _Own(NamedTuple):
    """A tensor that every sample brings, joined along ``axis`` in a batch."""

    axis: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Call(NamedTuple):
    """The arguments of one call, flat."""

    leaves: list[Any]
    spec: TreeSpec


class _Template(NamedTuple):
    """The arguments of one call with places in the place of tensors."""

    leaves: tuple[Any, ...]
    spec: TreeSpec


class Structure(NamedTuple):
    """How a model runs its blocks.

    Attributes
    ----------
    hidden : tuple of int
        Of each block, which leaf of its arguments the hidden states are.
    axes : tuple of mappings of leaf to axis
        Of each block, which leaves grow with the batch, and along which axis.
    outputs : mapping of class to (leaves, TreeSpec, int)
        What a block of a class returns, and which leaf the hidden states are.
    dependent : bool
        Whether other arguments follow from what blocks return, so that they must be run.
    """

    hidden: tuple[int, ...]
    axes: tuple[Mapping[int, int], ...]
    outputs: Mapping[type, tuple[list[Any], TreeSpec, int]]
    dependent: bool

    def output(self, block: nn.Module, returned: Any) -> Tensor:
        """The hidden states among what a block has returned."""
        leaves, _ = tree_flatten(returned)
        found: Tensor = leaves[self.outputs[type(block)][2]]
        return found


def find_blocks(model: nn.Module, blocks: Any = None) -> tuple[str, list[nn.Module]]:
    """The name and the modules of the repeated blocks of a model.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : str or torch.nn.Module, optional
        A `ModuleList` of the model or its name, such as ``"encoder.block"``, for a model with
        several. By default the one with the most parameters.

    Returns
    -------
    name : str
    modules : list of torch.nn.Module

    Raises
    ------
    TypeError, ValueError
        If there is none, or two blocks share a parameter.

    Examples
    --------
    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])})
    >>> find_blocks(model)[0]
    'layers'
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m}
    if blocks is None:
        if not lists:
            raise ValueError(
                f"model must hold its blocks in a torch.nn.ModuleList, got none in {type(model)!r}"
            )
        name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    else:
        named = dict(model.named_modules())
        found = [n for n, m in named.items() if n == blocks or m is blocks]
        if not found or not isinstance(named[found[0]], (nn.ModuleList, nn.Sequential)):
            raise ValueError(
                "blocks must be a ModuleList of the model or the name of one, such as "
                f"{', '.join(map(repr, lists))}, got {blocks!r}"
            )
        name = found[0]
    modules = list(model.get_submodule(name).children())
    owners: dict[int, int] = {}
    for i, block in enumerate(modules):
        for p in block.parameters():
            if owners.setdefault(id(p), i) != i:
                raise ValueError(
                    f"blocks must not share parameters, {name}.{owners[id(p)]} and {name}.{i} do"
                )
    return name, modules


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run a model as it is deployed, without dropout, and without a cache of keys and values."""
    training = [(m, m.training) for m in model.modules()]
    configs = {id(c): c for m in model.modules() for c in [getattr(m, "config", None)] if c}
    for config in list(configs.values()):
        parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
        configs |= {id(c): c for c in parts if c is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    model.eval()
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, mode in training:
            module.training = mode


@contextmanager
def _answered_by(
    blocks: Sequence[nn.Module], answer: Callable[[int, Callable[..., Any], Any, Any], Any]
) -> Iterator[None]:
    """Let ``answer(i, forward, args, kwargs)`` stand for the forward pass of block i."""
    kept = [block.__dict__.get("forward") for block in blocks]

    def replaced(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(i, forward, args, kwargs)

    try:
        for i, block in enumerate(blocks):
            block.__dict__["forward"] = replaced(i, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _run(
    model: nn.Module,
    name: str,
    blocks: Sequence[nn.Module],
    sample: Mapping[str | None, Any],
    answer: Callable[[int, Callable[..., Any], _Call], Any],
    *,
    whole: bool = False,
) -> list[_Call]:
    """Run a model up to its last block, or to its end; the calls of its blocks in order."""
    calls: list[_Call] = []

    def answered(i: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if i != len(calls):
            raise ValueError(
                f"blocks must be called once each and in order, {name}.{i} was called as number "
                f"{len(calls)}"
            )
        call = _Call(*tree_flatten((args, kwargs)))
        calls.append(call)
        if i + 1 == len(blocks) and not whole:
            raise _Done
        return answer(i, forward, call)

    positional = [value for key, value in sample.items() if key is None]
    named = {key: value for key, value in sample.items() if key is not None}
    try:
        with torch.no_grad(), _answered_by(blocks, answered):
            model(*positional, **named)
    except _Done:
        pass
    if len(calls) < len(blocks):
        raise ValueError(f"blocks must be called once each, {name}.{len(calls)} was not called")
    return calls


def _real(i: int, forward: Callable[..., Any], call: _Call) -> Any:
    args, kwargs = tree_unflatten(call.leaves, call.spec)
    return forward(*args, **kwargs)


def _first_tensor(leaves: Sequence[Any]) -> int:
    for i, leaf in enumerate(leaves):
        if torch.is_tensor(leaf) and leaf.is_floating_point():
            return i
    raise ValueError("blocks must take and return floating point tensors, got none")


@torch.no_grad()
def learn_structure(
    model: nn.Module, name: str, blocks: Sequence[nn.Module], sample: Mapping[str | None, Any]
) -> Structure:
    """Learn from one sample how a model runs its blocks.

    One block of each class is run; the others hand on what they get.

    Raises
    ------
    ValueError
        If the hidden states do not go from block to block as they are.
    """
    outputs: dict[type, tuple[list[Any], TreeSpec, int]] = {}

    def passing(change: float) -> tuple[list[_Call], list[Tensor]]:
        given: list[Tensor] = []

        def answer(i: int, forward: Callable[..., Any], call: _Call) -> Any:
            kind = type(blocks[i])
            if kind not in outputs:
                leaves, spec = tree_flatten(_real(i, forward, call))
                outputs[kind] = leaves, spec, _first_tensor(leaves)
            leaves, spec, place = outputs[kind]
            answers = [
                leaf * change if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf
                for leaf in leaves
            ]
            given.append(answers[place])
            return tree_unflatten(answers, spec)

        return _run(model, name, blocks, sample, answer, whole=True), given

    first, given = passing(1.0)
    copies = [tensor.clone() for tensor in given]
    hidden = _follow(name, first, given, copies)
    second, _ = passing(0.5)
    dependent = any(
        not _same(a, b)
        for one, other, place in zip(first, second, hidden, strict=True)
        for i, (a, b) in enumerate(zip(one.leaves, other.leaves, strict=True))
        if i != place
    )
    doubled = {key: _twice(value) for key, value in sample.items()}
    pairs = (
        _run(model, name, blocks, doubled, _real)
        if dependent
        else _run(model, name, blocks, doubled, _handing_on(blocks, hidden, outputs))
    )
    axes = tuple(_batch_axes(one, two) for one, two in zip(first, pairs, strict=True))
    for i, (found, place) in enumerate(zip(axes, hidden, strict=True)):
        if found.get(place) != 0:
            raise ValueError(f"batches must run along the first axis of what {name}.{i} takes")
    return Structure(hidden, axes, outputs, dependent)


def _follow(
    name: str, calls: Sequence[_Call], given: Sequence[Tensor], copies: Sequence[Tensor]
) -> tuple[int, ...]:
    """Of each call, the leaf that is what the block before has returned."""
    hidden = []
    for i, call in enumerate(calls[1:]):
        found = [j for j, leaf in enumerate(call.leaves) if leaf is given[i]]
        if not found or not torch.equal(given[i], copies[i]):
            raise ValueError(
                f"blocks must take what the block before returns, unchanged, {name}.{i + 1} takes "
                "something else"
            )
        hidden.append(found[0])
    first = hidden[0] if hidden else _first_tensor(calls[0].leaves)
    for i, tensor in enumerate(given):
        taken = calls[i].leaves[(first, *hidden)[i]]
        if taken.shape != tensor.shape or taken.dtype != tensor.dtype:
            raise ValueError(
                "blocks must return hidden states as they take them, "
                f"{name}.{i} takes {taken.dtype} {tuple(taken.shape)} and returns {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    return (first, *hidden)


def _handing_on(
    blocks: Sequence[nn.Module],
    hidden: Sequence[int],
    outputs: Mapping[type, tuple[list[Any], TreeSpec, int]],
) -> Callable[[int, Callable[..., Any], _Call], Any]:
    def answer(i: int, forward: Callable[..., Any], call: _Call) -> Any:
        leaves, spec, place = outputs[type(blocks[i])]
        answers = list(leaves)
        answers[place] = call.leaves[hidden[i]]
        return tree_unflatten(answers, spec)

    return answer


def _same(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if torch.is_tensor(value) and value.ndim else value


def _batch_axes(one: _Call, two: _Call) -> dict[int, int]:
    axes = {}
    for i, (a, b) in enumerate(zip(one.leaves, two.leaves, strict=True)):
        if torch.is_tensor(a) and a.shape != b.shape:
            axes[i] = next(k for k in range(a.ndim) if a.shape[k] != b.shape[k])
    return axes


class BlockCalls:
    """What every block is called with, sample by sample; equal tensors are kept once.

    Attributes
    ----------
    pool : list of tensors
        On the CPU.
    groups : list of lists of int
        Samples that may be joined in a batch: same shapes, same shared tensors.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.pool: list[Tensor] = []
        self.groups: list[list[int]] = []
        self._digests: dict[str, int] = {}
        self._templates: list[_Template] = []
        self._of: list[list[tuple[int, dict[int, int]]]] = []  # [sample][block]
        self._keys: dict[Any, int] = {}
        self._placed: dict[tuple[int, torch.dtype], Tensor] = {}

    def add(self, calls: Sequence[_Call]) -> None:
        """Take in the calls of one more sample."""
        seen: dict[int, int] = {}
        entry = [self._entry(i, call, seen) for i, call in enumerate(calls)]
        hidden = calls[0].leaves[self.structure.hidden[0]]
        key = (tuple(hidden.shape), tuple(number for number, _ in entry))
        if key not in self._keys:
            self._keys[key] = len(self.groups)
            self.groups.append([])
        self.groups[self._keys[key]].append(len(self._of))
        self._of.append(entry)

    def _entry(self, i: int, call: _Call, seen: dict[int, int]) -> tuple[int, dict[int, int]]:
        own: dict[int, int] = {}
        leaves: list[Any] = []
        for j, leaf in enumerate(call.leaves):
            if j == self.structure.hidden[i]:
                leaves.append(_HIDDEN)
            elif not torch.is_tensor(leaf):
                if hasattr(leaf, "get_seq_length"):
                    raise TypeError(f"model must run without a cache, got {type(leaf)!r}")
                leaves.append(leaf)
            else:
                ref = self._keep(leaf, seen)
                axis = self.structure.axes[i].get(j)
                if axis is None:
                    leaves.append(_Shared(ref))
                else:
                    own[j] = ref
                    leaves.append(_Own(axis, tuple(leaf.shape), leaf.dtype))
        template = _Template(tuple(leaves), call.spec)
        if template not in self._templates:
            self._templates.append(template)
        return self._templates.index(template), own

    def _keep(self, tensor: Tensor, seen: dict[int, int]) -> int:
        """The place of a tensor in the pool, where it may be already."""
        if id(tensor) not in seen:
            plain = tensor.detach().to("cpu", copy=True).contiguous()
            ref = self._digests.setdefault(fingerprint([plain]), len(self.pool))
            if ref == len(self.pool):
                self.pool.append(plain)
            seen[id(tensor)] = ref
        return seen[id(tensor)]

    def arguments(
        self, i: int, samples: Sequence[int], hidden: Tensor, cast: tuple[torch.dtype, torch.dtype]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of block i for a batch of samples of one group.

        Floating tensors of the first dtype of ``cast`` are cast to the second.
        """
        template = self._templates[self._of[samples[0]][i][0]]
        leaves = list(template.leaves)
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, str) and leaf is _HIDDEN:
                leaves[j] = hidden
            elif isinstance(leaf, _Shared):
                leaves[j] = self._on(hidden.device, leaf.ref, cast)
            elif isinstance(leaf, _Own):
                refs = [self._of[s][i][1][j] for s in samples]
                parts = [self._cast(self.pool[ref], cast) for ref in refs]
                joined = torch.cat(parts, dim=leaf.axis) if len(parts) > 1 else parts[0]
                leaves[j] = joined.to(hidden.device, non_blocking=True)
        args, kwargs = tree_unflatten(leaves, template.spec)
        return args, kwargs

    def _on(self, device: torch.device, ref: int, cast: tuple[torch.dtype, torch.dtype]) -> Tensor:
        key = ref, cast[1]
        if key not in self._placed:
            self._placed[key] = self._cast(self.pool[ref], cast).to(device)
        return self._placed[key]

    @staticmethod
    def _cast(tensor: Tensor, cast: tuple[torch.dtype, torch.dtype]) -> Tensor:
        return tensor.to(cast[1]) if tensor.dtype == cast[0] else tensor

    def forget_placed(self) -> None:
        """Drop the copies of shared tensors on the device."""
        self._placed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(tensor.nbytes for tensor in self.pool)


def record(
    model: nn.Module,
    name: str,
    blocks: Sequence[nn.Module],
    samples: Sequence[Mapping[str | None, Any]],
    structure: Structure,
    take: Callable[[int, Tensor], None],
) -> BlockCalls:
    """Record what every block is called with; ``take(i, hidden)`` gets what the first receives."""
    calls = BlockCalls(structure)
    _, _, outputs, dependent = structure
    answer = _real if dependent else _handing_on(blocks, structure.hidden, outputs)
    for i, sample in enumerate(samples):
        found = _run(model, name, blocks, sample, answer)
        calls.add(found)
        take(i, found[0].leaves[structure.hidden[0]])
    return calls
