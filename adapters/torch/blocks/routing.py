"""Find the linear layers whose outputs choose experts, or weigh them.

Pruning a router changes which expert a token goes to, so routers and gates stay dense. Their
names and classes differ from model to model. What they have in common is what their outputs
feed, so the operations of torch are followed from each product with a weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .statistics import PRODUCTS
from .structure import Call, call_forward

__all__ = ["choosing_weights"]

_aten = torch.ops.aten
# Operations that choose among the entries of a tensor, along any axis of it.
_CHOICES = {_aten.topk, _aten.sort, _aten.argsort, _aten.kthvalue}
# Reductions choose an output only along the last axis; along others they pool tokens.
_REDUCTIONS = {_aten.max, _aten.argmax}


class _ChoiceRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which weights of a block have outputs that choose, or weigh whole vectors.

    The outputs of a product are followed through views and pointwise operations, until
    another product or a reduction consumes them.
    """

    def __init__(self, block: nn.Module, names: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        # Casts of a weight are followed as well: routers often compute in float32.
        self._weights: Any = WeakIdKeyDictionary()
        self._outputs: Any = WeakIdKeyDictionary()  # tensor to {name: (tokens, outputs)}
        self._by_memory = {
            p.untyped_storage().data_ptr(): n for n, p in block.named_parameters() if n in names
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and follow the outputs of weights through it."""
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in PRODUCTS:
            self._see_product(result, *(args[i] for i in PRODUCTS[packet][:2]))
            return result
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        made = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        if len(given) == 1 and len(made) == 1 and self._name_of(given[0]) is not None:
            self._weights[made[0]] = self._name_of(given[0])
            return result
        carried = {n: v for x in given for n, v in self._outputs.get(x, {}).items()}
        if not carried:
            return result
        if _chooses(packet, args, kwargs or {}) and args[0] in self._outputs:
            self.found |= set(self._outputs[args[0]])
        elif packet is _aten._softmax:
            self.found |= {
                name
                for name, (_, outputs) in carried.items()
                if args[0].shape[args[1]] == outputs > 1
            }
        elif torch.Tag.pointwise in func.tags or _is_view(made, given):
            if packet in (_aten.mul, _aten.mul_):
                self._see_weighing(given, made)
            for x in made:
                self._outputs[x] = carried
        return result

    def _name_of(self, x: Any) -> str | None:
        if not torch.is_tensor(x) or x.layout != torch.strided:
            return None
        found = self._by_memory.get(x.untyped_storage().data_ptr())
        return found if found is not None else self._weights.get(x)

    def _see_product(self, result: Any, x: Any, w: Any) -> None:
        name = self._name_of(w) or self._name_of(x)
        if name is not None and torch.is_tensor(result):
            outputs = result.shape[-1] if result.ndim else 1
            self._outputs[result] = {name: (result.numel() // max(1, outputs), outputs)}

    def _see_weighing(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Find factors with one entry per token that multiply a vector of each token."""
        for x in given:
            if x.ndim and x.shape[-1] == 1 and made[0].shape[-1] > 1:
                held = self._outputs.get(x, {}).items()
                self.found |= {name for name, (tokens, _) in held if x.numel() == tokens}


def _chooses(packet: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if packet in _CHOICES:
        return True
    if packet not in _REDUCTIONS:
        return False
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    return isinstance(axis, int) and axis % max(1, args[0].ndim) == args[0].ndim - 1


def _is_view(made: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    places = {x.untyped_storage().data_ptr() for x in given}
    return bool(made) and all(x.untyped_storage().data_ptr() in places for x in made)


def _distinct(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Yield the positions of blocks that are built alike: same modules and shapes."""
    alike: dict[Any, list[int]] = {}
    for i, block in enumerate(blocks):
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        alike.setdefault((modules, shapes), []).append(i)
    yield from alike.values()


@torch.no_grad()
def choosing_weights(
    blocks: Sequence[nn.Module], names: Sequence[Collection[str]], calls: Sequence[Call]
) -> list[set[str]]:
    """Return, for each block, the weights whose outputs choose experts or weigh them.

    Parameters
    ----------
    blocks : sequence of torch.nn.Module
    names : sequence of collections of str
        The weights of each block to follow, by their names in the block.
    calls : sequence of Call
        The arguments of each block for one sample. One block of each kind is run.

    Notes
    -----
    A weight chooses if its outputs reach ``topk``, ``sort``, ``argmax`` or the like, or a
    softmax over all of them, before any other product. It weighs if one output per token
    multiplies a whole vector.
    """
    found: list[set[str]] = [set() for _ in blocks]
    for members in _distinct(blocks):
        i = members[0]
        if not names[i]:
            continue
        with _ChoiceRecorder(blocks[i], names[i]) as seen:
            call_forward(i, blocks[i].forward, calls[i])
        for j in members:
            found[j] = seen.found & set(names[j])
    return found
