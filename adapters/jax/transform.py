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
from safe_core._dtypes import scalar_like, wide_dtype
from safe_core.arguments import check_importance
from safe_core.backends import backend_of, selecting_on_host
from safe_core.layout import Layout, place_importance
from safe_core.projection import apply_support
from safe_core.schedules import SparsityTable
from safe_core.splitting import is_projected, penalty_gradient

from .tree import SparseTree, is_function, is_sparse_in, leaves_like

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
    anchor : pytree of arrays, or None
        ``z - u``, see `safe_core.SplitState`; None for a method without z and u.
    support : pytree of bool arrays
        Where z may be non-zero, or x after its last projection.
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
    learning_rate: float | jax.Array | Schedule | None = None,
    where: Callable[[str, Any], bool] | PyTree | None = None,
    layout: _Layouts = None,
    importance: Callable[[PyTree], PyTree] | PyTree | None = None,
    select_on_host: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Train with a base transformation towards parameters that are exactly sparse.

    Written out, one step is that of `safe_core.Method`. ``update(grads, state, params,
    grad_fn=...)`` takes the gradients at ``params`` and, where the method perturbs,
    ``grad_fn``, a function of parameters to gradients on the same batch. At steps that
    perturb, ``grads`` serves the ascent alone and may be of a part of the batch, unless the
    method adds it; at others, see `safe_core.SAM`, ``grad_fn`` is not called. A method that
    adds a projected gradient calls it at every step once more. Gradients must be unscaled
    where the perturbation is not scale-free, as of `safe_core.cram`.

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
        From `safe_core.safe` or another function of `safe_core`.
    rho, penalty : float, array or schedule, optional
        Override the method's; may be traced, as under `optax.inject_hyperparams`.
    learning_rate : float, array or schedule
        That of ``base``, for a method with a decoupled penalty; not for others.
    where : callable or pytree of bool, optional
        Which leaves are sparse: ``where(path, leaf)``, with the keys of the path joined
        by ``/``. By default the weights of linear, convolution, attention and recurrent
        layers of Flax, Haiku and Equinox, see `safe_core.adapters.jax.weights`.
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
    _check_arguments(base, method, rho, penalty, learning_rate, layout, importance)
    inner = optax.with_extra_args_support(base)
    perturbs = method.perturbs if rho is None or method.compressed else not _is_static_zero(rho)
    reuses = perturbs and method.reuses

    @selecting_on_host(select_on_host)
    def init(params: PyTree) -> SparseOptimizerState:
        tree = SparseTree.read(params, where, layout)
        sparse = tree.sparse(params)
        held = _initial_importance(importance, params, sparse, tree, method)
        known = None if held is None or is_function(importance) else method.metric(held)
        split = method.init(sparse, tree.targets, known)
        return SparseOptimizerState(
            step=jnp.zeros((), jnp.int32),
            base=inner.init(params),
            anchor=tree.masked(split.anchor) if method.splits else None,
            support=tree.masked(split.support),
            importance=None if held is None else tree.masked(held),
            flat_direction=_no_direction(params) if reuses else None,
        )

    @selecting_on_host(select_on_host)
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
        tree = SparseTree.read(params, where, layout)
        _check_state(state, method, tree, reuses)
        check_shapes(params, state, tree)
        gradients = tree.gradients("updates", updates, params)
        held = None if state.importance is None else tree.sparse(state.importance)
        support = tree.sparse(state.support)
        loss_gradients = _LossGradients(method, tree, params, support, held, state.step, grad_fn)
        flat = []
        if reuses:
            flat = leaves_like("state.flat_direction", state.flat_direction, tree.treedef)
        gradients = loss_gradients.masked(gradients)
        if perturbs or method.adds_projected:
            _check_grad_fn(grad_fn)
        if perturbs:
            radius = None if rho is None else at_step(rho, state.step)
            gradients, flat = loss_gradients.perturbed(gradients, flat, radius)
        if method.adds_projected:
            gradients = loss_gradients.with_projected(gradients)
        split = SplitState(tree.sparse(state.anchor) if method.splits else [], support)
        split = method.rescale(split, state.step)
        weight = method.penalty(state.step) if penalty is None else at_step(penalty, state.step)
        total = tree.treedef.unflatten(gradients)
        if method.splits and not method.decoupled:
            total = _penalized(params, gradients, split, weight, tree)
        out, base_state = inner.update(total, state.base, params, **extra_args)
        if method.decoupled:
            rate = at_step(learning_rate, state.step)
            out = _pulled(out, params, split, weight, rate, tree)
        if method.masks:
            out = _emptied(out, params, support, tree)
        new_params = optax.apply_updates(params, out)

        def due(split: SplitState, held: list[Any] | None) -> tuple[SplitState, list[Any] | None]:
            values = tree.sparse(new_params)
            if is_function(importance):
                held = _placed(importance(new_params), values, tree)
            else:
                held = method.refresh_importance(held, [gradients[i] for i in tree.indices])
            metric = method.metric(held)
            return method.dual_update(values, split, state.step, tree.targets, metric), held

        is_due = method.is_dual_update(state.step)
        split, held = backend_of(state.step).cond(is_due, due, lambda *same: same, split, held)
        if method.prunes and not method.masks:
            out = _emptied(
                out, params, [mask | ~jnp.asarray(is_due) for mask in split.support], tree
            )
        if method.masks:
            out = _emptied(out, params, split.support, tree)
        return out, SparseOptimizerState(
            step=optax.safe_increment(state.step),
            base=base_state,
            anchor=tree.masked(split.anchor) if method.splits else None,
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
    tree = trained_tree(params, ours, layout)
    sparse = tree.sparse(params)
    with selecting_on_host(select_on_host):
        check_layout(tree.sparse(ours.support), method, tree)
    if isinstance(importance, str) and importance == _LAST:
        metric = None if ours.importance is None else method.metric(tree.sparse(ours.importance))
    else:
        metric = None if importance is None else _placed(importance, sparse, tree)
    with selecting_on_host(select_on_host):
        kept = method.finalize(sparse, tree.targets, metric)
    return tree.replaced(tree.leaves(params), kept)


def trained_tree(params: PyTree, state: SparseOptimizerState, layout: _Layouts) -> SparseTree:
    """The sparse leaves of ``params`` as ``state`` knows them."""
    sparse = is_sparse_in(state.support)
    known: Any = jax.tree.structure(sparse)
    if known != jax.tree.structure(params):
        raise ValueError(
            "params must have the structure of those that state was made of (of NNX pass "
            f"nnx.as_pure of both), {known}, got {jax.tree.structure(params)}"
        )
    tree = SparseTree.read(params, sparse, layout)
    check_shapes(params, state, tree)
    return tree


def check_shapes(params: PyTree, state: SparseOptimizerState, tree: SparseTree) -> None:
    """Refuse parameters that a state was not made of."""
    pairs = zip(tree.targets.names, tree.sparse(params), tree.sparse(state.support), strict=True)
    for name, x, support in pairs:
        if x.shape != support.shape:
            raise ValueError(
                f"params must have the shapes of those that state was made of, which is "
                f"{support.shape} for {name}, got {x.shape}"
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


class _LossGradients(NamedTuple):
    """The gradients of the loss at the points of one step."""

    method: Method
    tree: SparseTree
    params: PyTree
    support: list[Any]
    importance: list[Any] | None
    step: jax.Array
    grad_fn: Any

    def perturbed(
        self, gradients: list[Any], flat: list[Any], rho: Any
    ) -> tuple[list[Any], list[Any]]:
        """Those of the step, and the direction that other steps reuse, if any do."""
        method, step = self.method, self.step
        due = method.perturbation.is_due(step)  # type: ignore[union-attr]

        def ascend(first: list[Any], flat: list[Any]) -> tuple[list[Any], list[Any]]:
            e = method.perturb(self.tree.leaves(self.params), first, step, rho=rho)
            moved = _moved(self.params, e, self.tree)
            second = self._at(self._compressed(moved) if method.compressed else moved, first)
            if method.adds_unperturbed:
                second = [a + b for a, b in zip(second, first, strict=True)]
            return second, _cast(method.flat_direction(first, second), flat) if flat else flat

        def stay(first: list[Any], flat: list[Any]) -> tuple[list[Any], list[Any]]:
            return method.reuse(first, flat) if flat else first, flat

        found: tuple[list[Any], list[Any]] = backend_of(step).cond(
            due, ascend, stay, gradients, flat
        )
        return found

    def with_projected(self, gradients: list[Any]) -> list[Any]:
        """Add the gradient at ``C(x)``."""
        added = self._at(self._compressed(self.params), gradients)
        return [a + b for a, b in zip(gradients, added, strict=True)]

    def masked(self, gradients: list[Any]) -> list[Any]:
        """Gradients, zero off the support under a mask."""
        if not self.method.masks:
            return gradients
        found = list(gradients)
        sparse = [gradients[i] for i in self.tree.indices]
        kept = apply_support(sparse, self.support)
        for i, gradient in zip(self.tree.indices, kept, strict=True):
            found[i] = gradient
        return found

    def _at(self, params: PyTree, like: list[Any]) -> list[Any]:
        """What ``grad_fn`` returns at other parameters, checked."""
        found = self.tree.gradients("what grad_fn returns", self.grad_fn(params), params)
        return self.masked(_cast(found, like))

    def _compressed(self, params: PyTree) -> PyTree:
        """``C(params)``."""
        sparse, targets = self.tree.sparse(params), self.tree.targets
        metric = self.method.metric(self.importance)
        kept = self.method.compression(sparse, targets, self.step, metric)
        return self.tree.replaced(self.tree.leaves(params), apply_support(sparse, kept))


def _check_state(
    state: SparseOptimizerState, method: Method, tree: SparseTree, reuses: bool
) -> None:
    """Refuse the state of a method with another state, before a branch of a condition does."""
    if reuses != (state.flat_direction is not None):
        raise ValueError(
            f"state.flat_direction must {'' if reuses else 'not '}be there for a method with "
            f"reuse={getattr(method.perturbation, 'reuse', 0)!r}; is the state of another method?"
        )
    check_anchor(state, method)
    if not method.splits:
        return
    narrow = method.state_dtype is not None
    for name, anchor in zip(tree.targets.names, tree.sparse(state.anchor), strict=True):
        if narrow != (anchor.dtype == jnp.bfloat16):
            raise TypeError(
                f"state.anchor of {name} must be that of a method with state_dtype="
                f"{method.state_dtype!r}, got {anchor.dtype}"
            )


def check_anchor(state: SparseOptimizerState, method: Method) -> None:
    """Refuse a state that lacks the anchors of a method, or has too many."""
    if method.splits != (state.anchor is not None):
        raise ValueError(
            f"state.anchor must {'' if method.splits else 'not '}be there for a method with "
            f"projection={method.projection!r}; is the state of another method?"
        )


def _check_grad_fn(grad_fn: Any) -> None:
    if grad_fn is None:
        raise ValueError(
            "grad_fn must be passed to update(grads, state, params, grad_fn=...), a "
            "function of params to gradients, for the method has rho > 0 or takes a gradient at "
            "projected parameters; got None"
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


def _pulled(
    updates: PyTree, params: PyTree, split: SplitState, penalty: Any, rate: Any, tree: SparseTree
) -> PyTree:
    """Updates less ``rate * penalty * (x - anchor)``, in their dtypes."""
    steps, pulled = tree.leaves(updates), []
    for i, x, anchor in zip(tree.indices, tree.sparse(params), split.anchor, strict=True):
        pull = penalty_gradient(x, anchor, penalty)
        moved = steps[i].astype(pull.dtype) - scalar_like(rate, pull) * pull
        pulled.append(moved.astype(steps[i].dtype))
    return tree.replaced(steps, pulled)


def _emptied(updates: PyTree, params: PyTree, support: Sequence[Any], tree: SparseTree) -> PyTree:
    """Updates that leave parameters zero off a support: x + (-x) is +0."""
    steps, kept = tree.leaves(updates), []
    for i, x, mask in zip(tree.indices, tree.sparse(params), support, strict=True):
        dtype = jnp.promote_types(steps[i].dtype, x.dtype)  # in which -x is exact
        kept.append(jnp.where(mask, steps[i].astype(dtype), -x.astype(dtype)))
    return tree.replaced(steps, kept)


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
    changes = isinstance(getattr(method.sparsity, "sparsity", None), SparsityTable)
    if changes or not all(backend_of(mask).is_concrete(mask) for mask in support):
        return
    if not is_projected(support, method.sparsity, tree.targets):
        raise ValueError(
            "method and layout must be those that state was trained with: its support is none of "
            f"{method.sparsity!r} with layouts {tree.targets.layouts}"
        )


def _check_arguments(
    base: Any,
    method: Any,
    rho: Any,
    penalty: Any,
    learning_rate: Any,
    layout: Any,
    importance: Any,
) -> None:
    if not isinstance(base, optax.GradientTransformation):
        raise TypeError(f"base must be an optax.GradientTransformation, got {base!r}")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    if rho is not None and method.perturbation is None:
        raise ValueError(f"rho must be None for a method without perturbation, got {rho!r}")
    if method.decoupled != (learning_rate is not None):
        raise ValueError(
            f"learning_rate must {'be given' if method.decoupled else 'be None'} for a method with "
            f"decoupled={method.decoupled!r}, got {learning_rate!r}"
        )
    if penalty is not None and not method.splits:
        raise ValueError(f"penalty must be None for a method without z and u, got {penalty!r}")
    for name, value in (("rho", rho), ("penalty", penalty), ("learning_rate", learning_rate)):
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
