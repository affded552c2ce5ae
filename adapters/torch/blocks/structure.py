"""The repeated blocks of a model, and how the model calls each of them.

The blocks are the `torch.nn.ModuleList` with the most parameters. The other arguments of each
block besides the hidden states (rotary embeddings, masks, positions) are recorded by running the
model with the blocks replaced by functions that return their hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = [
    "Call",
    "NoChainError",
    "Structure",
    "block_kind",
    "block_name",
    "call_forward",
    "check_alike",
    "find_blocks",
    "learn_structure",
    "naming_other_blocks",
    "ordinary_mode",
    "other_blocks",
    "return_inputs",
    "run_around_blocks",
]


class _Done(BaseException):
    """Raised when the last block is called, to stop the forward pass of the model there."""


class NoChainError(ValueError):
    """The blocks do not form a chain: one does not take what the block before it returns."""


class Call(NamedTuple):
    """The flattened arguments of one call."""

    leaves: list[Any]
    spec: TreeSpec


Output = tuple[list[Any], TreeSpec, int]


class Structure(NamedTuple):
    """Describe the calls of blocks in a model.

    Attributes
    ----------
    hidden : tuple of int
        For each block, the index of the hidden states among the leaves of its arguments.
    axes : tuple of mappings of leaf to axis
        For each block, the leaves that have a batch axis, and that axis.
    outputs : tuple of (leaves, TreeSpec, int)
        For each block, the recorded outputs of it or of a block with the same modules and shapes,
        and the index of the hidden states among them.
    dependent : bool
        Whether other arguments depend on the outputs of blocks, so that blocks must be run.
    """

    hidden: tuple[int, ...]
    axes: tuple[Mapping[int, int], ...]
    outputs: tuple[Output, ...]
    dependent: bool

    def output(self, i: int, returned: Any) -> Tensor:
        """Return the hidden states among the outputs of block i."""
        leaves, _ = tree_flatten(returned)
        found: Tensor = leaves[self.outputs[i][2]]
        return found


def block_name(name: str, i: int) -> str:
    """Return the name of block i in a list of blocks, which may be the model itself.

    Examples
    --------
    >>> block_name("model.layers", 3), block_name("", 3)
    ('model.layers.3', '3')
    """
    return f"{name}.{i}" if name else str(i)


def find_blocks(model: nn.Module, blocks: Any = None) -> tuple[str, list[nn.Module]]:
    """Return the name and the modules of the repeated blocks of a model.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : str or torch.nn.Module, optional
        A `ModuleList` of the model or its name, such as ``"encoder.block"``. By default the one
        with the most parameters.

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
                    f"blocks must not share parameters, {block_name(name, owners[id(p)])} and "
                    f"{block_name(name, i)} do"
                )
    return name, modules


def other_blocks(model: nn.Module, chosen: str) -> str:
    """Return the end of a message that names the lists of blocks besides the chosen one.

    The longest lists come first. Without another list, the text is empty.

    Examples
    --------
    >>> lists = {name: nn.ModuleList([nn.Linear(2, 2)]) for name in ("encoder", "decoder")}
    >>> other_blocks(nn.ModuleDict(lists), "encoder")
    '; choose other blocks with blocks=, such as decoder'
    """
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and m}
    lists.pop(chosen, None)
    names = sorted(lists, key=lambda name: -lists[name])[:8]
    return f"; choose other blocks with blocks=, such as {', '.join(names)}" if names else ""


@contextmanager
def naming_other_blocks(model: nn.Module, chosen: str) -> Iterator[None]:
    """Add the model's class and its other lists of blocks to the message of a `NoChainError`."""
    try:
        yield
    except NoChainError as error:
        text = f"{error}, in {type(model).__name__}{other_blocks(model, chosen)}"
        raise NoChainError(text) from None


@contextmanager
def ordinary_mode(device: torch.device) -> Iterator[None]:
    """Compute with gradients and in the dtypes of the tensors, whatever modes the caller set.

    Under autocast the products use casts of the weights, and under `torch.inference_mode`
    nothing can be trained.
    """
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _replaced_forward(
    blocks: Sequence[nn.Module], answer: Callable[[int, Callable[..., Any], Any, Any], Any]
) -> Iterator[None]:
    """Replace the forward pass of block i by ``answer(i, forward, args, kwargs)``."""
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


def run_around_blocks(
    model: nn.Module,
    name: str,
    blocks: Sequence[nn.Module],
    sample: Mapping[str | None, Any],
    answer: Callable[[int, Callable[..., Any], Call], Any],
    *,
    whole: bool = False,
) -> list[Call]:
    """Run a model up to its last block, or to its end, and return the calls of its blocks."""
    calls: list[Call] = []

    def answered(i: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if i != len(calls):
            raise NoChainError(
                f"blocks must be called once each and in order, {block_name(name, i)} was called "
                f"as number {len(calls)}"
            )
        call = Call(*tree_flatten((args, kwargs)))
        calls.append(call)
        if i + 1 == len(blocks) and not whole:
            raise _Done
        return answer(i, forward, call)

    positional = [value for key, value in sample.items() if key is None]
    named = {key: value for key, value in sample.items() if key is not None}
    try:
        with torch.no_grad(), _replaced_forward(blocks, answered):
            model(*positional, **named)
    except _Done:
        pass
    if len(calls) < len(blocks):
        raise NoChainError(
            f"blocks must be called once each, {block_name(name, len(calls))} was not called"
        )
    return calls


def call_forward(i: int, forward: Callable[..., Any], call: Call) -> Any:
    """Run the forward pass of a block with recorded arguments."""
    args, kwargs = tree_unflatten(call.leaves, call.spec)
    return forward(*args, **kwargs)


def block_kind(block: nn.Module) -> Any:
    """Return a key that blocks with the same modules and shapes of parameters share."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())


def _first_tensor(leaves: Sequence[Any]) -> int:
    for i, leaf in enumerate(leaves):
        if torch.is_tensor(leaf) and leaf.is_floating_point():
            return i
    raise NoChainError("blocks must take and return floating point tensors, got none")


@torch.no_grad()
def learn_structure(
    model: nn.Module, name: str, blocks: Sequence[nn.Module], sample: Mapping[str | None, Any]
) -> tuple[Structure, list[Call]]:
    """Find out from one sample how a model calls its blocks, and return the calls too.

    Only one of several blocks with the same modules and shapes of parameters is run. The others
    return its outputs.

    Raises
    ------
    NoChainError
        If hidden states do not go unchanged from block to block.
    """
    with naming_other_blocks(model, name):
        return _learned(model, name, blocks, sample)


def _learned(
    model: nn.Module, name: str, blocks: Sequence[nn.Module], sample: Mapping[str | None, Any]
) -> tuple[Structure, list[Call]]:
    kinds = [block_kind(block) for block in blocks]
    known: dict[Any, Output] = {}

    def passing(change: float) -> tuple[list[Call], list[Tensor]]:
        given: list[Tensor] = []

        def answer(i: int, forward: Callable[..., Any], call: Call) -> Any:
            if kinds[i] not in known:
                leaves, spec = tree_flatten(call_forward(i, forward, call))
                known[kinds[i]] = leaves, spec, _first_tensor(leaves)
            leaves, spec, place = known[kinds[i]]
            answers = [
                leaf * change if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf
                for leaf in leaves
            ]
            given.append(answers[place])
            return tree_unflatten(answers, spec)

        return run_around_blocks(model, name, blocks, sample, answer, whole=True), given

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
    outputs = tuple(known[kind] for kind in kinds)
    doubled = {key: _twice(value) for key, value in sample.items()}
    pairs = (
        run_around_blocks(model, name, blocks, doubled, call_forward)
        if dependent
        else run_around_blocks(model, name, blocks, doubled, return_inputs(hidden, outputs))
    )
    axes = tuple(_batch_axes(one, two) for one, two in zip(first, pairs, strict=True))
    for i, (found, place) in enumerate(zip(axes, hidden, strict=True)):
        if found.get(place) != 0:
            raise NoChainError(
                f"batches must run along the first axis of what {block_name(name, i)} takes"
            )
    return Structure(hidden, axes, outputs, dependent), first


def _follow(
    name: str, calls: Sequence[Call], given: Sequence[Tensor], copies: Sequence[Tensor]
) -> tuple[int, ...]:
    """Return, for each call, the index of the leaf that the block before returned."""
    hidden = []
    for i, call in enumerate(calls[1:]):
        found = [j for j, leaf in enumerate(call.leaves) if leaf is given[i]]
        if not found or not torch.equal(given[i], copies[i]):
            if found and bool(given[i].isnan().any()):  # NaN does not equal itself
                raise ValueError(
                    "hidden states must not be NaN, got NaN in the inputs or outputs of "
                    f"{block_name(name, i)}"
                )
            raise NoChainError(
                f"blocks must take what the block before returns, unchanged, "
                f"{block_name(name, i + 1)} takes something else"
            )
        hidden.append(found[0])
    first = hidden[0] if hidden else _first_tensor(calls[0].leaves)
    for i, tensor in enumerate(given):
        taken = calls[i].leaves[(first, *hidden)[i]]
        check_alike(block_name(name, i), taken, tensor)
    return (first, *hidden)


def check_alike(name: str, taken: Tensor, returned: Tensor) -> None:
    """Raise if a block returns hidden states of another shape or dtype than it takes."""
    if taken.shape != returned.shape or taken.dtype != returned.dtype:
        raise NoChainError(
            "blocks must return hidden states of the shape and dtype that they take, but "
            f"{name} takes {taken.dtype} {tuple(taken.shape)} and returns {returned.dtype} "
            f"{tuple(returned.shape)}"
        )


def return_inputs(
    hidden: Sequence[int], outputs: Sequence[Output]
) -> Callable[[int, Callable[..., Any], Call], Any]:
    """Return a stand-in for forward passes that returns the hidden states unchanged."""

    def answer(i: int, forward: Callable[..., Any], call: Call) -> Any:
        leaves, spec, place = outputs[i]
        answers = list(leaves)
        answers[place] = call.leaves[hidden[i]]
        return tree_unflatten(answers, spec)

    return answer


def _same(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))


def _twice(value: Any) -> Any:
    """Return an argument for two samples; a tensor without one row per sample is shared."""
    own = torch.is_tensor(value) and value.ndim and len(value) == 1
    return torch.cat([value, value]) if own else value


def _batch_axes(one: Call, two: Call) -> dict[int, int]:
    axes = {}
    for i, (a, b) in enumerate(zip(one.leaves, two.leaves, strict=True)):
        if torch.is_tensor(a) and a.shape != b.shape:
            axes[i] = next(k for k in range(a.ndim) if a.shape[k] != b.shape[k])
    return axes
