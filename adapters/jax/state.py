"""Define the state of `sparse_optimizer`, and check that it fits a method and a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safe_core import Layout, Method, SplitState
from safe_core.backends import backend_of
from safe_core.constraints.float8 import dequantised
from safe_core.constraints.splitting import is_projected
from safe_core.packing import packed_shape, unpacked

from .leaves import check_one_copy, difference
from .state_setup import StateSetup, register_with_flax, source_text
from .tree import SparseTree, is_sparse_in

__all__ = [
    "Layouts",
    "SparseOptimizerState",
    "check_anchor",
    "check_importance",
    "check_layout",
    "check_selection",
    "check_shapes",
    "check_single",
    "check_update",
    "find_state",
    "sparse_leaves",
    "split_of",
    "stored_split",
    "trained_tree",
]

PyTree = Any
Layouts = Layout | Mapping[str, Layout | None] | Callable[[str, Any], Layout | None] | None


class SparseOptimizerState(NamedTuple):
    """State of `sparse_optimizer`.

    The trees have the structure of the parameters, with `optax.MaskedNode` in place of
    every leaf that is not sparse.

    Attributes
    ----------
    step : int32 scalar
        Number of base steps taken.
    base : pytree
        State of the base transformation.
    anchor : pytree of arrays, or None
        ``z - u``, see `safe_core.SplitState`; None for a constraint without anchors.
    support : pytree of bool arrays
        Where z may be non-zero, or x after its last projection. Or its `safe_core.packing`, or
        ``z / scale`` in float8, see `safe_core.constraints.float8`.
    importance : pytree of arrays, or None
        State of the importance; None if P = 1.
    flat_direction : pytree of arrays, or None
        ``h / |h|`` of `safe_core.SAM` for every parameter, in float32 or wider; None if
        the method does not reuse it.
    setup : StateSetup or None
        What the state was made with, without arrays, to refuse another method or layout; None
        (in checkpoints of early versions) turns these checks off.
    motion : array or None
        What a radius in steps depends on, see `safe_core.motion`; None for other radii.
    scale : pytree of float32 scalars, or None
        Scales of z in float8; None for other states.
    """

    step: jax.Array
    base: PyTree
    anchor: PyTree
    support: PyTree
    importance: PyTree
    flat_direction: PyTree = None
    setup: Any = None
    motion: jax.Array | None = None
    scale: PyTree = None

    @property
    def known_setup(self) -> StateSetup | None:
        """The record of the settings, or None if the state has none."""
        return self.setup if isinstance(self.setup, StateSetup) else None


def find_state(state: PyTree) -> SparseOptimizerState:
    """Return the only `SparseOptimizerState` inside an optimizer state.

    Parameters
    ----------
    state : pytree
        Such as the state of `optax.chain` or `optax.inject_hyperparams`.

    Returns
    -------
    SparseOptimizerState

    Raises
    ------
    ValueError
        If there is none or more than one.

    Examples
    --------
    >>> import optax
    >>> import safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> method = safe_core.admm(0.5, steps=100)
    >>> tx = optax.chain(optax.clip(1.0), sparse_optimizer(optax.sgd(0.1), method))
    >>> int(find_state(tx.init({"kernel": jnp.ones((2, 2))})).step)
    0
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, SparseOptimizerState)

    register_with_flax()
    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(
            f"state must hold one state of sparse_optimizer, found {len(found)} in {type(state)!r}"
        )
    return found[0]


def split_of(state: SparseOptimizerState, tree: SparseTree) -> SplitState:
    """Return anchors and bool supports as lists over the sparse leaves."""
    return dequantised(stored_split(state, tree))


def stored_split(state: SparseOptimizerState, tree: SparseTree) -> SplitState:
    """Return the state of the constraint as lists over the sparse leaves, with z as stored."""
    check_single(state)
    anchor = [] if state.anchor is None else tree.sparse(state.anchor)
    supports = tree.sparse(state.support)
    scale = () if state.scale is None else tree.sparse(state.scale)
    if anchor and not scale:  # without anchors none is packed
        supports = [
            backend_of(a).resharded_as(a, unpacked(s, a))
            for s, a in zip(supports, anchor, strict=True)
        ]
    return SplitState(anchor, supports, scale)


def trained_tree(
    params: PyTree, state: SparseOptimizerState, method: Method, layout: Layouts = None
) -> SparseTree:
    """Return the selection of sparse leaves of ``params`` that ``state`` was made with.

    The state shows which leaves are sparse and the roles of their axes, so `finalize` needs
    neither ``where=`` nor ``layout=``. Raise if ``method`` or a given ``layout`` is another one.
    """
    check_single(state)
    check_one_copy(params)
    sparse = sparse_leaves(params, state)
    setup = state.known_setup
    if setup is not None and layout is None:
        layout = dict(zip(setup.names, setup.layouts, strict=True))
    tree = SparseTree.read(params, sparse, layout)
    check_shapes(params, state, tree)
    if setup is not None:
        setup.check_layouts(params, tree)
        setup.check_method(method)
    check_importance(state, method)
    return tree


def sparse_leaves(params: PyTree, state: Any) -> PyTree:
    """Return a tree of bool, True for sparse leaves; raise if the state is of another model."""
    sparse = is_sparse_in(state.support)
    known: Any = jax.tree.structure(sparse)
    if known != jax.tree.structure(params):
        raise ValueError(
            "params must have the structure of those that state was made of (for NNX, pass "
            f"nnx.as_pure of both), but params {difference(sparse, params)}"
        )
    return sparse


def check_selection(sparse: PyTree, tree: SparseTree) -> None:
    """Raise unless the flags of a state's sparse leaves are those of the selection."""
    flags = zip(tree.paths, tree.leaves(sparse), tree.leaves(tree.flags()), strict=True)
    for path, own, given in flags:
        if own != given:
            raise ValueError(
                "where must select the leaves that state was made with, which "
                f"{'has' if own else 'lacks'} {path}, got {given} for it"
            )


def check_single(state: SparseOptimizerState) -> None:
    """Raise if the state is of several models, made under `jax.vmap` or copied to devices.

    Its arrays have one more axis than those of one model, and a projection would compare the
    weights of all members with each other.
    """
    shape = jnp.shape(state.step)
    if shape != ():
        raise ValueError(
            "state must be of one model, with a scalar step, got a step of shape "
            f"{shape}: for an ensemble, call the function under jax.vmap, such as "
            "jax.vmap(lambda params, state: finalize(params, state, method))(params, state); of a "
            "replicated state pass one copy, jax.tree.map(lambda leaf: leaf[0], state)"
        )


def check_importance(state: SparseOptimizerState, method: Method, passed: Any = None) -> None:
    """Raise if the state lacks the importance of the method, or that passed by the user."""
    source = method.importance
    needed = passed is not None or (source is not None and source.has_state_from_start)
    if needed and state.importance is None:
        raise ValueError(
            f"state.importance must be there for {source_text(method, passed)}, got None; is the "
            "state of another method?"
        )


def check_shapes(params: PyTree, state: Any, tree: SparseTree) -> None:
    """Raise if the shapes of sparse leaves differ from those of the state.

    The state is any that holds a ``support``. A mask of integers, which a wrapper makes by
    arithmetic on states, would index where it should select.
    """
    pairs = zip(tree.info.names, tree.sparse(params), tree.sparse(state.support), strict=True)
    for name, x, support in pairs:
        if _is_packed(support, x):
            continue
        if x.shape != support.shape:
            raise ValueError(
                f"params must have the shapes of those that state was made of, which is "
                f"{support.shape} for {name}, got {x.shape}"
            )
        if support.dtype not in (jnp.bool, jnp.float8_e4m3fn):
            raise TypeError(
                f"state.support of {name} must be bool, got {support.dtype}: no wrapper may do "
                "arithmetic on the state, as optax.lookahead does with reset_state=True"
            )


def _is_packed(support: jax.Array, x: Any) -> bool:
    return bool(x.shape) and (support.dtype, support.shape) == (jnp.uint8, packed_shape(x.shape))


def check_update(
    state: SparseOptimizerState,
    method: Method,
    importance: Any,
    params: PyTree,
    tree: SparseTree,
    *,
    reuses: bool,
) -> None:
    """Raise if a step cannot continue from the state: that of another method, model or layout."""
    register_with_flax()
    check_single(state)
    check_selection(sparse_leaves(params, state), tree)
    _check_arrays(state, method, tree, reuses)
    check_shapes(params, state, tree)
    if state.known_setup is not None:
        state.known_setup.check_update(method, importance, params, tree)
    check_importance(state, method, importance)


def _check_arrays(
    state: SparseOptimizerState, method: Method, tree: SparseTree, reuses: bool
) -> None:
    """Raise if the state belongs to a method with other state arrays.

    Without this check `jax.lax.cond` would raise, since its branches would return different
    structures, and its message would not name the cause.
    """
    if reuses != (state.flat_direction is not None):
        raise ValueError(
            f"state.flat_direction must {'' if reuses else 'not '}be there for a method with "
            f"reuse={getattr(method.perturbation, 'reuse', 0)!r}; is the state of another method?"
        )
    measures = method.measures_steps
    if measures != (state.motion is not None):
        kinds = ("does not measure", "measures")
        raise ValueError(
            f"state must come from a method that {kinds[measures]} the steps of the base "
            f"optimizer, as this one, got a state of one that {kinds[not measures]} them: "
            "safe(sparsity, steps=T) does, safe(sparsity) and admm do not"
        )
    if state.motion is not None and state.motion.shape != (3,):
        raise ValueError(f"state.motion must have shape (3,), got {state.motion.shape}")
    check_anchor(state, method)
    if state.anchor is None:
        return
    stored = method.constraint.support_dtype
    narrow = method.constraint.anchor_dtype is not None
    arrays = (tree.info.names, tree.sparse(state.anchor), tree.sparse(state.support))
    for name, anchor, support in zip(*arrays, strict=True):
        if support.dtype != getattr(jnp, stored):
            raise TypeError(
                f"state.support of {name} must be {stored}, as the method stores it, got "
                f"{support.dtype}: no wrapper may do arithmetic on the state, as optax.lookahead "
                "does with reset_state=True"
            )
        if narrow != (anchor.dtype == jnp.bfloat16):
            raise TypeError(
                f"state.anchor of {name} must be that of a method with state_dtype="
                f"{method.constraint.anchor_dtype!r}, got {anchor.dtype}"
            )


def check_anchor(state: SparseOptimizerState, method: Method) -> None:
    """Raise if the state lacks the anchors of a method, or has anchors that it does not use."""
    wanted = method.constraint.has_anchor
    if wanted != (state.anchor is not None):
        raise ValueError(
            f"state.anchor must {'' if wanted else 'not '}be there for a method with the "
            f"constraint {type(method.constraint).__name__}; is the state of another method?"
        )


def check_layout(support: Sequence[Any], method: Method, tree: SparseTree) -> None:
    """Raise if the support does not fit the method and layout.

    `StateSetup` compares settings, and this the arrays, which may come from another checkpoint.
    Traced values cannot be read, and a schedule changes the sparsity of past supports: do not
    check these.
    """
    # Within a traced program, operations on concrete masks are traced too.
    read = [*support, *(jnp.any(mask) for mask in support[:1])]
    concrete = all(backend_of(mask).is_concrete(mask) for mask in read)
    if method.sparsity.changes or not concrete:
        return
    if not is_projected(support, method.sparsity, tree.info):
        raise ValueError(
            "method and layout must be those that state was trained with: its support is none of "
            f"{method.sparsity!r} with layouts {tree.info.layouts}"
        )
