"""Find the weights of a torch model that can be pruned, and the roles of their axes.

The type of the module decides. The shape of a weight cannot tell which axis holds the inputs, and
its name is ``weight`` in layers, norms and embeddings alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from safe_core.backends.torch_sharding import whole
from safe_core.layout import OUTPUT_INPUT, Layout

__all__ = [
    "HiddenWeight",
    "ModelWeight",
    "hidden_weights",
    "is_matrix",
    "is_pruned",
    "may_be_pruned",
    "model_weights",
    "prunable_weights",
]

_INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_UNKNOWN = "model= does not know the type of the module"
_EMBEDDING = "embeddings stay dense"
_TIED = "weights tied to an embedding stay dense"
_NORM = "normalisation layers stay dense"
_BIAS = "biases stay dense"


class ModelWeight(NamedTuple):
    """Hold the layout of one parameter of ``model=``, or the reason to leave it out.

    Attributes
    ----------
    layout : Layout or None
        Axis roles; None if no layout can express them, or the parameter cannot be pruned.
    reason : str
        Why the parameter is left out, as the end of "because ..."; empty if it can be pruned.
    documented : bool
        Whether the documentation excludes it, as it does embeddings, norms and biases.
    """

    layout: Layout | None
    reason: str = ""
    documented: bool = True


class HiddenWeight(NamedTuple):
    """A weight of a known layer that is not one of its parameters.

    Attributes
    ----------
    name : str
    shape : tuple of int
    sources : tuple of Parameter
        The parameters that the layer computes it from; none if it is fixed, or something else
        computes it.
    masked : bool
        Whether `torch.nn.utils.prune` computes it.
    remove : str
        The call that makes it a parameter again.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[nn.Parameter, ...]
    masked: bool
    remove: str


def _layer_weights(module: nn.Module) -> dict[str, Layout | None] | None:
    """Return the layouts of a layer's own weights by attribute name; None for unknown types."""
    if isinstance(module, _PLAIN):
        return {"weight": OUTPUT_INPUT}
    if isinstance(module, _TRANSPOSED):
        # With groups the first axis mixes group and input, which no layout expresses.
        return {"weight": _INPUT_OUTPUT if module.groups == 1 else None}
    if isinstance(module, nn.Bilinear):
        return {"weight": Layout(input_axes=(1, 2), output_axes=(0,))}
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(_ATTENTION, OUTPUT_INPUT)
    if isinstance(module, nn.RNNBase):
        return dict.fromkeys(_recurrent(module), OUTPUT_INPUT)
    if isinstance(module, nn.RNNCellBase):
        return dict.fromkeys(("weight_ih", "weight_hh"), OUTPUT_INPUT)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        # GPT-2's linear layer in transformers, known by name because we must not import it.
        return {"weight": _INPUT_OUTPUT}
    return None


def _recurrent(module: nn.RNNBase) -> Iterator[str]:
    """Yield the weight names of a recurrent module; the output axis stacks its gates."""
    kinds = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
    for layer in range(module.num_layers):
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            yield from (f"weight_{kind}_l{layer}{suffix}" for kind in kinds)


def prunable_weights(model: nn.Module) -> dict[nn.Parameter, Layout | None]:
    """Return the weights of linear, convolution, attention and recurrent layers with layouts.

    Biases, norms and embeddings are excluded. So is a weight that is tied to an embedding, or
    that its layer computes from other parameters, as under weight normalisation or a mask of
    `torch.nn.utils.prune`.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of Parameter to Layout or None
        Each tied weight appears once. None means that no layout can express the axis roles.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    >>> list(prunable_weights(model).values())
    [Layout(input_axes=(1,), output_axes=(0,), batch_axes=())]
    """
    return {p: found.layout for p, found in model_weights(model).items() if not found.reason}


def model_weights(model: nn.Module) -> dict[nn.Parameter, ModelWeight]:
    """Return what the modules of a model tell about each of its parameters.

    A parameter of several modules is prunable if one of them is a layer that uses it as its
    weight, unless another is an embedding.
    """
    found: dict[nn.Parameter, ModelWeight] = {}
    for module in model.modules():
        if isinstance(module, _EMBEDDINGS):
            for own in _sources(module, "weight") or module.parameters(recurse=False):
                found[own] = ModelWeight(None, _EMBEDDING)
    for hidden in hidden_weights(model):
        reason = _hidden_reason(hidden)
        for source in hidden.sources:
            found.setdefault(source, ModelWeight(None, reason, documented=False))
    decided = set(found)
    for module in model.modules():
        known = _layer_weights(module)
        # `_parameters`, because getattr would also return a parametrized weight, which is
        # computed anew at each access.
        for name, p in module._parameters.items():
            if p is None:
                continue
            if known is not None and name in known:
                if p not in decided:
                    found[p] = ModelWeight(known[name])
                elif found[p].reason == _EMBEDDING:
                    found[p] = ModelWeight(None, _TIED)
            elif isinstance(module, _NORMS):
                found.setdefault(p, ModelWeight(None, _NORM))
            elif known is not None and name.startswith("bias"):
                found.setdefault(p, ModelWeight(None, _BIAS))
            else:
                found.setdefault(p, ModelWeight(None, _UNKNOWN, documented=False))
    return found


def hidden_weights(model: nn.Module) -> list[HiddenWeight]:
    """Return the weights of known layers that are not parameters."""
    found = []
    for path, module in model.named_modules():
        for attribute in _layer_weights(module) or ():
            if attribute in module._parameters:
                continue
            sources = _sources(module, attribute)
            fixed = module._buffers.get(attribute, module.__dict__.get(attribute))
            shapes = [tuple(p.shape) for p in sources] or [tuple(getattr(fixed, "shape", ()))]
            shape = max(shapes, key=math.prod)
            name = f"{path}.{attribute}" if path else attribute
            masked = f"{attribute}_mask" in module._buffers
            removal = _removal(module, attribute)
            found.append(HiddenWeight(name, shape, sources, masked, removal))
    return found


def _sources(module: nn.Module, attribute: str) -> tuple[nn.Parameter, ...]:
    """Return the parameters that an attribute is computed from; none if it is a parameter."""
    if attribute in module._parameters:
        return ()
    if parametrize.is_parametrized(module, attribute):
        return tuple(module.parametrizations[attribute].parameters())  # type: ignore[index, union-attr]
    # The hooks of torch.nn.utils (prune, weight_norm, spectral_norm) and those written like them
    # keep `weight_orig`, or `weight_g` and `weight_v`, beside the attribute.
    known = _layer_weights(module) or ()
    return tuple(
        p
        for name, p in module._parameters.items()
        if p is not None and name.startswith(f"{attribute}_") and name not in known
    )


def _removal(module: nn.Module, attribute: str) -> str:
    if f"{attribute}_mask" in module._buffers:
        return f'torch.nn.utils.prune.remove(layer, "{attribute}")'
    if parametrize.is_parametrized(module, attribute):
        return f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{attribute}")'
    return "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"


def _hidden_reason(hidden: HiddenWeight) -> str:
    if hidden.masked:
        return "torch.nn.utils.prune masks the weight"
    return "the layer computes its weight from other parameters"


def may_be_pruned(p: Tensor, known: ModelWeight) -> bool:
    """Return whether zeros in a parameter may come from pruning, so that training must keep them.

    They may in a weight of a known layer, and in a matrix of a module of unknown type, such as a
    stack of experts.
    """
    return not known.reason or (known.reason == _UNKNOWN and is_matrix(p))


def is_pruned(p: Tensor, known: bool) -> bool:
    """Return whether a parameter has zeros that come from pruning.

    In a layer of known type all do. A matrix of another module that is zero everywhere was not
    pruned; it starts at zero.
    """
    zeros = int(whole((p.detach() == 0).sum()))
    return zeros > 0 and (known or zeros < p.numel())


def is_matrix(p: Tensor) -> bool:
    """Return whether at least two axes are longer than 1, unlike a bias or a class token."""
    return sum(size > 1 for size in p.shape) >= 2
