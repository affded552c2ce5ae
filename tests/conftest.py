"""Settings and fixtures of all tests.

This file imports only pytest, PyTorch and JAX, because `tests/equivalence` must run where
little else is installed. Fixtures that need more belong in the `conftest.py` of a folder.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import torch

pytest.register_assert_rewrite(
    "array_backends", "command_line", "linear_problem", "pulled_runs", "reference", "small_recipe"
)

jax.config.update("jax_enable_x64", True)
# On a GPU, JAX multiplies float32 matrices in TF32 by default, which keeps only three digits.
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(1)  # The arrays are small, and several processes run tests at once.


# Pairs of backends that share nearly all code. A test of several cases runs each case with one of
# a pair, in turns. With the other it is long. Most of the time is compiling for JAX.
TURNS = {"numpy": 0, "numpy-read-only": 1, "jax": 0, "jax-jit": 1}


@pytest.hookimpl(tryfirst=True)  # before the tests of ``-m`` are chosen
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark the cases that run with the other backend of a pair as long.

    The turns are a checkerboard over the parameters, so that each value of each has both.
    """
    places: dict[Any, dict[Any, int]] = defaultdict(dict)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        names = [mark.args[0] for mark in item.iter_markers("parametrize")]
        if "xp" not in given or given["xp"].value not in TURNS or not names:
            continue
        place = 0
        for together in names:
            first = (together.split(",") if isinstance(together, str) else together)[0]
            known = places[item.originalname, item.path, first]
            place += known.setdefault(id(given[first]), len(known))
        if place % 2 != TURNS[given["xp"].value]:
            item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules of all libraries, which stay until the end."""
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
