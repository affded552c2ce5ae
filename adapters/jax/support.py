"""Keep the support of sparse parameters after training, and check it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from safe_core.arguments import refuse_filled
from safe_core.constraints.base import select_support
from safe_core.own_zeros import warn_without_zeros
from safe_core.patterns import as_pattern

from .arguments import check_base, check_base_state
from .coverage import warn_of_free_zeros
from .state import check_selection, check_shapes, sparse_leaves
from .tree import SparseTree, advising_layouts_of, refuse_open_stacks, warn_of_chosen_vectors

__all__ = ["FixedSupportState", "check_sparsity", "fixed_support"]

PyTree = Any
_WAY = "pass what finalize() returns; later updates move its zeros"


class FixedSupportState(NamedTuple):
    """State of `fixed_support`.

    Attributes
    ----------
    base : pytree
        State of the base transformation.
    support : pytree of bool arrays
        Where sparse leaves may be non-zero. Dense leaves are `optax.MaskedNode`.
    """

    base: PyTree
    support: PyTree


def fixed_support(
    base: optax.GradientTransformation, *, where: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Fine-tune sparse parameters with a fixed mask: zeros stay exactly zero.

    Gradients of zeros are set to zero before ``base``, and its updates of zeros are discarded.
    So neither weight decay nor momentum makes a zero non-zero.

    Parameters
    ----------
    base : optax.GradientTransformation
        It receives the extra arguments of ``update``.
    where : callable, list of str or pytree of bool, optional
        Selects the sparse leaves, as for `sparse_optimizer`. The others train freely.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        ``init(params)`` takes the support from the zeros of ``params``.

    Raises
    ------
    TypeError, ValueError
        If ``base`` is not a transformation, no leaf is sparse, or ``params`` is missing.

    Warns
    -----
    DenseWeightWarning
        If ``init`` gets ``params`` without zeros, which would train dense, or with zeros in leaves
        that it does not select because their names are no names of weights.

    Examples
    --------
    >>> tx = fixed_support(optax.adamw(0.1))
    >>> params = {"kernel": jnp.asarray([[0.0, 2.0], [3.0, 0.0]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
    >>> (optax.apply_updates(params, updates)["kernel"] == 0).tolist()
    [[True, False], [False, True]]
    """
    check_base(base)
    inner = optax.with_extra_args_support(base)

    def init(params: PyTree) -> FixedSupportState:
        tree = SparseTree.read(params, where, None)
        warn_of_chosen_vectors(where, params, tree)
        support = [x != 0 for x in tree.sparse(params)]
        base_state = inner.init(params)
        check_base_state(base_state)
        warn_without_zeros("fixed_support", tree.info.names, tree.sparse(params))
        warn_of_free_zeros("fixed_support", params, where)
        return FixedSupportState(base_state, tree.masked(support))

    def update(
        updates: PyTree, state: FixedSupportState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, FixedSupportState]:
        if params is None:
            raise ValueError("params must be passed to update(grads, state, params), got None")
        if not isinstance(state, FixedSupportState):
            raise TypeError(f"state must be that of fixed_support, got {type(state)!r}")
        tree = SparseTree.read(params, where, None)
        check_selection(sparse_leaves(params, state), tree)
        check_shapes(params, state, tree)
        support = tree.sparse(state.support)
        gradients = tree.gradients("updates", updates, params)
        masked = tree.replaced(
            gradients,
            [
                jnp.where(mask, gradients[i], jnp.zeros_like(gradients[i]))
                for i, mask in zip(tree.indices, support, strict=True)
            ],
        )
        out, base_state = inner.update(masked, state.base, params, **extra_args)
        steps = tree.leaves(out)
        # -x rather than 0, so that an entry that became non-zero is reset: x + (-x) is +0.
        kept = [
            jnp.where(mask, steps[i].astype(x.dtype), -x)
            for i, x, mask in zip(tree.indices, tree.sparse(params), support, strict=True)
        ]
        return tree.replaced(steps, kept), FixedSupportState(base_state, state.support)

    return optax.GradientTransformationExtraArgs(init, update)


def check_sparsity(params: PyTree, sparsity: Any, *, where: Any = None, layout: Any = None) -> None:
    """Raise unless the parameters have the given sparsity.

    Call this before saving or serving a model: another optimizer, or merging an adapter such
    as LoRA, makes zeros non-zero without warning.

    Parameters
    ----------
    params : pytree
    sparsity : float, str or pattern
        As for `safe_core.safe`.
    where, layout : optional
        As for `sparse_optimizer`.

    Check the members of an ensemble one by one. Together they may have the right number of zeros
    although one member has too few and another too many.

    Raises
    ------
    TypeError, ValueError
        If an entry that must be zero is not. The message names the leaves.

    Examples
    --------
    >>> check_sparsity({"kernel": jnp.asarray([[0.0, 2.0], [3.0, 0.0]])}, 0.5)
    >>> check_sparsity({"kernel": jnp.asarray([[1.0, 2.0], [3.0, 0.0]])}, 0.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: params must be sparse, got non-zeros in kernel (1 too many): pass what finalize()...
    """
    tree = SparseTree.read(params, where, layout)
    values = tree.sparse(params)
    # Only zero or non-zero matters: a projection by magnitude would call any small entry wrong.
    filled_in = [(x != 0).astype(jnp.float32) for x in values]
    pattern = as_pattern(sparsity)
    with advising_layouts_of(tree):
        support = select_support(filled_in, pattern, tree.info, None, step=None)
        refuse_open_stacks(params, tree, pattern)
    filled = [jnp.sum((x != 0) & ~mask) for x, mask in zip(values, support, strict=True)]
    counts = [int(count) for count in jax.device_get(filled)]
    refuse_filled("params", tree.info.names, counts, _WAY)
