"""Wrap any optax transformation to train under a sparsity constraint.

`sparse_optimizer` contains no numerics. It flattens pytrees to lists, passes them to
`safe_core.functional.FunctionalStep`, and restores the pytrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from safe_core import FixedZeros, Method, _checks
from safe_core.backends import backend_of, selecting_on_host
from safe_core.finalization import warn
from safe_core.functional import FunctionalStep, StepState
from safe_core.own_zeros import check_own_zeros
from safe_core.packing import packed
from safe_core.step_state import no_direction, no_motion

from .arguments import (
    check_arguments,
    check_base_state,
    check_grad_fn,
    check_number,
    gradients_by,
    is_static_zero,
    refuse_averaging,
)
from .coverage import warn_of_free_zeros
from .evaluation import LAST, final_projection
from .importance import importance_in_use, initial_importance, second_moments
from .sassha import needs_product, summed_products
from .state import (
    Layouts,
    SparseOptimizerState,
    check_update,
    stored_split,
)
from .state_setup import StateSetup, register_with_flax
from .tree import (
    SparseTree,
    advising_layouts_of,
    as_jax,
    leaves_like,
    refuse_open_stacks,
    warn_of_chosen_vectors,
)

__all__ = ["at_step", "finalize", "sparse_optimizer"]

PyTree = Any
Schedule = Callable[[Any], Any]


def sparse_optimizer(
    base: optax.GradientTransformation,
    method: Method,
    *,
    rho: float | jax.Array | Schedule | None = None,
    penalty: float | jax.Array | Schedule | None = None,
    learning_rate: float | jax.Array | Schedule | None = None,
    where: Callable[[str, Any], bool] | Sequence[str] | PyTree | None = None,
    layout: Layouts = None,
    importance: Callable[[PyTree], PyTree] | PyTree | None = None,
    select_on_host: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Train towards exactly sparse parameters with any optax transformation.

    `safe_core.Method` writes out one step. ``update(grads, state, params, grad_fn=...)`` takes
    the gradients at ``params``. If the method perturbs, it also takes ``grad_fn``, which maps
    parameters to gradients on the same batch. At steps that perturb, ``grads`` may come from a
    part of the batch, because it only gives the direction of ascent, unless the method adds
    it. At other steps (see `safe_core.SAM`), ``grad_fn`` is not called. A method that adds a
    projected gradient calls ``grad_fn`` once more per step. With loss scaling, unscale the
    gradients if the perturbation is not scale-free, as in `safe_core.cram`.

    Put it last in a chain, because a later transformation would change the step that z and u
    are updated with. Put gradient clipping before it and into ``grad_fn``; within ``base``,
    clipping would also act on the penalty. For gradient accumulation, average the gradients
    before ``update`` and within ``grad_fn``. `optax.MultiSteps` would average only the first.

    Parameters
    ----------
    base : optax.GradientTransformation
        Turns the gradient of loss and penalty into an update. It receives the extra
        arguments of ``update``. `sassha` also receives a function that multiplies by the
        Hessian of the loss at the points where the method takes the gradient. It then needs
        ``rho=0``, because the method perturbs.
    method : Method
        From `safe_core.safe` or another function of `safe_core`.
    rho, penalty : float, array or schedule, optional
        Override the method's values, in their unit: rho counts steps if the radius of the method
        is in steps, and the penalty of a `Pull` is a rate. They may be traced, as in
        `optax.inject_hyperparams`.
    learning_rate : float, array or schedule
        The learning rate of ``base``. Pass it only for a method with a decoupled penalty.
    where : callable, list of str or pytree of bool, optional
        Selects the sparse leaves: ``where(path, leaf)``, with the keys of the path joined
        by ``/``, among all leaves, biases and norms included. Test ``leaf.ndim > 1`` to leave
        those out. A list of paths selects exactly these. The default selects the weights of
        linear, convolution, attention and recurrent layers of Flax, Haiku and Equinox, see
        `safe_core.adapters.jax.weights`.
    layout : Layout, mapping of path to Layout, or callable, optional
        Axis roles, which override those inferred from the path. ``layout(path, leaf)`` may
        return None for unknown.
    importance : pytree, mapping of path to array, or callable, optional
        P of the sparse leaves: per entry, broadcastable, or per input feature. A function
        ``importance(params)`` is called at each dual update, and P is 1 before the first.
    select_on_host : bool
        Select by a host callback instead of counting in the compiled program. This is
        faster on the CPU, and does not support sharded parameters.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        It works under `jax.jit`, `jax.lax.scan` and `jax.vmap`. Only sparse leaves need state.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, no leaf is sparse, ``params`` or ``grad_fn``
        is missing, or a pattern does not fit a leaf. The message names it.

    Warns
    -----
    UserWarning
        If ``init`` finds that a function ``where`` selects leaves of fewer than two axes beside
        weights.
    DenseWeightWarning
        If the method keeps zeros, and leaves that it does not select hold some.

    Examples
    --------
    >>> import safe_core
    >>> x = jax.random.normal(jax.random.key(0), (16, 8))
    >>> y = jax.random.normal(jax.random.key(1), (16, 2))
    >>> def loss(params, x, y):
    ...     return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)
    >>> method = safe_core.safe(sparsity=0.75, steps=200)
    >>> tx = sparse_optimizer(optax.sgd(0.1), method)
    >>> params = {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     grad_fn = lambda params: jax.grad(loss)(params, x, y)
    ...     updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...     params, state = step(params, state)
    >>> params = finalize(params, state, method)
    >>> int((params["kernel"] == 0).sum())
    12
    """
    _checks.flag("select_on_host", select_on_host)
    check_arguments(base, method, rho, penalty, learning_rate, layout, importance)
    inner = optax.with_extra_args_support(base)
    plan = method.plan(has_radius=None if rho is None else not is_static_zero(rho))

    def init(params: PyTree) -> SparseOptimizerState:
        tree = SparseTree.read(params, where, layout)
        values = tree.sparse(params)
        base_state = inner.init(params)
        check_base_state(base_state)
        refuse_averaging(base_state, method)
        source = importance_in_use(importance, method, tree)
        held = initial_importance(importance, source, params, base_state, tree)
        joint = method.sparsity.joint
        known = None if source is None else source.first_metric(held, joint=joint)
        with selecting_on_host(select_on_host), advising_layouts_of(tree):
            method.sparsity.check_names(tree.info.names)
            check_own_zeros(method, tree.info.names, values)
            split = method.init(values, tree.info, known)
            refuse_open_stacks(params, tree, method.sparsity)
        warn_of_chosen_vectors(where, params, tree)
        if any(isinstance(part, FixedZeros) for part in method.sparsity.parts):
            warn_of_free_zeros("the method", params, where)
        flat = no_direction(tree.leaves(params)) if plan.reuses else []
        step = jnp.zeros((), jnp.int32)
        register_with_flax()
        # `optax.tree.map_params` passes params without leaves to see which fields resemble them.
        # An array here tells it to keep this field of the real state as it is.
        setup = StateSetup.of(method, importance, params, tree) if tree.paths else step
        motion = _no_motion(values) if method.measures_steps else None
        state = StepState(split, held, flat, motion)
        return _packed(step, base_state, state, tree, method, setup)

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
        check_update(state, method, importance, params, tree, reuses=plan.reuses)
        gradients = tree.gradients("updates", updates, params)
        second_order = needs_product(state.base)
        check_grad_fn(grad_fn, params, plan, second_order=second_order)

        def gradients_at(leaves: list[Any]) -> list[Any]:
            point = tree.treedef.unflatten(leaves)
            return tree.gradients("what grad_fn returns", gradients_by(grad_fn, point), params)

        base_state = state.base

        # The step calls this once, outside any `jax.lax.cond`: a value assigned to
        # `base_state` inside a branch would be a leaked tracer.
        def base_updates(gradients: list[Any]) -> list[Any]:
            nonlocal base_state
            total = tree.treedef.unflatten(gradients)
            extra = dict(extra_args)
            if second_order:
                extra["hessian_product"] = hessian_product
            out, base_state = inner.update(total, state.base, params, **extra)
            return tree.leaves(out)

        def hessian_product(vectors: list[Any]) -> list[Any]:
            return summed_products(gradients_at, step.points, vectors)

        step = FunctionalStep(
            method,
            [as_jax(x) for x in tree.leaves(params)],
            tree.indices,
            tree.info,
            state.step,
            gradients_at,
            base_updates,
            plan=plan,
            importance=importance_in_use(
                importance, method, tree, known=state.importance is not None
            ),
            rho=at_step("rho", rho, state.step),
            penalty=at_step("penalty", penalty, state.step),
            learning_rate=at_step("learning_rate", learning_rate, state.step),
            second_moments=lambda: second_moments(base_state, tree),
            layouts=tree.layouts,
            keeps_points=second_order,
        )
        with selecting_on_host(select_on_host):
            out, found = step.updates(gradients, _unpacked(state, tree))
        count = optax.safe_increment(state.step)
        new_state = _packed(count, base_state, found, tree, method, state.setup)
        return tree.treedef.unflatten(out), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _no_motion(values: list[jax.Array]) -> jax.Array:
    """Return the motion at the start, with the type that updates return. There may be no values.

    Under `jax.shard_map` the motion varies along the mesh axes along which a parameter does.
    """
    motion = no_motion(values) if values else jnp.zeros(3)
    return sum((jnp.zeros_like(v, shape=(3,), dtype=motion.dtype) for v in values), motion)


def _packed(
    step: jax.Array,
    base: PyTree,
    state: StepState,
    tree: SparseTree,
    method: Method,
    setup: Any,
) -> SparseOptimizerState:
    """Return the state as pytrees, from lists over the sparse leaves."""
    supports = state.split.support
    if method.constraint.support_dtype == "uint8":
        supports = [packed(_in_eights(support)) for support in supports]
    return SparseOptimizerState(
        step=step,
        base=base,
        anchor=tree.masked(state.split.anchor) if method.constraint.has_anchor else None,
        support=tree.masked(supports),
        importance=None if state.importance is None else tree.masked(state.importance),
        flat_direction=tree.treedef.unflatten(state.flat) if state.flat else None,
        setup=setup,
        motion=state.motion,
        scale=tree.masked(state.split.scale) if state.split.scale else None,
    )


def _unpacked(state: SparseOptimizerState, tree: SparseTree) -> StepState:
    """Return the state as lists over the sparse leaves, from pytrees."""
    held = None if state.importance is None else tree.sparse(state.importance)
    flat = []
    if state.flat_direction is not None:
        flat = leaves_like("state.flat_direction", state.flat_direction, tree.treedef)
    return StepState(stored_split(state, tree), held, flat, state.motion)


def finalize(
    params: PyTree,
    state: PyTree,
    method: Method,
    *,
    importance: Any = LAST,
    layout: Layouts = None,
    select_on_host: bool = False,
) -> PyTree:
    """Return the projected parameters, ``proj(x)``, after the last step.

    Kept entries do not change, bit for bit. The others become +0, exactly as many as the
    method's sparsity requires.

    Parameters
    ----------
    params : pytree
        Parameters after the last step. A state of Flax NNX may hold its variables or plain arrays.
    state : pytree
        An optimizer state that contains one `SparseOptimizerState`, possibly nested.
    method : Method
        The method of the run.
    importance : optional
        The default is the last P of the run. None means P = 1, as in Algorithm 1 of the
        paper. A pytree or mapping of path to array replaces P.
    layout : optional
        Not needed: the state holds the axis roles. If given, it must be that of the run.
    select_on_host : optional
        As passed to `sparse_optimizer`.

    Returns
    -------
    pytree
        The projected ``params``, exactly sparse, with variables if ``params`` has them.

    Raises
    ------
    TypeError, ValueError
        If ``state`` does not contain exactly one state of `sparse_optimizer`, is that of an
        ensemble, or is that of another method or layout, or if an argument does not fit the
        parameters. If ``params`` is not traced, also if a sparse leaf holds NaN or infinity.
        The other checks are the same in traced code.

    Warns
    -----
    safe_core.FinalizeWarning
        If ``params`` is not traced, and the run was too short for the method to act (no dual
        update, a schedule that has not reached its end) or took over 1.5 times the steps of the
        method, the projection removes more than a tenth of the norm of the weights, or a leaf
        becomes zero as a whole.

    Examples
    --------
    >>> import safe_core
    >>> method = safe_core.magnitude(0.5)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> finalize(params, state, method)["kernel"].tolist()
    [[0.0, 4.0], [3.0, 0.0]]
    """
    projection = final_projection(params, state, method, importance, layout, select_on_host)
    found = projection.describe()
    if found is not None:
        source = method.importance if isinstance(importance, str) else None
        warn(found, method.constraint, [method.sparsity], source)
    return projection.result()


def _in_eights(support: jax.Array) -> jax.Array:
    """Return a support of which no shard begins within eight entries that a byte will hold."""
    whole: jax.Array = backend_of(support).regrouped(support, units={support.ndim - 1: 8})
    return whole


def at_step(name: str, value: Any, step: jax.Array) -> Any:
    """Return a number, or the value of a schedule at a step, which must be a number too."""
    if not callable(value):
        return value
    found = value(step)
    if found is None:
        raise TypeError(f"{name} must be a number at every step, got None from {value!r}")
    check_number(f"{name} at a step", found)
    return found
