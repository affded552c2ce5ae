"""Measure how flat a loss is around a pytree of parameters in JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_core import _checks
from safe_core.flatness import LossSurface
from safe_core.layout import Layout, chosen_layout

from .leaves import flag_of
from .tree import NamedLeaves, is_function, is_masked, layout_by_path, leaves_like
from .weights import is_prunable, known_layouts

__all__ = ["loss_surface"]

PyTree = Any


def loss_surface(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    *,
    support: PyTree | str | None = None,
    layout: Any = None,
    trainable: Any = None,
) -> LossSurface:
    """Bind a loss to its parameters and batches, to measure how flat it is around them.

    A Hessian-vector product is the forward-mode derivative of the gradient,
    ``jvp(grad(loss))``. Each batch shape compiles one program.

    Parameters
    ----------
    loss : callable
        ``loss(params, batch)`` returns a scalar, the mean over the batch. It must be a pure
        function of the two: put statistics of batch normalisation and dropout keys into the
        batch, or fix them.
    params : pytree
        Floating leaves vary. Other leaves are passed to ``loss`` unchanged.
    batches : iterable of pytrees
        Arguments of ``loss``. All are kept in memory, and each has the same weight.
    support : "nonzero" or pytree, optional
        Entries that may vary: a pytree like ``params`` with a bool array for each leaf, or
        None or `optax.MaskedNode` for a leaf that varies freely. "nonzero" selects the
        non-zero entries of the weights of Flax, Haiku and Equinox layers.
    layout : Layout, mapping of path to Layout, or callable, optional
        Axis roles, as for `sparse_optimizer`. Landscapes use them.
    trainable : callable or pytree of bool, optional
        Floating leaves that vary: a function of path and leaf, or flags.

    Returns
    -------
    safe_core.flatness.LossSurface

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, a variable is complex, or no leaf varies.

    Examples
    --------
    >>> def loss(params, batch):
    ...     return jnp.sum((batch @ params["kernel"]) ** 2)
    >>> params, batch = {"kernel": jnp.ones((2, 1))}, jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
    >>> surface = loss_surface(loss, params, [batch])
    >>> round(surface.eigenvalues().values[0], 4)
    18.0
    >>> surface.landscape(directions=2, points=5).values.shape
    (5, 5)
    """
    if not is_function(loss):
        raise TypeError(f"loss must be a function, got {loss!r}")
    held = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    if not held:
        raise ValueError("batches must hold at least one, got none")
    return LossSurface(_Loss(loss, params, held, support, layout, trainable))


class _Loss:
    """Implement `safe_core.flatness.Loss` in JAX."""

    def __init__(
        self,
        loss: Callable[[PyTree, Any], jax.Array],
        params: PyTree,
        held: list[Any],
        support: Any,
        layout: Any,
        trainable: Any,
    ) -> None:
        self._treedef, self._named, self._owners = NamedLeaves.of(params)
        self._held, self._layout = held, layout
        self._known = known_layouts(self._named, self._owners, params)
        self._indices = self._variables(trainable)
        self._support = self._read_support(support)
        # Pass other arrays as arguments, since constants would be copied into each program.
        self._fixed = {
            i: leaf
            for i, (_, leaf) in enumerate(self._named)
            if i not in self._indices and isinstance(leaf, (jax.Array, np.ndarray))
        }

        def value(arrays: list[Any], fixed: dict[int, Any], batch: Any) -> jax.Array:
            leaves = [leaf for _, leaf in self._named]
            for i, leaf in (*fixed.items(), *zip(self._indices, arrays, strict=True)):
                leaves[i] = leaf
            found = loss(self._treedef.unflatten(leaves), batch)
            if jnp.shape(found) != () or not jnp.issubdtype(jnp.result_type(found), jnp.floating):
                raise ValueError(
                    "loss must return a real floating scalar, got "
                    f"{jnp.result_type(found)} of shape {jnp.shape(found)}"
                )
            return found

        def product(
            arrays: list[Any], vectors: list[Any], fixed: dict[int, Any], batch: Any
        ) -> list[jax.Array]:
            def gradient(arrays: list[Any]) -> list[Any]:
                return jax.grad(value)(arrays, fixed, batch)

            narrow = [v.astype(x.dtype) for v, x in zip(vectors, arrays, strict=True)]
            found = jax.jvp(gradient, (arrays,), (narrow,))[1]
            return [h.astype(v.dtype) for h, v in zip(found, vectors, strict=True)]

        self._value = jax.jit(value)
        self._value_and_gradient = jax.jit(jax.value_and_grad(value))
        self._product = jax.jit(product)

    @property
    def batches(self) -> int:
        return len(self._held)

    def arrays(self) -> list[jax.Array]:
        return [jnp.asarray(self._named[i][1]) for i in self._indices]

    def support(self) -> list[jax.Array | None] | None:
        return self._support

    def layouts(self) -> list[Layout | None]:
        found = []
        given = layout_by_path(self._layout, [name for name, _ in self._named], "params")
        for i in self._indices:
            name, leaf, owner = *self._named[i], self._owners[i]
            found.append(chosen_layout(name, leaf, given, self._known[i]))
            if found[-1] is None and is_prunable(name, leaf, owner):
                raise ValueError(f"layout of {name} is unknown: pass layout=, got None")
        return found

    def value(self, arrays: Sequence[jax.Array]) -> float:
        losses = [self._value(list(arrays), self._fixed, batch) for batch in self._held]
        return sum(map(float, losses)) / len(losses)

    def value_and_gradient(
        self, arrays: Sequence[jax.Array], batch: int
    ) -> tuple[jax.Array, list[jax.Array]]:
        value, gradient = self._value_and_gradient(list(arrays), self._fixed, self._held[batch])
        return value, gradient

    def hessian_product(
        self, batch: int | None = None
    ) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
        arrays = self.arrays()
        held = self._held if batch is None else [self._held[batch]]

        def product(vectors: Sequence[jax.Array]) -> list[jax.Array]:
            total = [jnp.zeros_like(v) for v in vectors]
            for one in held:
                found = self._product(arrays, list(vectors), self._fixed, one)
                total = [a + b for a, b in zip(total, found, strict=True)]
            return [a / len(held) for a in total]

        return product

    def listed(self, structure: PyTree) -> list[jax.Array]:
        leaves = leaves_like("direction", structure, self._treedef)
        return [leaves[i] for i in self._indices]

    def structured(self, arrays: Sequence[jax.Array]) -> PyTree:
        leaves: list[Any] = [None] * len(self._named)
        for i, x in zip(self._indices, arrays, strict=True):
            leaves[i] = x
        return self._treedef.unflatten(leaves)

    def _variables(self, trainable: Any) -> list[int]:
        """Return the indices of the leaves to differentiate with respect to."""
        if trainable is None or is_function(trainable):
            chosen = [trainable is None or trainable(*leaf) for leaf in self._named]
        else:
            chosen = leaves_like("trainable", trainable, self._treedef)
        for (name, _), flag in zip(self._named, chosen, strict=True):
            flag_of("trainable", name, flag)
        found = []
        for i, ((name, leaf), flag) in enumerate(zip(self._named, chosen, strict=True)):
            if not flag or not isinstance(leaf, (jax.Array, np.ndarray)):
                continue
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(f"{name} must be real floating, got dtype {leaf.dtype}")
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                found.append(i)
        if not found:
            raise ValueError(
                "params must hold a floating leaf that is trained, got "
                f"{', '.join(name for name, _ in self._named) or 'none'}"
            )
        return found

    def _read_support(self, given: Any) -> list[jax.Array | None] | None:
        if given is None:
            return None
        if isinstance(given, str):
            if given != "nonzero":
                raise ValueError(f"support must be 'nonzero', a pytree or None, got {given!r}")
            weights = [
                leaf != 0 if is_prunable(name, leaf, owner) else None
                for (name, leaf), owner in zip(self._named, self._owners, strict=True)
            ]
        else:
            leaves = leaves_like("support", given, self._treedef)
            weights = [None if is_masked(leaf) else leaf for leaf in leaves]
            for (name, leaf), mask in zip(self._named, weights, strict=True):
                _check_mask(name, leaf, mask)
        return [weights[i] for i in self._indices]


def _check_mask(name: str, leaf: Any, mask: Any) -> None:
    """Raise unless ``mask`` is None or a bool array of the shape of its leaf."""
    if mask is None:
        return
    if not jnp.issubdtype(getattr(mask, "dtype", int), jnp.bool_):
        shown = _checks.shown(mask)
        raise TypeError(f"support of {name} must be a bool array or None, got {shown}")
    if jnp.shape(mask) != jnp.shape(leaf):
        raise ValueError(
            f"support of {name} must have its shape {jnp.shape(leaf)}, got {jnp.shape(mask)}"
        )
