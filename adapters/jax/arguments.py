"""Check the arguments of `sparse_optimizer`, and the transformation that it wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from safe_core import Layout, Method, _checks

__all__ = [
    "check_arguments",
    "check_base",
    "check_base_state",
    "check_grad_fn",
    "check_number",
    "is_static_zero",
    "refuse_averaging",
]


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
    """Raise if ``base`` keeps fast and slow copies of the parameters, as lookahead does.

    It would need both copies as ``params``, while z and u belong to one of them.
    """
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


def check_grad_fn(grad_fn: Any) -> None:
    """Raise unless ``grad_fn`` is a function."""
    if grad_fn is None:
        raise ValueError(
            "grad_fn must be passed to update(grads, state, params, grad_fn=...), a "
            "function of params to gradients, because the method has rho > 0 or takes a gradient "
            "at projected parameters, or base needs Hessian products, got None; a wrapper that "
            "passes no extra arguments on, such as optax.lookahead, cannot hold sparse_optimizer"
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn must be a function of params to gradients, got {type(grad_fn)!r}")


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
