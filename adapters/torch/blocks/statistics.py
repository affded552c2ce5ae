"""The weights of a block that can be pruned, and statistics of their inputs.

Weights that hidden states are multiplied with can be pruned: those of linear layers, of GPT-2's
`Conv1D`, and stacked experts, which are parameters of three axes. The operations of torch are
recorded below modules and functions, so that any way of writing a product is seen. An expert, a
slice of a stacked parameter, is recognised by its place in memory; the roles of its axes
follow from its use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safe_core._dtypes import wide_dtype
from safe_core.layout import Layout
from safe_core.solvers.gram import positive_squares

from ..weights import prunable_weights
from .processes import Processes

__all__ = [
    "PRODUCTS",
    "InputRecorder",
    "InputStatistics",
    "block_weights",
    "matrix_layout",
    "one_by_one",
]

# Positions of the input and the weight among the arguments, and the axis of the weight that is
# summed over. Linear layers reach the dispatcher as one of the first four, except in inference
# mode.
PRODUCTS: dict[Any, tuple[int, int, int]] = {
    torch.ops.aten.mm: (0, 1, -2),
    torch.ops.aten.bmm: (0, 1, -2),
    torch.ops.aten.addmm: (1, 2, -2),
    torch.ops.aten.baddbmm: (1, 2, -2),
    torch.ops.aten.matmul: (0, 1, -2),
    torch.ops.aten.linear: (0, 1, -1),
}


def block_weights(block: nn.Module) -> dict[str, Layout | None]:
    """Return the names and layouts of the weights of a block that matrix products may use.

    The layout of stacked experts is None: it is known once they are used.

    Examples
    --------
    >>> block_weights(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))
    {'0.weight': Layout(input_axes=(1,), output_axes=(0,), batch_axes=())}
    """
    known = prunable_weights(block)
    convolved = {id(p) for m in block.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
    found: dict[str, Layout | None] = {}
    for name, p in block.named_parameters():
        if id(p) in convolved or not p.is_floating_point():
            continue
        if p in known:
            found[name] = known[p]
        elif p.ndim == 3:
            found[name] = None
    return found


class InputStatistics(NamedTuple):
    """Statistics of the inputs of one weight.

    Attributes
    ----------
    layout : Layout
        Roles of the weight's axes, as it was used.
    tokens : int64 tensor, shape (experts,)
        Number of inputs, on the CPU; one entry for a weight that is not stacked.
    sums : tensor, shape (experts, inputs), or (experts, inputs, inputs), or None
        The sum of squares of each input feature, or the Gram matrix ``X^T X``, in float32 or
        wider.
    """

    layout: Layout
    tokens: Tensor
    sums: Tensor | None

    def importance(self, shape: tuple[int, ...]) -> Tensor:
        """Return the mean square of each input feature, with the axes of the weight.

        Features that are never active get a tiny positive value, so that their entries rank by
        magnitude among each other. So do all entries of an expert without tokens.
        """
        assert self.sums is not None  # recorded as "squares" or "gram"
        squares = self.sums.diagonal(dim1=-2, dim2=-1) if self.sums.ndim == 3 else self.sums
        tokens = self.tokens.clamp(min=1).to(squares.device)
        filled: Tensor = positive_squares(squares / tokens[:, None])
        axes = (*self.layout.batch_axes, *self.layout.input_axes)
        return filled.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])


class InputRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the inputs of a block's weights in this context: their squares or Gram matrices.

    Parameters
    ----------
    block : torch.nn.Module
        It must not use grouped kernels for its experts, see `one_by_one`.
    weights : mapping of name to Layout or None
        From `block_weights`.
    kind : {"nothing", "tokens", "squares", "gram"}
        What to sum: nothing, with or without a check that a matrix product uses each weight, or
        squares of inputs, or Gram matrices.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with InputRecorder(layer, block_weights(layer), "gram") as seen, torch.no_grad():
    ...     _ = layer(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> seen.statistics()["weight"].sums
    tensor([[[1., 2.],
             [2., 5.]]])
    """

    def __init__(
        self,
        block: nn.Module,
        weights: Mapping[str, Layout | None],
        kind: Literal["nothing", "tokens", "squares", "gram"],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = kind
        self._layouts = dict(weights)
        self._params = {name: p for name, p in block.named_parameters() if name in weights}
        # By the storage itself, because tensors without memory have no address.
        self._by_memory = {p.untyped_storage()._cdata: n for n, p in self._params.items()}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._used: set[str] = set()
        self._fast: list[bool] = []

    def __enter__(self) -> InputRecorder:
        """Start recording, without fused attention kernels, whose products would be missed."""
        self._fast.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def begin(self) -> list[Tensor]:
        """Allocate the sums of weights of known layout now, and return them."""
        for name, layout in self._layouts.items():
            if layout is not None:
                self._begin(name, 1, self._params[name].shape[layout.input_axes[0]])
        return list(self._sums.values())

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast.pop())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record its inputs if it uses one of the weights."""
        result = func(*args, **(kwargs or {}))
        places = PRODUCTS.get(func.overloadpacket)
        if places is not None:
            x, w = args[places[0]], args[places[1]]
            right, left = self._name_of(w), self._name_of(x)
            if right is not None:
                self._see(right, x.detach(), w, places[2])
            elif left is not None and places[2] == -2:  # a weight times a column
                self._see(left, w.detach().transpose(-1, -2), x, -1)
        taken = self._names_in((args, kwargs))
        if taken:  # by more than a view
            self._used |= taken - self._names_in(result)
        return result

    def _names_in(self, tree: Any) -> set[str]:
        names = (self._name_of(leaf) for leaf in tree_leaves(tree))
        return {name for name in names if name is not None}

    def _name_of(self, leaf: Any) -> str | None:
        if not torch.is_tensor(leaf) or leaf.layout != torch.strided:
            return None
        return self._by_memory.get(leaf.untyped_storage()._cdata)

    def _see(self, name: str, x: Tensor, w: Tensor, summed: int) -> None:
        """Record the inputs of one product with a weight, or a slice or transpose of it."""
        p = self._params[name]
        stride = w.stride(summed)
        axis = next(
            (a for a in range(max(0, p.ndim - 2), p.ndim)
             if p.stride(a) == stride and p.shape[a] == w.shape[summed]),
            None,
        )  # fmt: skip
        if axis is None:
            return
        stacked = p.ndim == 3
        if stacked and p.stride(0) < max(p.stride()):
            return  # experts are not contiguous in memory
        if self._layouts[name] is None:
            other = ({1, 2} - {axis}).pop()
            self._layouts[name] = Layout((axis,), (other,), (0,))
        n, experts = p.shape[axis], p.shape[0] if stacked else 1
        if name not in self._tokens:
            self._begin(name, experts, n)
        if not stacked:
            self._add(name, 0, x.reshape(-1, n))
            return
        first = (w.storage_offset() - p.storage_offset()) // p.stride(0)
        if w.ndim == 3 and w.stride(0) == p.stride(0):  # each expert has its own inputs
            if x.ndim > 2 and x.shape[0] not in (1, len(w)):
                raise ValueError(
                    f"blocks must multiply {name} {tuple(p.shape)} with inputs for each of its "
                    f"experts or for all of them, got inputs {tuple(x.shape)} for {len(w)} experts"
                )
            for e, part in enumerate(x.expand(len(w), -1, -1) if x.ndim <= 3 else x):
                self._add(name, first + e, part.reshape(-1, n))
        else:  # all share their inputs
            reach = sum((size - 1) * step for size, step in zip(w.shape, w.stride(), strict=True))
            for e in range(first, first + reach // p.stride(0) + 1):
                self._add(name, e, x.reshape(-1, n))

    def _begin(self, name: str, experts: int, n: int) -> None:
        """Allocate the sums over n inputs of a weight."""
        self._tokens[name] = torch.zeros(experts, dtype=torch.int64)
        if self._kind in ("squares", "gram"):
            shape = (experts, n, n) if self._kind == "gram" else (experts, n)
            p = self._params[name]
            dtype = wide_dtype(torch, [p])
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=p.device)

    def _add(self, name: str, expert: int, x: Tensor) -> None:
        self._tokens[name][expert] += len(x)
        if self._kind not in ("squares", "gram"):
            return
        wide = x.to(self._sums[name].dtype)
        if self._kind == "gram":
            self._sums[name][expert].addmm_(wide.T, wide)
        else:
            self._sums[name][expert] += wide.square().sum(dim=0)

    def sum_over(self, processes: Processes) -> None:
        """Add what the other processes have recorded of the same block."""
        mine = {name: (self._layouts[name], found) for name, found in self._tokens.items()}
        for rank, (seen, used) in enumerate(processes.gather((mine, self._used))):
            if rank == processes.rank:
                continue
            self._used = self._used | used
            for name, (layout, tokens) in seen.items():
                if name not in self._tokens:
                    self._layouts[name] = layout
                    self._begin(name, len(tokens), self._params[name].shape[layout.input_axes[0]])
                self._tokens[name] = self._tokens[name] + tokens
        processes.sum_([self._sums[name] for name in self._params if name in self._sums])

    def statistics(self) -> dict[str, InputStatistics]:
        """Return the statistics by name of the weight.

        A linear layer that was not run has seen no tokens. Weights whose inputs are not known
        are left out: those that only other operations than matrix products used, and parameters
        of three axes that no product used.
        """
        found = {}
        for name, p in self._params.items():
            layout = self._layouts[name]
            seen = name in self._tokens
            if layout is None or (not seen and name in self._used and self._kind != "nothing"):
                continue
            if not seen:
                self._begin(name, 1, p.shape[layout.input_axes[0]])
            found[name] = InputStatistics(layout, self._tokens[name], self._sums.get(name))
        return found


def one_by_one(block: nn.Module) -> None:
    """Let the experts of a block run one after the other, as separate products."""
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation_internal", None) is not None:
            config._experts_implementation_internal = "eager"


def matrix_layout(layout: Layout) -> Layout:
    """Return the layout of one matrix of a weight, which may be a stack.

    Examples
    --------
    >>> matrix_layout(Layout((2,), (1,), (0,)))
    Layout(input_axes=(1,), output_axes=(0,), batch_axes=())
    """
    if not layout.batch_axes:
        return layout
    return Layout(tuple(a - 1 for a in layout.input_axes), tuple(a - 1 for a in layout.output_axes))
