"""Report on the sparse leaves of a parameter tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safe_core import Method, _checks
from safe_core.advice import Course
from safe_core.projection import apply_support
from safe_core.report import Report, TensorReport, outlook, sums
from safe_core.schedules import Constant

from .arguments import check_number
from .evaluation import last_metric
from .nnx_trees import as_pure
from .state import check_anchor, check_layout, find_state, split_of, trained_tree
from .transform import at_step

__all__ = ["report"]

PyTree = Any


def report(
    params: PyTree,
    state: PyTree,
    method: Method,
    *,
    evaluate: Callable[[PyTree], Any] | None = None,
    steps: int | None = None,
    penalty: Any = None,
    layout: Any = None,
) -> Report:
    """Return how far the sparse leaves are from the constraint, and what to change.

    This computes a projection and a dual update and changes no state. A training step does
    nothing for it. Compile a function that returns the report, or in a step its
    `Report.scalars`, a flat dictionary for a metric writer. `Report.advice` reads the figures,
    so use it outside of `jax.jit`.

    Parameters
    ----------
    params : pytree
        A state of Flax NNX may hold its variables or plain arrays, and ``evaluate`` gets the same.
    state : pytree
        An optimizer state that contains one `SparseOptimizerState`, possibly nested.
    method : Method
        The method of the run.
    evaluate : callable, optional
        Function of the parameters that returns the loss, the accuracy or another number. It is
        called with x and with the result of `sparse_weights`, so the report shows what the
        projected network would lose.
    steps : int, optional
        Steps of the whole run, by which the figures are judged. By default they are those that
        the schedule of the penalty was made for.
    penalty : float, array or schedule, optional
        As passed to `sparse_optimizer`.
    layout : optional
        Not needed: the state holds the axis roles. If given, it must be that of the run.

    Returns
    -------
    safe_core.report.Report
        Its figures are scalar arrays.

    Raises
    ------
    TypeError, ValueError
        As for `finalize`, or if ``evaluate`` does not return one number.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> method = safe_core.admm(0.5, steps=640)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> round(float(report(params, state, method).scalars()["distance"]), 4)
    2.2361
    >>> compiled = jax.jit(lambda params, state: report(params, state, method))
    >>> compiled(params, state).advice  # on course, or too early to tell
    []
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    check_number("penalty", penalty)
    if steps is not None:
        _checks.integer("steps", steps, low=1)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the parameters, got {evaluate!r}")
    given: Any = jax.tree.structure(params)
    plain, ours = as_pure(params), as_pure(find_state(state))
    tree = trained_tree(plain, ours, method, layout)
    values = tree.sparse(plain)
    check_anchor(ours, method)
    split = split_of(ours, tree)
    check_layout(split.support, method, tree)
    metric = last_metric(method, ours, tree)
    compared = outlook(method, values, split, ours.step, tree.info, metric)
    schedule = method.constraint.penalty if penalty is None else penalty
    weight = 0.0 if schedule is None else at_step("penalty", schedule, ours.step)
    found = zip(tree.info.names, values, sums(values, *compared), strict=True)
    rows = [TensorReport.of(name, x.size, method.sparsity, part, weight) for name, x, part in found]
    course = Course(
        method.constraint,
        (method.sparsity,),
        _static(schedule),
        steps,
        narrow=tuple(
            name for name, x in zip(tree.info.names, values, strict=True) if x.dtype.itemsize == 2
        ),
    )
    if evaluate is None:
        return _Report(ours.step, rows, course=course)
    dense = _number(evaluate(params))
    projected = tree.replaced(tree.leaves(plain), apply_support(values, compared[2]))
    sparse = _number(evaluate(given.unflatten(jax.tree.leaves(projected))))
    return _Report(ours.step, rows, dense, sparse, course)


def _static(penalty: Any) -> Any:
    """Return a penalty as a schedule, or None for an array, whose value may be traced."""
    if callable(penalty):
        return penalty
    return Constant(penalty) if isinstance(penalty, (int, float)) else None


def _number(value: Any) -> jax.Array:
    try:
        found = jnp.asarray(value)
    except (TypeError, ValueError):
        found = None
    if found is None or found.size != 1:
        raise TypeError(f"evaluate must return one number, got {_checks.shown(value)}")
    return found.reshape(())


_FIGURES = slice(TensorReport._fields.index("achieved"), None)


@jax.tree_util.register_pytree_node_class
class _Report(Report):
    """Report that a compiled function can return: names and the facts of the run are static."""

    __slots__ = ()

    def __str__(self) -> str:
        # Numbers that are traced cannot be read, and those of an ensemble have no one summary.
        numbers = jax.tree.leaves(self)
        readable = not any(isinstance(x, jax.core.Tracer) or jnp.ndim(x) for x in numbers)
        return super().__str__() if readable else repr(self)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        figures = [tuple(row)[_FIGURES] for row in self.tensors]
        static = tuple(tuple(row)[: _FIGURES.start] for row in self.tensors)
        return (self.step, figures, self.dense_value, self.sparse_value), (static, self.course)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> _Report:
        (facts, course), (step, figures, dense, sparse) = static, children
        rows = [TensorReport(*known, *row) for known, row in zip(facts, figures, strict=True)]
        return cls(step, rows, dense, sparse, course)
