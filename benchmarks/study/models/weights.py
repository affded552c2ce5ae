"""Draw initial weights in NumPy, and convert weights between Flax and PyTorch.

`Variables` are nested mappings in Flax's layout: ``params`` with kernels of shape (window,
window, input, output) or (input, output), and ``batch_stats`` with means and variances. PyTorch
uses (output, input, window, window) and (output, input), and flattens images channels first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architectures import Architecture, Conv, Dense, Layer, Norm

__all__ = ["Variables", "from_state_dict", "initial_variables", "to_state_dict"]

Array = NDArray[Any]
Variables = dict[str, Any]

# By layer: the collection and name of each array in Flax, and its name in PyTorch.
_ARRAYS = {
    Conv: (("params", "kernel", "weight"),),
    Dense: (("params", "kernel", "weight"), ("params", "bias", "bias")),
    Norm: (
        ("params", "scale", "weight"),
        ("params", "bias", "bias"),
        ("batch_stats", "mean", "running_mean"),
        ("batch_stats", "var", "running_var"),
    ),
}


def initial_variables(architecture: Architecture, seed: int | Sequence[int]) -> Variables:
    """Return initial weights: normal kernels with variance ``2 / fan-in``, and zero biases.

    The fan-in of a convolution is ``window**2 * inputs``. Normalisation starts with scale 1,
    bias 0, mean 0 and variance 1.

    Parameters
    ----------
    architecture : Architecture
    seed : int or sequence of int
        Passed to `numpy.random.default_rng`.

    Returns
    -------
    dict
        Nested dictionary of float32 arrays, with ``batch_stats`` if the network has any.

    References
    ----------
    He et al. 2015, "Delving deep into rectifiers".

    Examples
    --------
    >>> from safe_core.study.models import LeNet
    >>> variables = initial_variables(LeNet(), seed=0)
    >>> variables["params"]["dense1"]["kernel"].shape
    (784, 300)
    """
    rng = np.random.default_rng(seed)
    flat: dict[tuple[str, ...], Array] = {}
    for name, layer in architecture.layers().items():
        for collection, key, _ in _ARRAYS[type(layer)]:
            flat[collection, *name.split("/"), key] = _initial(layer, key, rng)
    return _nested(flat)


def to_state_dict(architecture: Architecture, variables: Mapping[str, Any]) -> dict[str, Array]:
    """Convert Flax variables to the names and layout of a PyTorch ``state_dict``.

    The batch counters of PyTorch's normalisation layers are not included.

    Parameters
    ----------
    architecture : Architecture
    variables : mapping
        ``params`` and, for networks with normalisation, ``batch_stats``. NumPy must be able to
        read the arrays.

    Returns
    -------
    dict of str to numpy.ndarray
        C-contiguous copies.

    Raises
    ------
    ValueError
        If an array is missing or of another shape. The message names it.

    Examples
    --------
    >>> from safe_core.study.models import LeNet
    >>> network = LeNet()
    >>> state = to_state_dict(network, initial_variables(network, seed=0))
    >>> {name: x.shape for name, x in state.items() if "weight" in name}
    {'dense1.weight': (300, 784), 'dense2.weight': (100, 300), 'dense3.weight': (10, 100)}
    """
    state = {}
    for name, layer in architecture.layers().items():
        for collection, key, torch_key in _ARRAYS[type(layer)]:
            path = (collection, *name.split("/"), key)
            x = _checked("/".join(path), _leaf(variables, path), _shape(layer, key))
            state[_torch_name(name, torch_key)] = _to_torch(layer, key, x)
    return state


def from_state_dict(architecture: Architecture, state: Mapping[str, Any]) -> Variables:
    """Convert a PyTorch ``state_dict`` to Flax variables, the inverse of `to_state_dict`.

    Parameters
    ----------
    architecture : Architecture
    state : mapping of str to array
        Arrays, or tensors on the CPU. Names that the network does not have are ignored.

    Returns
    -------
    dict
        Nested dictionary of NumPy arrays, which are copies.

    Raises
    ------
    ValueError
        If an array is missing or of another shape. The message names it.

    Examples
    --------
    >>> from safe_core.study.models import LeNet
    >>> network = LeNet()
    >>> variables = initial_variables(network, seed=0)
    >>> again = from_state_dict(network, to_state_dict(network, variables))
    >>> bool((again["params"]["dense1"]["kernel"] == variables["params"]["dense1"]["kernel"]).all())
    True
    """
    flat: dict[tuple[str, ...], Array] = {}
    for name, layer in architecture.layers().items():
        for collection, key, torch_key in _ARRAYS[type(layer)]:
            torch_name = _torch_name(name, torch_key)
            shape = _to_torch(layer, key, np.empty(_shape(layer, key), np.bool_)).shape
            x = _checked(torch_name, state.get(torch_name), shape)
            flat[collection, *name.split("/"), key] = _to_flax(layer, key, x)
    return _nested(flat)


def _shape(layer: Layer, key: str) -> tuple[int, ...]:
    """Return the shape of an array in Flax."""
    if isinstance(layer, Norm):
        return (layer.channels,)
    if key == "bias":
        return (layer.outputs,)
    window = (layer.window, layer.window) if isinstance(layer, Conv) else ()
    return (*window, layer.inputs, layer.outputs)


def _initial(layer: Layer, key: str, rng: np.random.Generator) -> Array:
    shape = _shape(layer, key)
    if key == "kernel":
        deviation = np.sqrt(2 / np.prod(shape[:-1]))
        return (rng.standard_normal(shape) * deviation).astype(np.float32)
    return np.full(shape, key in ("scale", "var"), np.float32)


def _to_torch(layer: Layer, key: str, x: Array) -> Array:
    if key != "kernel":
        return x.copy()
    if isinstance(layer, Conv):
        return np.array(x.transpose(3, 2, 0, 1), order="C")
    if isinstance(layer, Dense) and layer.image is not None:  # to channels, height, width
        x = x.reshape(*layer.image, -1).transpose(2, 0, 1, 3).reshape(x.shape)
    return np.array(x.T, order="C")


def _to_flax(layer: Layer, key: str, x: Array) -> Array:
    if key != "kernel":
        return x.copy()
    if isinstance(layer, Conv):
        return np.array(x.transpose(2, 3, 1, 0), order="C")
    x = x.T
    if isinstance(layer, Dense) and layer.image is not None:
        height, width, channels = layer.image
        x = x.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(x.shape)
    return np.array(x, order="C")


def _torch_name(name: str, key: str) -> str:
    return ".".join((*name.split("/"), key))


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _checked(name: str, x: Any, shape: tuple[int, ...]) -> Array:
    if x is None or tuple(np.shape(x)) != shape:
        given = "none" if x is None else f"shape {tuple(np.shape(x))}"
        raise ValueError(f"{name} must be an array of shape {shape}, got {given}")
    return np.asarray(x)


def _nested(flat: Mapping[tuple[str, ...], Array]) -> Variables:
    tree: Variables = {}
    for (*path, key), x in flat.items():
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[key] = x
    return tree
