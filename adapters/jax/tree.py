"""Map the leaves of a parameter tree to the lists that a method takes, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core import ArrayInfo, Layout
from safe_core.layout import chosen_layout
from safe_core.patterns import Pattern
from safe_core.where import as_names, refuse_unknown, warn_of_vectors

from .leaves import (
    check_arrays,
    check_gradient,
    check_one_copy,
    check_storable,
    difference,
    flag_of,
)
from .nnx_trees import as_pure
from .weights import is_prunable, known_layouts, name_of, owner_of

__all__ = [
    "NamedLeaves",
    "SparseTree",
    "advising_layouts_of",
    "as_jax",
    "is_function",
    "is_masked",
    "is_sparse_in",
    "layout_by_path",
    "leaves_like",
    "refuse_open_stacks",
    "warn_of_chosen_vectors",
]

PyTree = Any


class NamedLeaves(NamedTuple):
    """The leaves of a parameter tree with their paths, and the modules that own them."""

    treedef: Any
    named: list[tuple[str, Any]]
    owners: list[Any]

    @classmethod
    def of(cls, params: PyTree) -> NamedLeaves:
        """Read a tree."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        named = [(name_of(path), leaf) for path, leaf in paths]
        return cls(treedef, named, [owner_of(params, path) for path, _ in paths])

    @property
    def names(self) -> list[str]:
        """The paths of the leaves."""
        return [name for name, _ in self.named]

    def chosen(self, where: Any) -> list[bool]:
        """Return whether each leaf is to be sparse."""
        if where is None:
            pairs = zip(self.named, self.owners, strict=True)
            return [is_prunable(*leaf, owner) for leaf, owner in pairs]
        if is_function(where):
            flags = [where(*leaf) for leaf in self.named]
        elif isinstance(where, str):
            raise TypeError(
                f"where must be a list of paths, a function or a pytree of bool, got the string "
                f"{where!r}: pass [{where!r}] to select one leaf"
            )
        elif (listed := as_names(where)) is not None:
            # Users who pass all variables of Flax may leave out the collection, as in layout=.
            paths = {name: name if name in self.names else f"params/{name}" for name in listed}
            missing = [name for name, path in paths.items() if path not in self.names]
            refuse_unknown(missing, self.names)
            chosen = set(paths.values())
            flags = [name in chosen for name in self.names]
        else:
            flags = leaves_like("where", where, self.treedef)
        return [flag_of("where", name, flag) for name, flag in zip(self.names, flags, strict=True)]

    def layouts(
        self, layout: Any, params: PyTree, indices: Sequence[int]
    ) -> tuple[Layout | None, ...]:
        """Return the axis roles of some leaves: those given, or those that are known."""
        given = layout_by_path(layout, self.names, "params")
        known = known_layouts(self.named, self.owners, params)
        return tuple(chosen_layout(*self.named[i], given, known[i]) for i in indices)


class SparseTree(NamedTuple):
    """Structure of a parameter tree, and the selection of its sparse leaves.

    It holds no arrays, so reading it under `jax.jit` costs time at tracing only.
    """

    treedef: Any
    paths: list[str]  # of all leaves
    indices: list[int]  # of the sparse leaves
    info: ArrayInfo

    @classmethod
    def read(cls, params: PyTree, where: Any, layout: Any) -> SparseTree:
        """Select the sparse leaves of ``params`` and the roles of their axes."""
        if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
            raise ValueError(
                "params must not be masked: wrap only base in masked or multi_transform; choose "
                "the sparse leaves with where="
            )
        check_one_copy(params)
        leaves = NamedLeaves.of(params)
        named = leaves.named
        check_arrays("params", named)
        indices = [i for i, flag in enumerate(leaves.chosen(where)) if flag]
        if named and not indices:  # `optax.tree.map_params` passes a tree without leaves
            raise ValueError(
                "where must select a leaf, got no sparse parameter: pass where=, a function of "
                "path and leaf, a list of paths or a pytree of bool; the paths are "
                f"{', '.join(leaves.names)}"
            )
        for name, leaf in named:
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"{name} must be real, because the norm is over all leaves, got {leaf.dtype}"
                )
        for i in indices:
            check_storable(*named[i])
        names = tuple(named[i][0] for i in indices)
        info = ArrayInfo(names, leaves.layouts(layout, params, indices))
        return cls(leaves.treedef, leaves.names, indices, info)

    @property
    def layouts(self) -> list[Layout | None]:
        """Layouts of all leaves; None for a leaf that is not sparse."""
        found: list[Layout | None] = [None] * self.treedef.num_leaves
        for i, layout in zip(self.indices, self.info.layouts, strict=True):
            found[i] = layout
        return found

    def flags(self) -> PyTree:
        """Return a tree of bool, True for the sparse leaves."""
        chosen = set(self.indices)
        return self.treedef.unflatten([i in chosen for i in range(self.treedef.num_leaves)])

    def leaves(self, tree: PyTree) -> list[Any]:
        """Return all leaves of a tree with the structure of the parameters."""
        return list(self.treedef.flatten_up_to(tree))

    def gradients(self, argument: str, tree: PyTree, params: PyTree) -> list[Any]:
        """Return all leaves of gradients; raise unless each is a gradient of its parameter."""
        leaves = leaves_like(argument, tree, self.treedef)
        for path, leaf, p in zip(self.paths, leaves, self.leaves(params), strict=True):
            check_gradient(argument, path, leaf, p)
        return leaves

    def sparse(self, tree: PyTree) -> list[Any]:
        """Return the sparse leaves of a tree with the structure of the parameters."""
        leaves = self.leaves(tree)
        return [as_jax(leaves[i]) for i in self.indices]

    def replaced(self, leaves: Sequence[Any], sparse: Sequence[Any]) -> PyTree:
        """Return a tree of ``leaves`` in which ``sparse`` replaces the sparse ones."""
        found = list(leaves)
        for i, leaf in zip(self.indices, sparse, strict=True):
            found[i] = leaf
        return self.treedef.unflatten(found)

    def masked(self, sparse: Sequence[Any]) -> PyTree:
        """Return a tree of the sparse leaves, with `optax.MaskedNode` for the others."""
        return self.replaced([optax.MaskedNode()] * self.treedef.num_leaves, sparse)


def as_jax(x: Any) -> Any:
    """Return an array of NumPy, such as `flax.serialization` reads, as one of JAX."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def warn_of_chosen_vectors(where: Any, params: PyTree, tree: SparseTree) -> None:
    """Warn if a function ``where`` chose leaves of fewer than two axes beside weights."""
    if is_function(where):
        rows = zip(tree.info.names, tree.sparse(params), tree.info.layouts, strict=True)
        warn_of_vectors(rows, "lambda path, leaf: leaf.ndim > 1 and ...")


def refuse_open_stacks(params: PyTree, tree: SparseTree, pattern: Pattern) -> None:
    """Raise if the pattern counts within tensors, and a weight may or may not be a stack of them.

    A leaf that is no weight by its name is one tensor, because the user selected it as such.
    """
    paths = jax.tree_util.tree_leaves_with_path(params)
    for i, layout in zip(tree.indices, tree.info.layouts, strict=True):
        path, leaf = paths[i]
        weight = is_prunable(name_of(path), leaf, owner_of(params, path))
        name = name_of(path)
        if layout is None and leaf.ndim > 2 and weight and pattern.of(name).counts_in_tensors:
            raise ValueError(
                f"layout of {name} is unknown, and {pattern.describe()} counts within tensors, of "
                f"which {tuple(leaf.shape)} may be a stack; pass layout={{{name!r}: "
                "Layout(input_axes=..., output_axes=..., batch_axes=...)}"
            )


@contextmanager
def advising_layouts_of(tree: SparseTree) -> Iterator[None]:
    """Add to an error about an unknown layout how to get the layouts of a Flax model."""
    try:
        yield
    except ValueError as error:
        known = zip(tree.info.names, tree.info.layouts, strict=True)
        unknown = tuple(f"layout of {name} is unknown" for name, layout in known if layout is None)
        if not str(error).startswith(unknown):
            raise
        raise ValueError(
            f"{error}. For a Flax model, layout=layouts_of(model, inputs) of "
            "safe_core.adapters.jax.flax gives those of all kernels; an NNX module needs no inputs"
        ) from None


def layout_by_path(layout: Any, paths: Sequence[str], argument: str) -> Any:
    """Return ``layout=``, a mapping with the paths of ``argument``.

    A mapping may leave out the collection ``params`` of Flax, which paths begin with if users
    pass all variables. Raise if it names a path that does not exist.
    """
    if not isinstance(layout, Mapping):
        return layout
    known, found = set(paths), {}
    for name, value in layout.items():
        path = name if name in known else f"params/{name}"
        if path not in known:
            raise ValueError(
                f"layout names {name!r}, which is no path of {argument}; they are "
                f"{', '.join(paths)}"
            )
        found[path] = value
    return found


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Return whether this is a function, and not a pytree with ``__call__`` such as a module."""
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    return callable(value) and (is_leaf or isinstance(value, jax.tree_util.Partial))


def is_masked(node: Any) -> bool:
    """Return whether a node stands for a leaf that is not sparse."""
    return isinstance(node, optax.MaskedNode)


def leaves_like(argument: str, tree: PyTree, treedef: Any) -> list[Any]:
    """Return the leaves of a tree; raise unless it has the structure of the parameters."""
    try:
        return list(as_pure(treedef.flatten_up_to(tree)))
    except (ValueError, TypeError):
        # JAX's own message would print every array.
        params = treedef.unflatten([0] * treedef.num_leaves)
        text = f"but {difference(params, tree)}"
        gradients = argument in ("updates", "what grad_fn returns")
        if gradients and isinstance(tree, tuple) and any(_fits(part, treedef) for part in tree):
            text = "got a tuple such as (value, gradients): pass or return the gradients only"
        raise ValueError(f"{argument} must have the structure of params, {text}") from None


def _fits(tree: PyTree, treedef: Any) -> bool:
    return treedef in (jax.tree.structure(tree), jax.tree.structure(as_pure(tree)))


def is_sparse_in(held: PyTree) -> PyTree:
    """Return a tree of bool that is True where a tree of our state holds an array."""
    return jax.tree.map(lambda leaf: not is_masked(leaf), held, is_leaf=is_masked)
