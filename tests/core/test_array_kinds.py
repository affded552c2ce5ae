"""Arrays that are no plain array of the machine's own numbers: read rightly, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from safe_core import NM, Block, Channel, Unstructured, functional, project
from safe_core.constraints import ArrayInfo
from safe_core.inspection import analyse
from safe_core.method import Method
from safe_core.methods import admm, safe
from safe_core.solvers import ALPS, Gram, Magnitude, SparseGPT, Wanda, reconstruction_error

PATTERNS = [
    Unstructured(0.6),
    Unstructured(0.6, scope="row"),
    NM(2, 4),
    NM(8, 20),  # groups of more than 16 entries take another path
    Block((2, 4), 0.5),
    Channel(0.5, scope="global"),
]


def swapped(x: np.ndarray) -> np.ndarray:
    """Return the same numbers in the other byte order."""
    return x.astype(x.dtype.newbyteorder("S"))


def weights(dtype: Any = "f4", shape: tuple[int, ...] = (8, 40)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_other_byte_order_has_the_same_projection(pattern: Any, dtype: str) -> None:
    x, p = weights(dtype), weights(dtype)[::-1] ** 2
    for importance in (None, p):
        wanted = project(x, pattern, importance)
        other = None if importance is None else swapped(importance)
        got = project(swapped(x), pattern, other)
        assert got.values.dtype == swapped(x).dtype
        np.testing.assert_array_equal(got.support, wanted.support)
        np.testing.assert_array_equal(got.values, wanted.values)


def test_arrays_of_both_byte_orders_compete() -> None:
    # More entries than a piece, so that the sample brackets the threshold.
    parts = [weights(shape=(300, 600)), weights(shape=(400, 500))[::-1]]
    wanted = project(parts, 0.9).support
    got = project([swapped(parts[0]), parts[1]], 0.9).support
    both = project([swapped(x) for x in parts], 0.9).support
    for mask, first, second in zip(wanted, got, both, strict=True):
        np.testing.assert_array_equal(first, mask)
        np.testing.assert_array_equal(second, mask)


def test_float64_in_the_other_byte_order_is_not_narrowed() -> None:
    x = np.asarray([1.0, 1.0 + 1e-12, 1.0, 1.0])
    assert project(swapped(x), 0.75, swapped(np.ones(4))).support.tolist() == [0, 1, 0, 0]
    gram = Gram.of(swapped(np.asarray([[1.0, 1e-12]])))
    assert gram.matrix.dtype == np.float64


@pytest.mark.parametrize("method", [admm(0.5, dual_update_interval=1), safe(0.5, rho=0.1)])
def test_a_state_in_the_other_byte_order_is_the_same(method: Method) -> None:
    found = []
    for x in (weights("f8"), swapped(weights("f8"))):
        info = ArrayInfo(("x",), (None,))
        state = functional.start(method, [x], [0], info)
        found.append((state.split.anchor[0], state.split.support[0]))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT(), ALPS()], ids=str)
def test_solvers_read_the_other_byte_order(solver: Any) -> None:
    w, x = weights("f8"), weights("f8", (100, 40))
    wanted, got = solver(w, x.T @ x, 0.5), solver(swapped(w), swapped(x.T @ x), 0.5)
    np.testing.assert_array_equal(got.support, wanted.support)
    np.testing.assert_array_equal(got.values, wanted.values)
    assert got.values.dtype == swapped(w).dtype
    error = reconstruction_error(swapped(w), got.values, swapped(x.T @ x))
    assert error == reconstruction_error(w, wanted.values, x.T @ x)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_an_analysis_reads_the_other_byte_order(dtype: str) -> None:
    x = np.asarray([[3, -1, 0, 0], [0, 1, 2, 0]], dtype)
    assert analyse(swapped(x)) == analyse(x)
    assert analyse(x).ties == 2


def test_a_memory_mapped_file_is_read(tmp_path: Path) -> None:
    for x in (weights(), swapped(weights())):
        np.save(tmp_path / "x.npy", x)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        got = project(mapped, "2:4")
        np.testing.assert_array_equal(got.support, project(weights(), "2:4").support)
        assert analyse(mapped) == analyse(weights())
        assert Wanda()(mapped, np.eye(40), 0.5).values.shape == (8, 40)


def test_broadcast_arrays_are_read_and_never_written() -> None:
    row = weights(shape=(40,))
    for x in (np.broadcast_to(row, (8, 40)), torch.from_numpy(row).expand(8, 40)):
        got = project(x, Unstructured(0.5, scope="row"))
        full = project(np.array(np.asarray(x)), Unstructured(0.5, scope="row"))
        np.testing.assert_array_equal(got.support, full.support)
        np.asarray(got.values)[0, 0] += 1  # the result shares no memory with the argument
    np.testing.assert_array_equal(row, weights(shape=(40,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tensors_with_a_pending_sign_are_read(pattern: Any, dtype: torch.dtype) -> None:
    x = torch.from_numpy(weights()).to(dtype)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    for importance in (None, x.abs()):
        wanted, got = project(-x, pattern, importance), project(lazy, pattern, importance)
        assert torch.equal(got.support, wanted.support)
        assert torch.equal(got.values, wanted.values)
    imaginary = torch.complex(x.float(), x.float()).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(project(imaginary, 0.5).values, project(-x.float(), 0.5).values)


X = np.asarray([[3.0, -1.0, 2.0, 0.5]], "f4")
REFUSED = {
    "masked": (np.ma.array(X, mask=X > 2), "masked array"),
    "bfloat16 in NumPy": (X.astype(ml_dtypes.bfloat16), "dtype bfloat16"),
    "float8 in NumPy": (X.astype(ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn"),
    "float8 in JAX": (jnp.asarray(X, jnp.float8_e4m3fn), "dtype float8_e4m3fn"),
    "float8 in PyTorch": (torch.tensor(X).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    "sparse": (torch.tensor(X).to_sparse(), "layout torch.sparse_coo"),
    "random keys": (jax.random.split(jax.random.key(0), (1, 4)), "dtype key"),
    "long double": (X.astype(np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
    "complex": (X.astype(complex), "dtype complex128"),
    "object": (X.astype(object), "dtype object"),
    "matrix": (X.view(np.matrix), "numpy.matrix"),
}
"""Arrays of shape (1, 4) that are refused, and what the message says of them."""


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_arrays_are_refused_by_name(kind: str) -> None:
    x, said = REFUSED[kind]
    with pytest.raises(TypeError, match=rf"^arrays must .*{said}"):
        project(x, 0.5)
    for solver in (Magnitude(), Wanda(), SparseGPT(), ALPS()):
        with pytest.raises(TypeError, match=rf"^weight must .*{said}"):
            solver(x, np.eye(4), 0.5)
    with pytest.raises(TypeError, match=rf"^inputs must .*{said}"):
        Gram.of(x)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_importance_are_refused_by_name(kind: str) -> None:
    p, said = REFUSED[kind]
    v: Any = torch.tensor(X) if isinstance(p, torch.Tensor) else X
    v = jnp.asarray(X) if isinstance(p, jax.Array) else v
    with pytest.raises(TypeError, match=rf"^importance of arrays must .*{said}"):
        project(v, 0.5, importance=p)


@pytest.mark.parametrize("kind", ["masked", "float8 in NumPy", "long double"])
def test_a_step_refuses_other_kinds_of_arrays(kind: str) -> None:
    x, said = REFUSED[kind]
    with pytest.raises(TypeError, match=rf"^w must .*{said}"):
        functional.start(admm(0.5), [x], [0], ArrayInfo(("w",), (None,)))


@pytest.mark.parametrize("kind", ["masked", "sparse", "complex", "long double", "object"])
def test_an_analysis_refuses_what_it_cannot_read(kind: str) -> None:
    x, said = REFUSED[kind]
    said = {"masked": "MaskedArray", "sparse": "torch.Tensor"}.get(kind, said)
    with pytest.raises(TypeError, match=rf"^array must be .*{said}"):
        analyse(x)


def test_an_analysis_reads_matrices_and_small_dtypes() -> None:
    assert analyse(X.view(np.matrix)) == analyse(X)
    assert analyse(X.astype(ml_dtypes.float8_e4m3fn)).zeros == 0
