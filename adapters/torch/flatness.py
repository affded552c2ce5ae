"""Measure how flat the loss of a module, or of a function of tensors, is in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from safe_core.backends.torch_sharding import is_sharded
from safe_core.flatness import LossSurface
from safe_core.layout import Layout, chosen_layout

from .modules import RandomState, forget_copies, statistics_kept
from .weights import prunable_weights

__all__ = ["loss_surface"]


def loss_surface(
    loss: Callable[..., Tensor],
    params: nn.Module | Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    support: Mapping[str, Tensor] | str | None = None,
    layout: Any = None,
    model: nn.Module | None = None,
) -> LossSurface:
    """Bind a loss to its parameters and batches, to measure how flat it is around them.

    A Hessian-vector product takes two backward passes. Measuring changes nothing: parameters
    are restored bit for bit, ``grad`` is not touched, running statistics stay fixed, and the
    state of the random number generators is restored. Every evaluation draws the same random
    numbers, such as dropout masks. Batch normalisation follows the mode of the model: in
    training mode it uses the statistics of the batch, which are then part of the loss.
    Attention uses its math kernel, the only one that can be differentiated twice.

    Parameters
    ----------
    loss : callable
        ``loss(batch)`` for a module, or ``loss(params, batch)`` for a mapping, for example by
        `torch.func.functional_call`. It returns a scalar, the mean over the batch.
    params : torch.nn.Module, or mapping of str to tensor
        A module varies in its parameters that require gradients, at their values when
        something is measured. A mapping varies in its floating tensors and is not written to.
    batches : iterable
        Arguments of ``loss``. All are kept in memory, and each has the same weight.
    support : "nonzero" or mapping of str to bool tensor, optional
        Entries that may vary, by parameter name. "nonzero" selects the non-zero entries of
        the weights of linear, convolution, attention and recurrent layers. Others vary freely.
    layout : Layout, mapping of name to Layout, or callable, optional
        Axis roles, as for `SparseOptimizer`. Landscapes use them.
    model : torch.nn.Module, optional
        The module that uses a mapping of parameters, to find its layers.

    Returns
    -------
    safe_core.flatness.LossSurface

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or parameters are complex, sharded or missing.

    Examples
    --------
    >>> model, batch = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> surface = loss_surface(lambda x: model(x).square().sum(), model, [batch])
    >>> round(surface.eigenvalues().values[0], 4)
    18.0
    >>> found = surface.landscape(directions=2, points=5)
    >>> found.values.shape
    (5, 5)
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function, got {loss!r}")
    if isinstance(params, nn.Module):
        named: dict[str, Tensor] = {k: p for k, p in params.named_parameters() if p.requires_grad}
        bound: _OfModule | _OfMapping = _OfModule(loss, params, named)
        model = params
    elif isinstance(params, Mapping):
        named = {k: p for k, p in params.items() if isinstance(p, Tensor) and _is_variable(p)}
        bound = _OfMapping(loss, params, named)
    else:
        raise TypeError(f"params must be a torch.nn.Module or a mapping, got {type(params)!r}")
    _check_parameters(named)
    held = list(batches)
    if not held:
        raise ValueError("batches must hold at least one, got none")
    return LossSurface(_Loss(bound, model, held, support, layout))


class _OfModule:
    """A loss of a module, whose parameters are moved in-place."""

    def __init__(
        self, loss: Callable[..., Tensor], module: nn.Module, named: Mapping[str, Tensor]
    ) -> None:
        self.loss, self.module, self.named = loss, module, named

    @contextmanager
    def at(self, arrays: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Move the parameters to ``arrays`` within the block, and restore them on exit."""
        params = list(self.named.values())
        with torch.no_grad():
            before = [p.clone() for p in params]
        try:
            self._move(params, arrays)
            yield params
        finally:
            self._move(params, before)

    def _move(self, params: Sequence[Tensor], arrays: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, x in zip(params, arrays, strict=True):
                p.copy_(x)
        forget_copies(self.module)

    def variables(self) -> list[Tensor]:
        """Return the tensors to differentiate with respect to, at the current parameters."""
        return list(self.named.values())

    def __call__(self, variables: Sequence[Tensor], batch: Any) -> Tensor:
        return self.loss(batch)


class _OfMapping:
    """A loss that takes its parameters as an argument."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        params: Mapping[str, Any],
        named: Mapping[str, Tensor],
    ) -> None:
        self.loss, self.params, self.named = loss, params, named

    @contextmanager
    def at(self, arrays: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        yield [x.detach().requires_grad_() for x in arrays]

    def variables(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.named.values()]

    def __call__(self, variables: Sequence[Tensor], batch: Any) -> Tensor:
        changed = dict(zip(self.named, variables, strict=True))
        return self.loss({**self.params, **changed}, batch)


class _Loss:
    """Implement `safe_core.flatness.Loss` in PyTorch."""

    def __init__(
        self,
        bound: _OfModule | _OfMapping,
        model: nn.Module | None,
        held: list[Any],
        support: Any,
        layout: Any,
    ) -> None:
        self._bound, self._model, self._held = bound, model, held
        self._support, self._layout = support, layout
        # One state for all evaluations: differences of losses must not show new dropout masks.
        self._random = RandomState.record()
        self.support()  # raise for a bad argument now, not at the first measurement

    @property
    def batches(self) -> int:
        return len(self._held)

    def arrays(self) -> list[Tensor]:
        return [p.detach() for p in self._bound.named.values()]

    def support(self) -> list[Tensor | None] | None:
        named, given = self._bound.named, self._support
        if given is None:
            return None
        if given == "nonzero":
            weights = self._weights()
            if not weights:
                raise ValueError(
                    "support must be a mapping if there is no model to find the weights of, "
                    "got 'nonzero'"
                )
            return [p.detach() != 0 if name in weights else None for name, p in named.items()]
        if not isinstance(given, Mapping):
            raise TypeError(f"support must be 'nonzero', a mapping or None, got {given!r}")
        strange = sorted(set(given) - set(named))
        if strange:
            raise ValueError(
                f"support must name parameters, {', '.join(named)}, got {strange[0]!r}"
            )
        return [given.get(name) for name in named]

    def layouts(self) -> list[Layout | None]:
        weights = self._weights()
        found = []
        for name, p in self._bound.named.items():
            found.append(chosen_layout(name, p, self._layout, weights.get(name)))
            if found[-1] is None and name in weights:
                raise ValueError(f"layout of {name} is unknown: pass layout=, got None")
        return found

    def value(self, arrays: Sequence[Tensor]) -> float:
        with self._bound.at(arrays) as variables, torch.no_grad():
            losses = [self._loss(variables, batch) for batch in self._held]
        return sum(map(float, losses)) / len(losses)

    def value_and_gradient(
        self, arrays: Sequence[Tensor], batch: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        with self._bound.at(arrays) as variables:
            return self._gradient(variables, self._held[batch])

    def hessian_product(
        self, batch: int | None = None
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        variables = self._bound.variables()
        held = self._held if batch is None else [self._held[batch]]
        # Keep the graph of a single batch between products. The graphs of several batches
        # would not fit in memory together, so each product builds them again.
        kept = self._gradient(variables, held[0], graph=True)[1] if len(held) == 1 else None

        def product(vectors: Sequence[Tensor]) -> list[Tensor]:
            total = [torch.zeros_like(v) for v in vectors]
            for one in held:
                first = kept or self._gradient(variables, one, graph=True)[1]
                second = _along(first, variables, vectors, keep=kept is not None)
                total = [a + b for a, b in zip(total, second, strict=True)]
            return [a / len(held) for a in total]

        return product

    def listed(self, structure: Any) -> list[Tensor]:
        named = self._bound.named
        if not isinstance(structure, Mapping) or set(structure) != set(named):
            raise ValueError(
                f"direction must be a mapping with a tensor for each of {', '.join(named)}, got "
                f"{', '.join(structure) if isinstance(structure, Mapping) else type(structure)!r}"
            )
        return [structure[name] for name in named]

    def structured(self, arrays: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._bound.named, arrays, strict=True))

    def _weights(self) -> dict[str, Layout | None]:
        """Return the layouts of the model's prunable weights by name."""
        if self._model is None:
            return {}
        layouts = prunable_weights(self._model)
        named = self._model.named_parameters(remove_duplicate=False)
        return {k: layouts[p] for k, p in named if isinstance(p, nn.Parameter) and p in layouts}

    def _loss(self, variables: Sequence[Tensor], batch: Any) -> Tensor:
        with (
            statistics_kept(self._model),
            RandomState.replayed(self._random),
            sdpa_kernel(SDPBackend.MATH),
        ):
            value = self._bound(variables, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"loss must return a tensor of one entry, got {found}")
        return value

    def _gradient(
        self, variables: Sequence[Tensor], batch: Any, *, graph: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            value = self._loss(variables, batch)
            if not value.requires_grad:
                raise ValueError(
                    "loss must depend on the parameters by differentiable operations, got a value "
                    "that does not require a gradient"
                )
            gradient = torch.autograd.grad(
                value, variables, create_graph=graph, materialize_grads=True
            )
        return value.detach(), gradient


def _along(
    gradient: Sequence[Tensor],
    variables: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    keep: bool,
) -> list[Tensor]:
    """Return the derivative of a gradient with a graph along vectors, in their dtypes."""
    curved = [(g, v.to(g.dtype)) for g, v in zip(gradient, vectors, strict=True) if g.requires_grad]
    if not curved:  # the loss is linear
        return [torch.zeros_like(v) for v in vectors]
    found = torch.autograd.grad(
        [g for g, _ in curved],
        variables,
        [v for _, v in curved],
        retain_graph=keep,
        materialize_grads=True,
    )
    return [h.to(v.dtype) for h, v in zip(found, vectors, strict=True)]


def _is_variable(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def _check_parameters(named: Mapping[str, Tensor]) -> None:
    if not named:
        raise ValueError("params must hold a floating tensor that is trained, got none")
    for name, p in named.items():
        if not p.is_floating_point():
            raise TypeError(f"{name} must be real floating, got dtype {p.dtype}")
        if is_sharded(p):
            raise TypeError(f"{name} must be a whole tensor on one device, got a DTensor")
