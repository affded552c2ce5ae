"""Digests of tensors and descriptions of solvers, to tell one run from another."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["fingerprint", "identity", "sample_of"]

_SAMPLED = 1024


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of tensors: dtypes, shapes and every bit.

    Examples
    --------
    >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, 1)])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_of(tensors: Iterable[Tensor]) -> str:
    """Return a digest of up to a thousand entries of every tensor, to compare checkpoints.

    Examples
    --------
    >>> sample_of([torch.zeros(10**5)]) == sample_of([torch.ones(10**5)])
    False
    """
    return fingerprint(t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLED)] for t in tensors)


def identity(value: Any) -> str:
    """Return a description of a solver that is the same in every process and unique to it.

    It holds every field of dataclasses, the names and closures of functions, digests of arrays.

    Raises
    ------
    ValueError
        If a function has no name, or an instance has attributes that its class does not describe.

    Examples
    --------
    >>> identity(functools.partial(round, ndigits=2))
    'partial(builtins.round, ndigits=2)'
    >>> class Keeper:
    ...     def __init__(self, share):
    ...         self.share = share
    >>> identity(Keeper(0.5))
    Traceback (most recent call last):
    ValueError: solver must be of functions with names and of dataclasses for work_dir, to tell \
whether a run goes on with the same one, got an instance of Keeper
    """
    if isinstance(value, functools.partial):
        return _called("partial", (value.func, *value.args), value.keywords)
    if isinstance(value, types.MethodType):
        return f"{identity(value.__self__)}.{value.__name__}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _function(value)
    if is_dataclass(value):
        said = {f.name: getattr(value, f.name) for f in fields(value)}
        return _called(_path(type(value)), (), said | getattr(value, "__dict__", {}))
    if isinstance(value, Mapping):
        return _called(type(value).__name__, tuple(value.items()), {})
    if isinstance(value, (list, tuple)):
        return _called(type(value).__name__, value, {})
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"array({fingerprint([torch.as_tensor(value)])})"
    if isinstance(value, (set, frozenset)):  # in another order in every process
        return f"{type(value).__name__}({', '.join(sorted(map(identity, value)))})"
    kept = getattr(value, "__dict__", None)
    if kept == {}:
        return f"{_path(type(value))}()"
    says = type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
    if isinstance(value, Enum) or (says and kept is None):
        return repr(value)
    raise _untold(f"an instance of {type(value).__name__}")


def _called(name: str, args: Iterable[Any], named: Mapping[str, Any]) -> str:
    parts = [identity(x) for x in args]
    parts += [f"{key}={identity(x)}" for key, x in sorted(named.items())]
    return f"{name}({', '.join(parts)})"


def _function(value: Any) -> str:
    if "<lambda>" in value.__qualname__:
        raise _untold(value.__qualname__)
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    closed = [x for x in cells if x is not value] + [*(getattr(value, "__defaults__", None) or ())]
    named = getattr(value, "__kwdefaults__", None) or {}
    return _called(_path(value), closed, named) if closed or named else _path(value)


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _untold(what: str) -> ValueError:
    return ValueError(
        "solver must be of functions with names and of dataclasses for work_dir, to tell whether "
        f"a run goes on with the same one, got {what}"
    )
