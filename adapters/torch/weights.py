"""Find the weights of a torch model that can be pruned, and the roles of their axes.

The type of the module decides. The shape of a weight cannot tell which axis holds the inputs, and
its name is ``weight`` in layers, norms and embeddings alike.
"""

from __future__ import annotations

from torch import nn

from safe_core.layout import OUTPUT_INPUT, Layout

__all__ = ["prunable_weights"]

_INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _module_weights(module: nn.Module) -> dict[str, Layout | None]:
    """Return the layouts of one module's own weights by attribute name."""
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
        # GPT-2's linear layer in transformers, known by name because we must not import it.
        return {"weight": _INPUT_OUTPUT}
    return {}


def prunable_weights(model: nn.Module) -> dict[nn.Parameter, Layout | None]:
    """Return the weights of linear, convolution and attention layers with their layouts.

    Biases, norms and embeddings are excluded. So is a weight that is tied to an embedding, or
    that a parametrization computes, such as weight normalisation.

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
    modules = list(model.modules())
    embedded = {
        id(module.weight)
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    weights: dict[nn.Parameter, Layout | None] = {}
    for module in modules:
        for attribute, layout in _module_weights(module).items():
            # `_parameters`, because getattr would also return a parametrized weight, which is
            # computed anew at each access.
            weight = module._parameters.get(attribute)
            if weight is not None and id(weight) not in embedded:
                weights.setdefault(weight, layout)
    return weights
