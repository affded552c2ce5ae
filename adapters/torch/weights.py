"""Which parameters of a torch model are weights to prune, and the roles of their axes."""

from __future__ import annotations

from torch import nn

from safe_core.layout import OUTPUT_INPUT, Layout

__all__ = ["prunable_weights"]

_INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _module_weights(module: nn.Module) -> dict[str, Layout | None]:
    """Attribute names of the weights of one module, with their layouts."""
    if isinstance(module, _PLAIN):
        return {"weight": OUTPUT_INPUT}
    if isinstance(module, _TRANSPOSED):
        # With groups the first axis mixes group and input, which no layout expresses.
        return {"weight": _INPUT_OUTPUT if module.groups == 1 else None}
    if isinstance(module, nn.Bilinear):
        return {"weight": Layout(input_axes=(1, 2), output_axes=(0,))}
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(_ATTENTION, OUTPUT_INPUT)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return {"weight": _INPUT_OUTPUT}  # GPT-2's linear layer in transformers
    return {}


def prunable_weights(model: nn.Module) -> dict[nn.Parameter, Layout | None]:
    """Weights of linear, convolution and attention layers, with the roles of their axes.

    Biases, norms and embeddings are left out, and so is a weight that is tied to an
    embedding, or that a parametrization such as weight normalisation computes.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of Parameter to Layout or None
        Each tied weight once; None where no layout can say the roles.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    >>> list(prunable_weights(model).values())
    [Layout(input_axes=(1,), output_axes=(0,), batch_axes=())]
    """
    modules = list(model.modules())
    embedded = {
        id(module.weight)
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    weights: dict[nn.Parameter, Layout | None] = {}
    for module in modules:
        for attribute, layout in _module_weights(module).items():
            weight = module._parameters.get(attribute)
            if weight is not None and id(weight) not in embedded:
                weights.setdefault(weight, layout)
    return weights
