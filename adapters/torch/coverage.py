"""List which weights of a model an optimizer makes sparse, and warn about the others."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safe_core import FixedZeros, Method, Pattern
from safe_core.backends.torch_sharding import is_sharded
from safe_core.coverage import Coverage, DenseWeightWarning, WeightCoverage, by_reason
from safe_core.layout import resolve
from safe_core.own_zeros import check_own_zeros
from safe_core.where import as_names, warn_of_vectors

from .groups import settings_of
from .modules import JoinedModules
from .selection import Selected, Selection
from .weights import ModelWeight, hidden_weights, is_matrix, is_pruned, model_weights

__all__ = ["coverage_of", "refuse_dense", "warn_of_chosen_vectors", "warn_of_dense"]


def coverage_of(selection: Selection, selected: Any, constrained: Collection[Tensor]) -> Coverage:
    """Return the coverage of the model or, without a model, of the parameters of the base.

    Parameters
    ----------
    selection : Selection
    selected : mapping of parameter to Selected
        What ``selection`` chose.
    constrained : collection of parameter
        Those of ``selected`` that `SparseOptimizer.finalize` projects.
    """
    known: Any = {} if selection.model is None else model_weights(selection.model)
    held = {
        p: settings_of(group, selection.base).get("sparsify")
        for group in selection.base.param_groups
        for p in group["params"]
    }
    chosen, elsewhere, rows = set(constrained), _trained_elsewhere(selection.model, held), []
    for p, name in selection.names().items():
        listed = p in selected or is_matrix(p) or (p in known and not known[p].reason)
        if p in chosen:
            reason, expected = _why_unmasked(selected[p], p), True
        elif not listed:
            continue
        elif p in elsewhere:
            reason, expected = "base holds nothing of its module", True
        else:
            reason, expected = _why_dense(selection, name, p, known.get(p), held, p in selected)
        rows.append(WeightCoverage(name, tuple(p.shape), reason, expected))
    if selection.model is not None:
        expected = selection.where is not None
        rows += [
            WeightCoverage(hidden.name, hidden.shape, "the weight is not a parameter", expected)
            for hidden in hidden_weights(selection.model)
            if hidden.shape and not hidden.sources
        ]
    return Coverage(tuple(rows))


def _trained_elsewhere(model: Any, held: Collection[Tensor]) -> set[Tensor]:
    """Return the parameters of modules, among several, of which the base holds none.

    Such a module is given for its buffers, as the other network of a GAN is.
    """
    if not isinstance(model, JoinedModules):
        return set()
    parts = [set(module.parameters()) for module in model.children()]
    return {p for part in parts if part.isdisjoint(held) for p in part}


def _why_dense(
    selection: Selection,
    name: str,
    p: Tensor,
    known: ModelWeight | None,
    held: dict[Tensor, Any],
    selected: bool,
) -> tuple[str, bool]:
    """Return why a parameter stays dense, and whether that was chosen or is documented."""
    frozen = "requires_grad is False"
    if selected:  # and yet not constrained
        return frozen, False
    if held.get(p) is False:
        return '"sparsify" is False on the param group', True
    if selection.where is not None:
        asked = p not in held and selection.asks(name, p)
        if asked:
            return "base does not hold the parameter", False
        listed = as_names(selection.where) is not None
        return "where= does not list it" if listed else "where= said False", True
    if selection.model is None:
        return '"sparsify" is not set on the param group', True
    if known is None:
        return "model= does not hold the parameter", True
    if known.reason and known.documented:
        return known.reason, True
    if not p.requires_grad:
        return frozen, False
    if p not in held:
        return "base does not hold the parameter", False
    return known.reason or "its param group was added after the last selection", False


def _why_unmasked(chosen: Selected, p: Tensor) -> str:
    """Return why a selected weight is dense, or an empty text.

    A ragged pattern may fit no unit into it, and one that keeps its own zeros may have none.
    The zeros of a sharded weight are not counted, because only some processes may ask.
    """
    pattern = _pattern(chosen)
    axes = None if chosen.layout is None else resolve(chosen.layout, p.ndim, chosen.name)
    if reason := pattern.why_whole(tuple(p.shape), axes, chosen.name):
        return reason
    if not isinstance(pattern, FixedZeros) or is_sharded(p) or p.is_meta:
        return ""
    if is_pruned(p, chosen.known):
        return ""
    zero = not bool(p.detach().any())
    return "it is zero everywhere, so it was not pruned" if zero else "it has no zeros to keep"


@torch.no_grad()
def refuse_dense(
    method: Method, selected: Mapping[Tensor, Selected], params: Sequence[Tensor]
) -> None:
    """Raise or warn if the weights should keep their own zeros, and have none."""
    own = [p for p in params if isinstance(_pattern(selected[p]), FixedZeros)]
    if own:  # in a param group, or of the method
        names = [selected[p].name for p in own]
        check_own_zeros(method, names, own, lambda p: p.is_meta or is_pruned(p, selected[p].known))


def _pattern(chosen: Selected) -> Pattern:
    return chosen.pattern.of(chosen.name)


def warn_of_chosen_vectors(where: Any, selected: Mapping[Tensor, Selected]) -> None:
    """Warn if a function ``where`` chose parameters of fewer than two axes beside weights."""
    if callable(where):
        rows = [(chosen.name, p, chosen.layout) for p, chosen in selected.items()]
        warn_of_vectors(rows, "lambda name, p: p.ndim > 1 and ...")


def warn_of_dense(coverage: Coverage, where: Any, *, stacklevel: int) -> None:
    """Warn once about weights that stay dense although the user did not exclude them.

    If ``where`` is given, it selects these weights, but they are frozen or not in the base.
    """
    dense = coverage.unexpected
    remedy = (
        'To choose, pass where= or set "sparsify" to True or False on their param groups'
        if where is None
        else "To make them sparse, set requires_grad=True first, and add them to base; to leave "
        "them dense, exclude them with where="
    )
    if dense:
        warnings.warn(
            f"{len(dense):,} of {len(coverage.weights):,} weights stay dense: {by_reason(dense)}. "
            f"{remedy}; optimizer.coverage() lists all weights",
            DenseWeightWarning,
            stacklevel=stacklevel,
        )
