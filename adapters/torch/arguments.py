"""Check the arguments of the constructor of `SparseOptimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from safe_core import Layout, Method, _checks
from safe_core.where import as_names

from .selection import refuse_flat_parameters

__all__ = ["check_arguments"]


def check_arguments(
    base: Any,
    method: Any,
    model: Any,
    where: Any,
    layout: Any,
    importance: Any,
    compile: bool,
) -> None:
    """Raise if an argument of `SparseOptimizer` has the wrong type; ``model`` is from `joined`."""
    _check_base(base, compile)
    if not isinstance(method, Method):
        hint = ": call it, as in safe_core.safe(0.9, steps=1000)" if callable(method) else ""
        raise TypeError(f"method must be a safe_core.Method, got {_checks.shown(method)}{hint}")
    refuse_flat_parameters(model)
    if isinstance(where, (list, tuple, set, frozenset)) and not where:
        raise ValueError(f"where must name at least one parameter, got {where!r}")
    if where is not None and not _is_function(where) and as_names(where) is None:
        raise TypeError(
            "where must be a function of name and parameter, or a list of names, got "
            f"{_checks.shown(where)}"
        )
    if layout is not None and not (isinstance(layout, (Layout, Mapping)) or _is_function(layout)):
        raise TypeError(
            f"layout must be a Layout, a mapping or a function, got {_checks.shown(layout)}"
        )
    if importance is not None and method.importance is not None:
        raise ValueError(
            f"importance must be given once: the method has {method.importance!r} already"
        )
    if importance is not None and not (isinstance(importance, Mapping) or _is_function(importance)):
        raise TypeError(
            "importance must be a mapping or a function, and one of safe_core.importance belongs "
            f"to the method, got {_checks.shown(importance)}"
        )


def _is_function(value: Any) -> bool:
    """Return whether a value can be called and is not a class, which would give an instance."""
    return callable(value) and not isinstance(value, type)


def _check_base(base: Any, compile: bool) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"base must be an instance, such as {base.__qualname__}(model.parameters(), lr=0.1), "
            f"got the class {base.__qualname__}"
        )
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be an optimizer of torch.optim, got {_checks.shown(base)}")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            "base must not be differentiable, because masks and projections change parameters in "
            f"place, got {type(base).__name__} with differentiable=True"
        )
    if getattr(base, "perturbs", False):
        raise ValueError(
            "base must not perturb, because the method says where gradients are taken: set rho=0 "
            "in all its groups, and use a method that perturbs, such as safe_core.safe, got "
            f"{type(base).__name__} with rho > 0"
        )
    if compile and hasattr(base, "backward"):
        raise ValueError(
            "compile must be False for a second-order base, whose counts of steps are Python "
            f"numbers, got True with {type(base).__name__}"
        )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("base must not need a closure of its own, got LBFGS")
