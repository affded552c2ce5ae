"""Record what a state of `sparse_optimizer` was made with, and check later uses against it.

The arrays of a state do not show along which axis a pattern runs or which method made them, and
under `jax.jit` their values cannot be read. The record has no arrays, so it can be checked while
a program is traced.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from safe_core import Layout, Method
from safe_core.layout import resolve
from safe_core.patterns import ByName, Pattern
from safe_core.patterns.base import FractionPattern

from .tree import SparseTree, is_function

__all__ = ["StateSetup", "pattern_text", "register_with_flax", "source_text"]

_ARRAYS = "arrays passed as importance="
_FUNCTION = "a function passed as importance="


@jax.tree_util.register_static
@dataclass(frozen=True)
class StateSetup:
    """Record what a state was made with. JAX sees a pytree node without leaves.

    It holds text, not objects, so that equal settings compare equal in every process and
    checkpoint. Values that may change during a run, such as rho or a penalty, are left out.

    Attributes
    ----------
    sparsity : str
        The pattern, with its final sparsity.
    constraint : str
        The class of the constraint.
    importance : str
        The class of the importance, or how it was passed; empty if P = 1.
    names : tuple of str
        Paths of the sparse leaves.
    layouts : tuple of Layout or None
        Axis roles of the sparse leaves, with non-negative axes.
    """

    sparsity: str
    constraint: str
    importance: str
    names: tuple[str, ...]
    layouts: tuple[Layout | None, ...]

    @classmethod
    def of(cls, method: Method, importance: Any, params: Any, tree: SparseTree) -> StateSetup:
        """Return the record of a state that `sparse_optimizer` makes for ``params``."""
        return cls(
            pattern_text(method.sparsity),
            type(method.constraint).__name__,
            source_text(method, importance),
            tree.info.names,
            _resolved(tree, params),
        )

    def check_update(self, method: Method, importance: Any, params: Any, tree: SparseTree) -> None:
        """Raise unless a step continues with the same settings."""
        self._check_method(method)
        self.check_layouts(params, tree)
        # Arrays are in the state; a function is needed at every dual update.
        self._check_importance(source_text(method, importance), may_be_left_out=(_ARRAYS,))

    def check_method(self, method: Method) -> None:
        """Raise unless a method may project or report on the parameters of the state."""
        self._check_method(method)
        self._check_importance(source_text(method, None), may_be_left_out=(_ARRAYS, _FUNCTION))

    def check_layouts(self, params: Any, tree: SparseTree) -> None:
        """Raise unless the tree has the sparse leaves and axis roles of the state."""
        if tree.info.names != self.names:
            own, given = _listed(self.names), _listed(tree.info.names)
            raise self._other("selection of sparse leaves", own, given)
        pairs = zip(self.names, self.layouts, _resolved(tree, params), strict=True)
        for name, roles, others in pairs:
            if roles != others:
                raise self._other(f"layout of {name}", roles, others)

    def _check_method(self, method: Method) -> None:
        for name, own, given in (
            ("sparsity", self.sparsity, pattern_text(method.sparsity)),
            ("constraint", self.constraint, type(method.constraint).__name__),
        ):
            if own != given:
                raise self._other(name, own, given)

    def _check_importance(self, given: str, *, may_be_left_out: tuple[str, ...]) -> None:
        left_out = given == "" and self.importance in may_be_left_out
        if given != self.importance and not left_out:
            raise self._other("importance", self.importance or "none", given or "none")

    def _other(self, name: str, own: Any, given: Any) -> ValueError:
        return ValueError(
            "method and layout must be those that state was trained with (pass no layout= to "
            f"finalize): its {name} is {own}, got {given}"
        )

    def as_text(self) -> str:
        """Return the record as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> StateSetup:
        """Return the record from `as_text`."""
        held = json.loads(text)
        layouts = [None if layout is None else Layout(**layout) for layout in held["layouts"]]
        return cls(**{**held, "names": tuple(held["names"]), "layouts": tuple(layouts)})


def pattern_text(pattern: Pattern) -> str:
    """Return the text of a pattern, with its final sparsity in place of a schedule.

    The parameters end at the final sparsity, so a schedule may be replaced by its end.
    """
    if isinstance(pattern, ByName):
        # Sorted, because the order of names means nothing.
        named = {name: pattern_text(pattern.of(name)) for name in sorted(pattern.named_arrays)}
        default = pattern.default and pattern_text(pattern.default)
        return f"ByName({', '.join(f'{k!r}: {v}' for k, v in named.items())}, default={default})"
    if not isinstance(pattern, FractionPattern):
        return repr(pattern)
    values = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}
    values["sparsity"] = pattern.fractions()[-1]
    parts = [f"{name}={str(x) if name == 'sparsity' else repr(x)}" for name, x in values.items()]
    return f"{type(pattern).__name__}({', '.join(parts)})"


def source_text(method: Method, importance: Any) -> str:
    """Return which importance a method and the argument ``importance=`` give."""
    if method.importance is not None:
        return type(method.importance).__name__
    if importance is None:
        return ""
    return _FUNCTION if is_function(importance) else _ARRAYS


def register_with_flax() -> None:
    """Let `flax.serialization` save the record, if it is imported.

    We must not import Flax. Saving calls no code of ours, so register whenever a state is
    made or read.
    """
    module = sys.modules.get("flax.serialization")
    if module is None:
        return
    module.register_serialization_state(
        StateSetup,
        lambda setup: {"setup": setup.as_text()},
        lambda setup, held: StateSetup.from_text(held["setup"]) if held else setup,
        override=True,
    )


def _resolved(tree: SparseTree, params: Any) -> tuple[Layout | None, ...]:
    """Return the layouts with non-negative axes, so that equal roles compare equal."""
    named = zip(tree.sparse(params), tree.info.layouts, tree.info.names, strict=True)
    return tuple(layout and resolve(layout, x.ndim, name) for x, layout, name in named)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ..." if len(names) > 4 else shown
