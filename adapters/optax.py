"""JAX: any optax transformation, under a sparsity constraint.

`sparse_optimizer` holds no mathematics: it moves leaves between a pytree of
parameters, the base transformation and `safe_core.Method`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core import Method, SplitState, _checks
from safe_core._dtypes import wide_dtype
from safe_core.arguments import check_importance
from safe_core.backends import backend_of
from safe_core.layout import Layout, place_importance
from safe_core.schedules import Cubic
from safe_core.splitting import is_projected, penalty_gradient

from .optax_tree import SparseTree, is_function, is_sparse_in, leaves_like

__all__ = ["SparseOptimizerState", "finalize", "find_state", "sparse_optimizer"]

_LAST = "last"
PyTree = Any
Schedule = Callable[[Any], Any]
_Layouts = Layout | Mapping[str, Layout | None] | Callable[[str, Any], Layout | None] | None


class SparseOptimizerState(NamedTuple):
    """State of `sparse_optimizer`.

    The trees have the structure of the parameters, with `optax.MaskedNode` in the place
    of every leaf that is not sparse.

    Attributes
    ----------
    step : int32 scalar
        Base steps taken.
    base : pytree
        State of the base transformation.
    anchor : pytree of arrays
        ``z - u``, see `safe_core.SplitState`.
    support : pytree of bool arrays
        Where z may be non-zero.
    importance : pytree of arrays, or None
        P, or what it is derived from; None if P = 1.
    flat_direction : pytree of arrays, or None
        ``h / |h|`` of `safe_core.SAM` for every parameter, in float32 or wider; None if
        the method does not reuse it.
    """

    step: jax.Array
    base: PyTree
    anchor: PyTree
    support: PyTree
    importance: PyTree
    flat_direction: PyTree = None


def sparse_optimizer(
    base: optax.GradientTransformation,
    method: Method,
    *,
    rho: float | jax.Array | Schedule | None = None,
    penalty: float | jax.Array | Schedule | None = None,
    where: Callable[[str, Any], bool] | PyTree | None = None,
    layout: _Layouts = None,
    importance: Callable[[PyTree], PyTree] | PyTree | None = None,
    select_on_host: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Train with a base transformation towards parameters that are exactly sparse.

    Written out, one step is that of `safe_core.Method`. ``update(grads, state, params,
    grad_fn=...)`` takes the gradients at ``params`` and, where the method perturbs,
    ``grad_fn``, a function of parameters to gradients on the same batch. At steps that
    perturb, ``grads`` serves the ascent alone and may be of a part of the batch; at
    others, see `safe_core.SAM`, ``grad_fn`` is not called.

    Use it as the last transformation: what follows it would change the step that z and u
    have seen. Gradient clipping belongs before it and into ``grad_fn``; within ``base``
    it would act on the penalty too. To accumulate gradients, average them before
    ``update`` and within ``grad_fn``: `optax.MultiSteps` would do the former only.

    Parameters
    ----------
    base : optax.GradientTransformation
        Turns the gradient of loss and penalty into an update. Extra arguments of
        ``update`` are passed on to it.
    method : Method
        From `safe_core.safe` or `safe_core.admm`.
    rho, penalty : float, array or schedule, optional
        Override the method's; may be traced, as under `optax.inject_hyperparams`.
    where : callable or pytree of bool, optional
        Which leaves are sparse: ``where(path, leaf)``, with the keys of the path joined
        by ``/``. By default the weights of linear, convolution, attention and recurrent
        layers of Flax, Haiku and Equinox, see `safe_core.adapters.jax_weights`.
    layout : Layout, mapping of path to Layout, or callable, optional
        Roles of the axes, over what the path tells; ``layout(path, leaf)`` may return
        None for unknown.
    importance : pytree, mapping of path to array, or callable, optional
        P of the sparse leaves: per entry, broadcastable, or per input feature. A
        function ``importance(params)`` is called at dual updates, and P is 1 before the
        first.
    select_on_host : bool
        Select by a host callback in place of counting in the compiled program: faster on
        the CPU. Not for sharded parameters.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Jits, scans and maps; keeps state for sparse leaves only.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, no leaf is sparse, ``params`` or ``grad_fn``
        is missing, or a pattern does not fit a leaf. The message names it.

    Examples
    --------
    >>> import safe_core
    >>> x = jax.random.normal(jax.random.key(0), (16, 8))
    >>> y = jax.random.normal(jax.random.key(1), (16, 2))
    >>> def loss(params, x, y):
    ...     return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)
    >>> method = safe_core.safe(sparsity=0.75, rho=0.05, penalty=0.1, dual_update_interval=2)
    >>> tx = sparse_optimizer(optax.sgd(0.1), method)
    >>> params = {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     grad_fn = lambda params: jax.grad(loss)(params, x, y)
    ...     updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(10):
    ...     params, state = step(params, state)
    >>> params = finalize(params, state, method)
    >>> int((params["kernel"] == 0).sum())
    12
    """
    _check_arguments(base, method, rho, penalty, layout, importance)
    inner = optax.with_extra_args_support(base)
    perturbs = method.perturbs if rho is None else not _is_static_zero(rho)
    reuses = perturbs and method.reuses

    def init(params: PyTree) -> SparseOptimizerState:
        tree = SparseTree.read(params, where, layout, select_on_host)
        sparse = tree.sparse(params)
        held = _initial_importance(importance, params, sparse, tree, method)
        known = None if held is None or is_function(importance) else method.metric(held)
        split = method.init(sparse, tree.targets, known)
        return SparseOptimizerState(
            step=jnp.zeros((), jnp.int32),
            base=inner.init(params),
            anchor=tree.masked(split.anchor),
            support=tree.masked(split.support),
            importance=None if held is None else tree.masked(held),
            flat_direction=_no_direction(params) if reuses else None,
        )

    def update(
        updates: PyTree,
        state: SparseOptimizerState,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SparseOptimizerState]:
        if params is None:
            raise ValueError("params must be passed to update(grads, state, params), got None")
        if not isinstance(state, SparseOptimizerState):
            raise TypeError(f"state must be that of sparse_optimizer, got {type(state)!r}")
        tree = SparseTree.read(params, where, layout, select_on_host)
        _check_state(state, method, tree, reuses)
        check_shapes(params, state, tree)
        gradients = tree.gradients("updates", updates, params)
        flat = []
        if reuses:
            flat = leaves_like("state.flat_direction", state.flat_direction, tree.treedef)
        if perturbs:
            _check_grad_fn(grad_fn)
            radius = None if rho is None else at_step(rho, state.step)
            gradients, flat = _perturbed(
                method, params, gradients, flat, state.step, radius, grad_fn, tree
            )
        held = None if state.importance is None else tree.sparse(state.importance)
        split = SplitState(tree.sparse(state.anchor), tree.sparse(state.support))
        split = method.rescale(split, state.step)
        weight = method.penalty(state.step) if penalty is None else at_step(penalty, state.step)
        penalized = _penalized(params, gradients, split, weight, tree)
        out, base_state = inner.update(penalized, state.base, params, **extra_args)
        new_params = optax.apply_updates(params, out)

        def due(split: SplitState, held: list[Any] | None) -> tuple[SplitState, list[Any] | None]:
            values = tree.sparse(new_params)
            if is_function(importance):
                held = _placed(importance(new_params), values, tree)
            else:
                held = method.refresh_importance(held, [gradients[i] for i in tree.indices])
            metric = method.metric(held)
            return method.dual_update(values, split, state.step, tree.targets, metric), held

        split, held = backend_of(state.step).cond(
            method.is_dual_update(state.step), due, lambda *same: same, split, held
        )
        return out, SparseOptimizerState(
            step=optax.safe_increment(state.step),
            base=base_state,
            anchor=tree.masked(split.anchor),
            support=tree.masked(split.support),
            importance=None if held is None else tree.masked(held),
            flat_direction=tree.treedef.unflatten(flat) if flat else None,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def finalize(
    params: PyTree,
    state: PyTree,
    method: Method,
    *,
    importance: Any = _LAST,
    layout: _Layouts = None,
    select_on_host: bool = False,
) -> PyTree:
    """Return the projected parameters, ``proj(x)``, after the last step.

    Kept entries are unchanged, bit for bit; the others become +0, exactly as many as
    the method asks.

    Parameters
    ----------
    params : pytree
        Parameters after the last step.
    state : pytree
        An optimizer state that holds ours anywhere within.
    method : Method
        The method that was trained with.
    importance : optional
        By default the P last in use. None is P = 1, as Algorithm 1 of the paper prints
        it. A pytree or mapping of path to array is used as it is.
    layout, select_on_host : optional
        As passed to `sparse_optimizer`.

    Returns
    -------
    pytree
        As ``params``, exactly sparse.

    Raises
    ------
    TypeError, ValueError
        If ``state`` does not hold exactly one state of `sparse_optimizer`, or an
        argument does not fit the parameters.

    Examples
    --------
    >>> import safe_core
    >>> method = safe_core.admm(0.5)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> finalize(params, state, method)["kernel"].tolist()
    [[0.0, 4.0], [3.0, 0.0]]
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    ours = find_state(state)
    tree = trained_tree(params, ours, layout, select_on_host)
    sparse = tree.sparse(params)
    check_layout(tree.sparse(ours.support), method, tree)
    if isinstance(importance, str) and importance == _LAST:
        metric = None if ours.importance is None else method.metric(tree.sparse(ours.importance))
    else:
        metric = None if importance is None else _placed(importance, sparse, tree)
    return tree.replaced(tree.leaves(params), method.finalize(sparse, tree.targets, metric))


def trained_tree(
    params: PyTree, state: SparseOptimizerState, layout: _Layouts, on_host: bool = False
) -> SparseTree:
    """The sparse leaves of ``params`` as ``state`` knows them."""
    sparse = is_sparse_in(state.anchor)
    known: Any = jax.tree.structure(sparse)
    if known != jax.tree.structure(params):
        raise ValueError(
            "params must have the structure of those that state was made of (of NNX pass "
            f"nnx.as_pure of both), {known}, got {jax.tree.structure(params)}"
        )
    tree = SparseTree.read(params, sparse, layout, on_host)
    check_shapes(params, state, tree)
    return tree


def check_shapes(params: PyTree, state: SparseOptimizerState, tree: SparseTree) -> None:
    """Refuse parameters that a state was not made of."""
    pairs = zip(tree.targets.names, tree.sparse(params), tree.sparse(state.anchor), strict=True)
    for name, x, anchor in pairs:
        if x.shape != anchor.shape:
            raise ValueError(
                f"params must have the shapes of those that state was made of, which is "
                f"{anchor.shape} for {name}, got {x.shape}"
            )


def find_state(state: PyTree) -> SparseOptimizerState:
    """Return the one `SparseOptimizerState` within an optimizer state.

    Parameters
    ----------
    state : pytree
        As of `optax.chain` or `optax.inject_hyperparams`.

    Returns
    -------
    SparseOptimizerState

    Raises
    ------
    ValueError
        If there is none or more than one.

    Examples
    --------
    >>> import safe_core
    >>> tx = optax.chain(optax.clip(1.0), sparse_optimizer(optax.sgd(0.1), safe_core.admm(0.5)))
    >>> int(find_state(tx.init({"kernel": jnp.ones((2, 2))})).step)
    0
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, SparseOptimizerState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(
            f"state must hold one state of sparse_optimizer, found {len(found)} in {type(state)!r}"
        )
    return found[0]


def _perturbed(
    method: Method,
    params: PyTree,
    gradients: list[Any],
    flat: list[Any],
    step: jax.Array,
    rho: Any,
    grad_fn: Any,
    tree: SparseTree,
) -> tuple[list[Any], list[Any]]:
    """The loss gradients of the step, and the direction that other steps reuse, if any do."""
    due = method.perturbation.is_due(step)  # type: ignore[union-attr]

    def ascend(first: list[Any], flat: list[Any]) -> tuple[list[Any], list[Any]]:
        e = method.perturb(tree.leaves(params), first, step, rho=rho)
        second = tree.gradients("what grad_fn returns", grad_fn(_moved(params, e, tree)), params)
        second = _cast(second, first)
        return second, _cast(method.flat_direction(first, second), flat) if flat else flat

    def stay(first: list[Any], flat: list[Any]) -> tuple[list[Any], list[Any]]:
        return method.reuse(first, flat) if flat else first, flat

    found: tuple[list[Any], list[Any]] = backend_of(step).cond(due, ascend, stay, gradients, flat)
    return found


def _check_state(
    state: SparseOptimizerState, method: Method, tree: SparseTree, reuses: bool
) -> None:
    """Refuse the state of a method with another state, before a branch of a condition does."""
    if reuses != (state.flat_direction is not None):
        raise ValueError(
            f"state.flat_direction must {'' if reuses else 'not '}be there for a method with "
            f"reuse={getattr(method.perturbation, 'reuse', 0)!r}; is the state of another method?"
        )
    narrow = method.state_dtype is not None
    for name, anchor in zip(tree.targets.names, tree.sparse(state.anchor), strict=True):
        if narrow != (anchor.dtype == jnp.bfloat16):
            raise TypeError(
                f"state.anchor of {name} must be that of a method with state_dtype="
                f"{method.state_dtype!r}, got {anchor.dtype}"
            )


def _check_grad_fn(grad_fn: Any) -> None:
    if grad_fn is None:
        raise ValueError(
            "grad_fn must be passed to update(grads, state, params, grad_fn=...), a "
            "function of params to gradients, for the method has rho > 0; got None"
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn must be a function of params to gradients, got {type(grad_fn)!r}")


def _moved(params: PyTree, e: Sequence[Any], tree: SparseTree) -> PyTree:
    """``x + e`` in the dtypes of x."""
    leaves = zip(tree.leaves(params), e, strict=True)
    return tree.treedef.unflatten(
        [(p.astype(e_i.dtype) + e_i).astype(p.dtype) for p, e_i in leaves]
    )


def _penalized(
    params: PyTree, gradients: Sequence[Any], split: SplitState, penalty: Any, tree: SparseTree
) -> PyTree:
    """The gradients of loss and penalty, in the dtypes of the loss gradients."""
    sums = []
    for i, x, anchor in zip(tree.indices, tree.sparse(params), split.anchor, strict=True):
        pull = penalty_gradient(x, anchor, penalty)
        sums.append((gradients[i].astype(pull.dtype) + pull).astype(gradients[i].dtype))
    return tree.replaced(gradients, sums)


def _no_direction(params: PyTree) -> PyTree:
    """A zero direction, until the first perturbation."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(jnp, [p])), params)


def _cast(arrays: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    return [a.astype(b.dtype) for a, b in zip(arrays, like, strict=True)]


def at_step(value: Any, step: jax.Array) -> Any:
    """A number or a schedule at a step."""
    return value(step) if callable(value) else value


def _is_static_zero(rho: Any) -> bool:
    return isinstance(rho, (int, float)) and rho == 0


def _initial_importance(
    importance: Any, params: PyTree, sparse: list[Any], tree: SparseTree, method: Method
) -> list[Any] | None:
    if importance is None:
        return method.init_importance(sparse)
    if not is_function(importance):
        # Copies: the caller's arrays must outlive a state that is donated.
        return [jnp.array(p, copy=True) for p in _placed(importance, sparse, tree)]
    # Only shapes are known before the first call, and P is 1 until then.
    shapes = jax.eval_shape(lambda p: _placed(importance(p), tree.sparse(p), tree), params)
    return [
        jnp.ones_like(x, dtype=shape.dtype)
        if shape.shape == x.shape
        else jnp.ones(shape.shape, shape.dtype)
        for x, shape in zip(sparse, shapes, strict=True)
    ]


def _placed(importance: Any, sparse: list[Any], tree: SparseTree) -> list[Any]:
    """P of each sparse leaf, checked and given its axes."""
    names = tree.targets.names
    try:
        given = tree.sparse(importance)
    except (ValueError, TypeError):
        if not (isinstance(importance, Mapping) and set(importance) & set(names)):
            raise ValueError(
                "importance must have the structure of params or map the paths "
                f"{', '.join(names)} to arrays, got {jax.tree.structure(importance)}"
            ) from None
        unknown = sorted(set(importance) - set(names))
        if unknown:
            raise ValueError(
                f"importance names {unknown[0]!r}, which is no sparse parameter"
            ) from None
        given = [importance.get(name) for name in names]
    placed = []
    for p, x, name, layout in zip(given, sparse, names, tree.targets.layouts, strict=True):
        if p is None:
            raise ValueError(f"importance must be given for every sparse parameter, lacks {name!r}")
        if not isinstance(p, (int, float, np.ndarray, np.generic, jax.Array)):
            raise TypeError(f"importance of {name} must be an array, got {_checks.shown(p)}")
        placed.append(place_importance(jnp.asarray(p), x, layout, name))
    check_importance(placed, names)
    return placed


def check_layout(support: Sequence[Any], method: Method, tree: SparseTree) -> None:
    """Refuse a layout other than the one that was trained with, where values can be read."""
    changes = isinstance(getattr(method.sparsity, "sparsity", None), Cubic)
    if changes or not all(backend_of(mask).is_concrete(mask) for mask in support):
        return
    if not is_projected(support, method.sparsity, tree.targets):
        raise ValueError(
            "method and layout must be those that state was trained with: its support is none of "
            f"{method.sparsity!r} with layouts {tree.targets.layouts}"
        )


def _check_arguments(
    base: Any, method: Any, rho: Any, penalty: Any, layout: Any, importance: Any
) -> None:
    if not isinstance(base, optax.GradientTransformation):
        raise TypeError(f"base must be an optax.GradientTransformation, got {base!r}")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    if rho is not None and method.perturbation is None:
        raise ValueError(f"rho must be None for a method without perturbation, got {rho!r}")
    for name, value in (("rho", rho), ("penalty", penalty)):
        if isinstance(value, (np.ndarray, jax.Array)):
            if value.shape != ():
                raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
        elif value is not None and not callable(value):
            _checks.real(name, value, low=0.0)
    if penalty is not None and method.rescale_dual:
        raise ValueError(
            "penalty must be the method's own under rescale_dual, which needs to know its next "
            f"value, got {penalty!r}"
        )
    if layout is not None and not (isinstance(layout, (Layout, Mapping)) or callable(layout)):
        raise TypeError(f"layout must be a Layout, a mapping or a function, got {layout!r}")
    if importance is not None and method.importance is not None:
        raise ValueError(
            f"importance must be given once: the method has {method.importance!r} already"
        )
