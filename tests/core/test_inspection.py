"""The analysis of zeros against arrays with known patterns."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_backends import bits
from sparse_arrays import grouped

from safe_core.inspection import analyse, magnitude_bits


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (1, 2), (3, 4), (7, 16), (3, 32)])
def test_groups_are_found_along_any_axis(n: int, m: int) -> None:
    x = grouped(np.random.default_rng(0), (48, 64), n, m)
    for array, axis in ((x, 1), (x.T, 0), (np.moveaxis(x.reshape(8, 6, 64), 2, 1), 1)):
        found = analyse(array)
        assert (found.pattern, found.axis, found.zeros) == (
            f"{n}:{m}",
            axis,
            48 * 64 * (m - n) // m,
        )
    dead = x.copy()
    dead[::3] = 0  # whole outputs beside the groups
    assert analyse(dead).pattern == f"{n}:{m}"
    assert analyse(dead).zero_rows == 16
    x[5, :m] = 1.0  # one full group
    assert analyse(x).pattern == "unstructured"


def test_chance_is_no_pattern() -> None:
    rng = np.random.default_rng(1)
    for sparsity in (0.1, 0.5, 0.9, 0.99, 0.999):
        x = np.where(rng.random((256, 256)) < sparsity, 0, rng.standard_normal((256, 256)))
        assert analyse(x).pattern == "unstructured"
    one = np.zeros((8, 8))
    one[3, 3] = 1
    assert analyse(one).pattern == "channels"


def test_channels_vectors_and_edges() -> None:
    x = np.ones((6, 4, 3, 3), "f4")
    x[[1, 4]] = 0
    x[:, 2] = 0
    found = analyse(x)
    assert (found.pattern, found.zero_rows, found.zero_columns) == ("channels", 2, 1)
    x[:, 2] = 1
    x[0, 0, 0, 0] = -0.0
    assert analyse(x).pattern == "unstructured"
    assert analyse(np.ones((4, 4), "f4")).pattern == "dense"
    assert analyse(np.zeros((4, 4), "f4")).pattern == "all zero"
    assert analyse(np.asarray(3.0)).pattern == "dense"
    assert analyse(np.asarray([0, 5, 5], "i4"))[:4] == (3, 1, "unstructured", None)
    assert analyse(np.asarray([True, False])).zeros == 1
    empty = analyse(np.zeros((0, 4), "f4"))
    assert (empty.entries, empty.sparsity, empty.ties, empty.pattern) == (0, 0.0, 0, "dense")


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_zeros_order_and_ties_are_those_of_the_numbers(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 64)).astype(dtype)
    x[rng.random((64, 64)) < 0.3] = 0
    x[0, :4] = np.asarray([-0.0, 0.0, np.finfo("f4").tiny, -1e-40], "f8").astype(dtype)
    wide = np.abs(x.astype("f8"))
    order = magnitude_bits(bits(x)).astype("u8")
    i, j = rng.integers(64**2, size=(2, 2000))
    np.testing.assert_array_equal(
        np.sign(wide.ravel()[i] - wide.ravel()[j]),
        np.sign(order.ravel()[i].astype(float) - order.ravel()[j].astype(float)),
    )
    found = analyse(x)
    assert found.zeros == (wide == 0).sum()
    assert found.ties == (wide == wide[wide > 0].min()).sum()
    kept, size = 64**2 - found.zeros, x.dtype.itemsize
    assert found.dense_bytes == 64**2 * size
    assert found.compressed_bytes == min(64**2 * size, kept * size + 64**2 // 8)


def test_compressed_groups_store_their_places() -> None:
    x = grouped(np.random.default_rng(0), (16, 32), 2, 4).astype("f2")
    assert analyse(x).compressed_bytes == 256 * 2 + 256 * 2 // 8  # 2 bits for each kept value
    y = grouped(np.random.default_rng(0), (16, 32), 1, 8).astype("f2")
    assert analyse(y).compressed_bytes == 64 * 2 + 64 * 3 // 8


def test_slabs_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = grouped(rng, (96, 70 * 4), 2, 4)
    dead = np.where(np.arange(96)[:, None] < 40, 0, x)
    arrays = [x, x.T, dead, dead.T, np.where(x > 1, 0, x), x.reshape(96, 70, 4), x[:, :0]]
    arrays += [
        np.where(np.arange(96)[:, None] % 2, np.ones((96, 3)), 0),
        np.zeros((80, 2)),
        x[:, 0],
    ]
    sparse = np.zeros((64, 19))  # full groups in two columns, next to nothing in the others
    sparse[5] = 1
    sparse[:, :2] = np.tile([0, 1, 1, 0], 16)[:, None]
    arrays.append(sparse)
    whole = [analyse(a) for a in arrays]
    assert whole[-1].pattern == "unstructured"
    assert [a.pattern for a in whole[:4]] == ["2:4"] * 4
    monkeypatch.setattr("safe_core.inspection._SLAB", 1)
    assert [analyse(a) for a in arrays] == whole
