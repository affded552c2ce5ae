"""Save pytrees of JAX arrays without their zeros, and load them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_core import _checks
from safe_core.compressed import CompressedFiles, RawTensor, read_compressed, write_compressed
from safe_core.tensor_files import DTYPES

from .leaves import WITHOUT_KEYS
from .weights import name_of

__all__ = ["load_compressed", "raw_array", "save_compressed"]

PyTree = Any
_DTYPES = {code: jnp.dtype(name) for code, name in DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def save_compressed(
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CompressedFiles:
    """Save a pytree of arrays as a safetensors file without its zeros, bit for bit.

    Each array is stored in the smallest of three forms: as it is, as its non-zero entries with a
    bit for each entry, or as two of every four entries along its last axis. Any pattern and dtype
    will do. Only entries whose bits are all zero are dropped, so -0 and every NaN come back.

    Parameters
    ----------
    params : pytree of arrays
        Variables of Flax, ``nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))``, or the result
        of `to_torch_names`, which PyTorch can load. Arrays are named by their paths, such as
        ``Dense_0/kernel``.
    path : path
        The file, whose name ends in ``.safetensors``.
    max_shard_size : int, optional
        Bytes in a file. What does not fit is written to ``...-00002-of-00003.safetensors`` and so
        on, with an index, ``...safetensors.index.json``. By default there is one file.
    metadata : mapping of str to str, optional
        More entries for the metadata of the file.

    Returns
    -------
    CompressedFiles

    Raises
    ------
    TypeError
        If a leaf has a dtype that safetensors files do not hold, such as a random key.
    ValueError
        If ``path`` has another ending, two arrays have one path, or a path is that of a part of
        another array, such as ``w.bitmask`` beside ``w``.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> params = {"kernel": jnp.eye(64, dtype="f4"), "bias": jnp.ones(64, "f4")}
    >>> saved = save_compressed(params, path)
    >>> saved.forms, saved.dense_bytes, saved.stored_bytes
    ({'bias': 'dense', 'kernel': 'bitmask'}, 16640, 1024)
    >>> bool((load_compressed(path, like=params)["kernel"] == params["kernel"]).all())
    True
    """
    raw: dict[str, RawTensor] = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(at)
        if name in raw:
            raise ValueError(f"params must have different paths, got two arrays named {name!r}")
        _check("params", name, leaf)
        raw[name] = raw_array(leaf)
    return write_compressed(Path(path), raw, max_shard_size=max_shard_size, metadata=metadata)


def _check(argument: str, name: str, leaf: Any) -> None:
    dtype: Any = getattr(leaf, "dtype", None)
    extended = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
    if dtype is None or extended or jnp.dtype(dtype) not in _CODES:
        is_key = extended and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        raise TypeError(
            f"{argument} must hold arrays with dtypes of safetensors files, got "
            f"{_checks.shown(leaf) if dtype is None else dtype} for {name}"
            + (f": keep keys out ({WITHOUT_KEYS})" if is_key else "")
        )


def raw_array(x: Any) -> RawTensor:
    """Return an array as bytes."""
    flat = np.ascontiguousarray(x).reshape(-1)
    return RawTensor(_CODES[np.dtype(x.dtype)], tuple(x.shape), flat.view(np.uint8))


def load_compressed(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Load the arrays of `save_compressed`.

    Parameters
    ----------
    path : path
        The file, the index of its shards, or a folder that holds one of these.
    like : pytree of arrays
        Parameters with the structure, the shapes and the dtypes of the result. Those of
        ``jax.eval_shape`` will do.

    Returns
    -------
    pytree of arrays

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    TypeError
        If a leaf of ``like`` has a dtype that safetensors files do not hold.
    ValueError
        If the file is damaged or cut off, or is not compressed, or if an array is missing, left
        over, or of another shape or dtype.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> _ = save_compressed({"w": jnp.ones(2)}, path)
    >>> load_compressed(path, like=jax.eval_shape(lambda: {"w": jnp.zeros(2)}))["w"].tolist()
    [1.0, 1.0]
    """
    named = [(name_of(at), x) for at, x in jax.tree_util.tree_leaves_with_path(like)]
    for name, wanted in named:
        _check("like", name, wanted)
    held = read_compressed(Path(path))
    leaves = []
    for name, wanted in named:
        raw = held.pop(name, None)
        given = "none" if raw is None else f"{raw.dtype} of shape {raw.shape}"
        asked = f"{_CODES[np.dtype(wanted.dtype)]} of shape {tuple(wanted.shape)}"
        if raw is None or given != asked:
            raise ValueError(
                f"the file must hold {name!r} as {asked}, as like= has it, got {given}"
            )
        leaves.append(jnp.asarray(raw.data.view(_DTYPES[raw.dtype]).reshape(raw.shape)))
    if held:
        raise ValueError(f"like must have all arrays of the file, got no {min(held)!r}")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
