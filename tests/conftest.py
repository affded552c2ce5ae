"""Settings and fixtures of all tests.

This file needs only pytest, PyTorch and JAX, because `tests/equivalence` must run where
little else is installed. Fixtures that need more belong in the `conftest.py` of a folder.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import jax
import pytest
import torch
from turns import waits

pytest.register_assert_rewrite(
    "array_backends", "command_line", "linear_problem", "pulled_runs", "reference", "small_recipe"
)

jax.config.update("jax_enable_x64", True)
# On a GPU, JAX multiplies float32 matrices in TF32 by default, which keeps only three digits.
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(1)  # The arrays are small, and several processes run tests at once.


@pytest.hookimpl(tryfirst=True)  # before the tests of ``-m`` are chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases as long that other cases of the same test cover."""
    for item in items:
        if waits(item):
            item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, because they live until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def single_precision() -> Iterator[None]:
    """Turn off the 64-bit types of JAX, as they are by default."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Make JAX raise where it would promote a dtype or a rank implicitly."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def library_promotes(strict_promotion: None) -> Iterator[None]:
    """Allow promotion again, for code of a strict test that is not ours, such as optax or Flax."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
