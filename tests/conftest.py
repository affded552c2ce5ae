"""Settings of every run, with no import beyond NumPy, PyTorch, JAX and pytest.

The tests of the equivalence run where nothing else is installed; fixtures that need more
are in the folders `tests/*/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch

pytest.register_assert_rewrite("array_backends", "linear_problem", "reference")

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(1)  # arrays are small, and several tests run at a time


@pytest.fixture
def single_precision() -> Iterator[None]:
    """JAX as it comes, without 64-bit numbers."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """No array of JAX changes its dtype or its rank by itself."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def library_promotes(strict_promotion: None) -> Iterator[None]:
    """For what optax, Flax or the test itself promotes within a test that is strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
