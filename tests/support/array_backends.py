"""The array libraries that tests run on, and the settings of Hypothesis."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any

import array_api_strict
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import safe_core.backends.jax as jax_backend
from safe_core import project
from safe_core.backends import jax_counting

hypothesis.settings.register_profile(
    "safe_core",
    deadline=None,  # the first example of each shape compiles a program
    derandomize=True,
    max_examples=8,
    print_blob=True,
)
hypothesis.settings.load_profile("safe_core")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Backend(enum.Enum):
    """An array library, in one of the modes in which it is used.

    All libraries are required: importing this file fails if one is not installed.
    """

    NUMPY = "numpy"
    READ_ONLY = "numpy-read-only"
    STRICT = "array-api-strict"
    TORCH = "torch"
    JAX = "jax"
    JAX_JIT = "jax-jit"

    @property
    def traces(self) -> bool:
        """Whether the library traces a function, so that its values are unknown."""
        return self is Backend.JAX_JIT

    @property
    def dtypes(self) -> list[np.dtype]:
        """The real floating-point dtypes of the library."""
        names = {
            Backend.NUMPY: ["float16", "float32", "float64"],
            Backend.READ_ONLY: ["float16", "float32", "float64"],
            Backend.STRICT: ["float32", "float64"],
        }.get(self, ["float16", BFLOAT16, "float32", "float64"])
        return [np.dtype(name) for name in names]

    def asarray(self, array: np.ndarray) -> Any:
        """Return an exact copy of a NumPy array in this library."""
        array = np.array(array)
        if self is Backend.NUMPY:
            return array
        if self is Backend.READ_ONLY:
            array.flags.writeable = False
            return array
        if self is Backend.STRICT:
            return array_api_strict.asarray(array)
        if self is Backend.TORCH:
            if array.dtype == BFLOAT16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        return jnp.asarray(array)

    def to_numpy(self, x: Any) -> np.ndarray:
        """Return the NumPy array with the same bits."""
        if isinstance(x, torch.Tensor):
            x = x.detach()
            if x.dtype == torch.bfloat16:
                return x.view(torch.int16).numpy().view(BFLOAT16)
            return x.numpy()
        return np.asarray(x)

    def call(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``fn(*arguments)``; JAX under jit compiles it as one program.

        Programs are cached by ``fn``: pass the same function to compile once per shape.
        """
        return _compiled(fn)(*arguments) if self is Backend.JAX_JIT else fn(*arguments)

    def run(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``fn`` like `call`, but take and return nested NumPy arrays."""

        def convert(x: Any) -> Any:
            return self.asarray(x) if isinstance(x, np.ndarray | np.generic) else x

        given = [_mapped(convert, tree) for tree in arguments]
        return _mapped(self.to_numpy, self.call(fn, *given))


def _mapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``fn`` to all leaves; keep the order of mappings, which `jax.tree.map` would sort."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: _mapped(fn, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_mapped(fn, item) for item in tree]
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    return fn(tree)


@functools.cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fn)


@pytest.fixture(scope="session", params=list(Backend), ids=lambda backend: backend.value)
def xp(request: pytest.FixtureRequest) -> Backend:
    """Run the test once on every backend."""
    return request.param


@functools.cache
def projector(pattern: Any, layouts: Any = None) -> Callable[..., Any]:
    """Return `project` with a fixed pattern; equal patterns give the same function."""

    def run(arrays: Any, importance: Any = None) -> Any:
        return project(arrays, pattern, importance, layouts)

    return run


def bits(x: np.ndarray) -> np.ndarray:
    """Return the bits of an array as integers."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)


def assert_same(got: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> None:
    """Assert that arrays agree in dtype, shape and every bit."""
    for a, b in zip(got, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(bits(a), bits(b))


def forget_programs() -> None:
    """Clear the programs that JAX has compiled for the backend, after a test has patched it.

    `jax.clear_caches` would also clear the programs of all other tests.
    """
    for program in (
        jax_backend._program, jax_counting.keep_largest, jax_counting.keep_largest_per_row
    ):  # fmt: skip
        program.clear_cache()
