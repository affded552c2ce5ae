"""Check the arguments of `sparse_optimizer`, and the transformation that it wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from safe_core import Layout, Method, _checks

from .nnx_trees import is_nnx_state

__all__ = [
    "check_arguments",
    "check_base",
    "check_base_state",
    "check_grad_fn",
    "check_number",
    "gradients_by",
    "is_static_zero",
    "refuse_averaging",
    "way_to_grad_fn",
]

PyTree = Any


def check_base(base: Any) -> None:
    """Raise unless ``base`` is a transformation, and say how to make one of it."""
    if isinstance(base, optax.GradientTransformation):
        return
    advice = ""
    if hasattr(base, "gradient_transformation"):
        advice = (
            ": it accumulates gradients over several updates; average them before update and "
            "within grad_fn instead, for example with value_and_gradients(..., micro_batches=4)"
        )
    elif callable(base):
        advice = ": pass its result, such as optax.sgd(0.1), not the function"
    raise TypeError(
        f"base must be an optax.GradientTransformation, got {_checks.shown(base)}{advice}"
    )


def check_base_state(base_state: Any) -> None:
    """Raise if ``base`` accumulates gradients, or keeps fast and slow copies of the parameters.

    A base that skips steps would hide how far they move the parameters. One with two copies, as
    lookahead, would need both as ``params``, while z and u belong to one of them.
    """
    found = _state_with("acc_grads", base_state) or _state_with("grad_acc", base_state)
    if found:
        raise ValueError(
            "base must take a step at every update, but it accumulates gradients over several, in "
            f"the state {found}: average them before update and within grad_fn instead, for "
            "example with value_and_gradients(..., micro_batches=4)"
        )
    found = _state_with("fast_state", base_state)
    if found:
        raise ValueError(
            "base must work on one copy of the parameters, but optax.lookahead needs a fast and a "
            f"slow one, got the state {found}"
        )


def refuse_averaging(base_state: Any, method: Method) -> None:
    """Raise if ``base`` is schedule-free and the method moves parameters after its step.

    Such a base evaluates an average of its iterates, which would not follow the move.
    """
    found = _state_with("weight_sum", base_state)
    if found:
        method.refuse_averaging(f"a base that keeps {found}")


def _state_with(field: str, state: Any) -> str:
    """Return the name of the first state within ``state`` that has a field, or ''."""

    def has(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, field)

    found = filter(has, jax.tree.leaves(state, is_leaf=has))
    return next((type(node).__name__ for node in found), "")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is None, a schedule, a scalar array or a number of at least 0."""
    if isinstance(value, (np.ndarray, jax.Array)):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
    elif value is not None and not callable(value):
        _checks.real(name, value, low=0.0)


def is_static_zero(rho: Any) -> bool:
    """Return whether rho is the number 0, and no array, tracer or schedule."""
    return isinstance(rho, (int, float)) and rho == 0


def check_grad_fn(grad_fn: Any, params: PyTree, plan: Any, *, second_order: bool) -> None:
    """Raise unless ``grad_fn`` is a function, or the step does not call it."""
    if plan.perturbs:
        reason = "the method also takes the gradient at perturbed parameters"
    elif plan.projected:
        reason = "the method also takes the gradient at projected parameters"
    elif second_order:
        reason = "base multiplies by the Hessian, which is the derivative of grad_fn"
    else:
        return
    if grad_fn is None:
        raise ValueError(
            "grad_fn must be passed to update(grads, state, params, grad_fn=...), a function of "
            f"params to gradients, because {reason}, got None; {way_to_grad_fn(params)}"
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn must be a function of params to gradients, got {type(grad_fn)!r}")


def way_to_grad_fn(params: PyTree) -> str:
    """Return how to get ``grad_fn`` and pass it, as the end of a sentence."""
    if is_nnx_state(params):
        return (
            "nnx_value_and_gradients(loss_fn)(model, batch) of safe_core.adapters.jax.flax "
            "returns it"
        )
    return (
        "value_and_gradients(loss_fn)(params, batch) returns it. Flax's TrainState does not pass "
        "it on, so use SparseTrainState.apply_gradients(grads=..., grad_fn=...) of "
        "safe_core.adapters.jax.flax; nor do some wrappers, such as optax.lookahead"
    )


def gradients_by(grad_fn: Any, point: PyTree) -> PyTree:
    """Return ``grad_fn(point)``, and say what it gets if it fails on a state of NNX."""
    try:
        return grad_fn(point)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        if is_nnx_state(point):
            error.add_note(
                "grad_fn is called with an nnx.State of the parameters, not with the module. "
                "nnx_value_and_gradients(loss_fn)(model, batch) of safe_core.adapters.jax.flax "
                "returns a grad_fn that takes a state."
            )
        raise


def check_arguments(
    base: Any,
    method: Any,
    rho: Any,
    penalty: Any,
    learning_rate: Any,
    layout: Any,
    importance: Any,
) -> None:
    """Check the arguments of `sparse_optimizer`."""
    check_base(base)
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    if rho is not None and method.perturbation is None:
        raise ValueError(f"rho must be None for a method without perturbation, got {rho!r}")
    decoupled = method.plan().needs_learning_rate
    if decoupled != (learning_rate is not None):
        raise ValueError(
            f"learning_rate must {'be given' if decoupled else 'be None'} for a method with "
            f"decoupled={decoupled!r}, got {learning_rate!r}"
        )
    if penalty is not None and method.constraint.penalty is None:
        raise ValueError(f"penalty must be None for a method without z and u, got {penalty!r}")
    for name, value in (("rho", rho), ("penalty", penalty), ("learning_rate", learning_rate)):
        check_number(name, value)
    if penalty is not None and not method.constraint.allows_other_penalty:
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
