"""Select the sparse parameters of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from safe_core import ByName, FixedZeros, Layout, Method, Pattern, _checks
from safe_core.finalization import listed
from safe_core.layout import chosen_layout
from safe_core.where import as_names, refuse_unknown

from .groups import GroupRules, pattern_of, settings_of
from .modules import JoinedModules, names_of
from .weights import ModelWeight, hidden_weights, may_be_pruned, model_weights

__all__ = ["Selected", "Selection", "refuse_flat_parameters"]


class Selected(NamedTuple):
    """Name, axis roles and pattern of one sparse parameter.

    ``known`` is False for a parameter that the model holds, but not as the weight of a layer of
    known type.
    """

    name: str
    layout: Layout | None
    pattern: Pattern
    known: bool = True


class Selection(NamedTuple):
    """The rules that select the sparse parameters of an optimizer.

    Attributes
    ----------
    base : torch.optim.Optimizer
    method : Method
    model : torch.nn.Module or None
        From `joined`.
    where, layout
        Arguments of `SparseOptimizer`.
    """

    base: Optimizer
    method: Method
    model: nn.Module | None
    where: Any
    layout: Any

    def selected(self) -> dict[Tensor, Selected]:
        """Return the parameters to make sparse, in the order of the groups."""
        self._refuse_no_choice()
        self._refuse_uninitialised()
        known = {} if self.model is None else model_weights(self.model)
        self._refuse_hidden()
        selected: dict[Tensor, Selected] = {}
        names = self.names()
        self._refuse_other_names_of_tied()
        refuse_unknown(as_names(self.where) or (), list(names.values()))
        for g, group in enumerate(self.base.param_groups):
            settings = self._settings(g, group)
            pattern = pattern_of(settings, self.method)
            before = len(selected)
            for p in group["params"]:
                _refuse_complex(names[p], p)
                if self.chooses(names[p], p, pattern, settings, known):
                    layout = known[p].layout if p in known else None
                    found = chosen_layout(names[p], p, self.layout, layout)
                    typed = p not in known or not known[p].reason
                    selected[p] = Selected(names[p], found, pattern.of(names[p]), typed)
            if len(selected) == before:
                _refuse_idle_settings(g, group, settings)
        self._refuse_strange_layouts(names)
        _refuse_shared_names(selected)
        if not selected:
            held = [names[p] for group in self.base.param_groups for p in group["params"]]
            refuses = self.where is not None and not any(self.asks(n, p) for p, n in names.items())
            why = (
                f"where= selects none of the {len(held)} that it holds: {listed(held)}"
                if refuses
                else f"model= and where= selected none of its {len(held)}; does base hold the "
                "parameters of this model?"
            )
            raise ValueError(f"no parameter of base is sparse: {why}")
        return selected

    def chooses(
        self,
        name: str,
        p: Tensor,
        pattern: Pattern,
        settings: Mapping[str, Any],
        known: Mapping[Any, ModelWeight],
    ) -> bool:
        """Return whether a parameter is to be sparse.

        An option of the group wins over ``where``, and ``where`` over the model. A pattern that
        keeps zeros needs no layout, so it also keeps those in modules of unknown types.
        """
        sparsify, prunable = settings.get("sparsify"), p in known and not known[p].reason
        if p in known and _keeps_zeros(pattern, name):
            prunable = may_be_pruned(p, known[p])
        if sparsify is False:
            return False
        if sparsify is True and (prunable or p.ndim >= 2):
            chosen = True
        elif self.where is not None:
            chosen = self.asks(name, p)
        else:
            chosen = prunable
        if chosen and not p.is_floating_point():
            raise TypeError(f"{name} must be real floating to be sparse, got {p.dtype}")
        return chosen

    def asks(self, name: str, p: Tensor) -> bool:
        """Return the answer of ``where`` for a parameter: a function, or a list of names."""
        if (listed := as_names(self.where)) is not None:
            return name in listed
        answer = self.where(name, p)
        if not isinstance(answer, bool):
            raise TypeError(
                f"where must return True or False, got {_checks.shown(answer)} for {name}"
            )
        return answer

    def _refuse_other_names_of_tied(self) -> None:
        """Raise if ``where`` or the method names a shared parameter, and not by its first name."""
        if self.model is None or isinstance(self.model, JoinedModules):
            return
        names = names_of(self.model)
        asked = {*(as_names(self.where) or ()), *self.method.sparsity.named_arrays}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if name in asked and names[p] != name and name not in names.values():
                raise ValueError(
                    f"a parameter that modules share must be named {names[p]!r}, the first of its "
                    f"names, got {name!r}"
                )

    def names(self) -> dict[Tensor, str]:
        """Return the names of all parameters: those of the model, or of the base."""
        found: dict[Tensor, str] = {} if self.model is None else names_of(self.model)
        for g, group in enumerate(self.base.param_groups):
            places = [f"param_groups[{g}][{i}]" for i in range(len(group["params"]))]
            given = group.get("param_names", places)
            for p, name in zip(group["params"], given, strict=True):
                found.setdefault(p, name)
        return found

    def _settings(self, g: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return our options of a param group, checked."""
        settings = settings_of(group, self.base)
        GroupRules.read(settings, self.method)
        if self.method.plan().needs_learning_rate and "lr" not in group:
            raise ValueError(
                "base must have a learning rate, 'lr', in its param groups for a decoupled "
                f"penalty, got {type(self.base).__qualname__} without one"
            )
        if settings.get("sparsify") is not None:
            _checks.flag(f"sparsify of param_groups[{g}]", settings["sparsify"])
        return settings

    def _refuse_no_choice(self) -> None:
        if self.model is not None or self.where is not None:
            return
        if not any(group.get("sparsify") for group in self.base.param_groups):
            raise ValueError(
                "sparse parameters must be selected: pass model= (selects the weights of its "
                "linear, convolution, attention and recurrent layers) or where= (a function of "
                'name and parameter), or set "sparsify": True on a param group, got none of them'
            )

    def _refuse_uninitialised(self) -> None:
        params = [] if self.model is None else list(self.model.named_parameters())
        held = [("a parameter of base", p) for g in self.base.param_groups for p in g["params"]]
        lazy = [name for name, p in (*params, *held) if is_lazy(p)]
        if lazy:
            raise ValueError(
                "parameters must be initialised before base and this optimizer are made: run "
                f"model(inputs) once, got an uninitialised {lazy[0]} of a lazy module"
            )

    def _refuse_hidden(self) -> None:
        """Raise for a layer that would be selected if its weight were a parameter.

        If the parameters that a weight is computed from were sparse, the weight would not have the
        right number of zeros: a mask has zeros of its own, and an orthogonal matrix none.
        """
        if self.model is None:
            return
        names = self.names()
        sparsify = {
            p: settings_of(group, self.base).get("sparsify")
            for group in self.base.param_groups
            for p in group["params"]
        }
        for hidden in hidden_weights(self.model):
            held = [p for p in hidden.sources if p in sparsify and p.requires_grad]
            left_out = any(sparsify[p] is False for p in held)
            if self.where is not None:
                left_out = left_out or not any(self.asks(names[p], p) for p in held)
            if held and not left_out:
                what = "masks" if hidden.masked else "computes"
                by = "torch.nn.utils.prune" if hidden.masked else "its layer"
                raise ValueError(
                    f"weights that are to be sparse must be parameters, but {by} {what} "
                    f"{hidden.name}: call {hidden.remove} before base is made, or leave it dense "
                    'with where= or "sparsify": False on its param group'
                )

    def _refuse_strange_layouts(self, names: Mapping[Tensor, str]) -> None:
        if isinstance(self.layout, Mapping) and not set(self.layout) <= set(names.values()):
            strange = sorted(set(self.layout) - set(names.values()))[0]
            raise ValueError(f"layout names {strange!r}, which is no parameter of base or model")


def _keeps_zeros(pattern: Pattern, name: str) -> bool:
    """Return whether `FixedZeros` is the pattern of the parameter ``name``, which may have none."""
    if isinstance(pattern, ByName) and pattern.default is None:
        return name in pattern.named_arrays and isinstance(pattern.of(name), FixedZeros)
    return isinstance(pattern.of(name), FixedZeros)


def _refuse_shared_names(selected: Mapping[Tensor, Selected]) -> None:
    names = [chosen.name for chosen in selected.values()]
    shared = (
        [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    )
    if shared:
        raise ValueError(
            f"sparse parameters must have different names, got {shared[0]} twice: pass model=, or "
            "several modules as model={name: module}"
        )


def _refuse_complex(name: str, p: Tensor) -> None:
    if p.is_complex():
        raise TypeError(
            f"{name} must be real, because the norm is over all parameters, got {p.dtype}"
        )


def _refuse_idle_settings(g: int, group: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise if a param group without sparse parameters asks for sparsity."""
    asked = [key for key in ("sparsity", "sparsify") if settings.get(key) is not None]
    if asked and group["params"] and settings.get("sparsify") is not False:
        advice = (
            "only parameters with two or more axes can be, unless where= selects them"
            if settings.get("sparsify")
            else 'set "sparsify": True on it, or select them with where='
        )
        raise ValueError(
            f"param_groups[{g}] sets {asked[0]!r} to {_checks.shown(settings[asked[0]])}, but none "
            f"of its {len(group['params'])} parameters is sparse: {advice}"
        )


def refuse_flat_parameters(model: nn.Module | None) -> None:
    """Raise for a model under the first version of FSDP.

    It flattens and concatenates parameters, so their axes and names are lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None:
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must be sharded by torch.distributed.fsdp.fully_shard, got one of "
            "FullyShardedDataParallel, whose parameters have lost their axes"
        )
