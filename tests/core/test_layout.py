"""Patterns follow the roles of axes, wherever a framework stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from array_backends import Backend, assert_same, projector

from safe_core import NM, Block, Channel, Layout, Unstructured, project

PATTERNS = [Unstructured(0.4, "row"), NM(2, 4), Block((2, 4), 0.5), Channel(0.5)]


class Storage(NamedTuple):
    """One weight as torch stores it and as another framework does."""

    shape: tuple[int, ...]  # (output, input, ...)
    stored: Callable[[Any], Any]
    layout: Layout


STORAGES = {
    "flax-dense": Storage((6, 8), np.transpose, Layout(input_axes=(-2,), output_axes=(-1,))),
    "flax-conv": Storage(
        (4, 8, 3, 2), lambda w: np.transpose(w, (2, 3, 1, 0)), Layout((-2,), (-1,))
    ),
    "torch-conv-transpose": Storage(
        (4, 8, 3), lambda w: np.swapaxes(w, 0, 1), Layout(input_axes=(0,), output_axes=(1,))
    ),
    "flax-query": Storage(
        (6, 8), lambda w: np.reshape(w.T, (8, 2, 3)), Layout(input_axes=(0,), output_axes=(1, 2))
    ),
    "flax-attention-out": Storage(
        (6, 8), lambda w: np.reshape(w.T, (2, 4, 6)), Layout(input_axes=(0, 1), output_axes=(2,))
    ),
}


@pytest.mark.every_second
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_support_moves_with_the_storage(xp: Backend, pattern: Any, storage: Storage) -> None:
    # Distinct integers: no ties, and sums of squares that do not depend on their order.
    rng = np.random.default_rng(0)
    w = rng.permutation(np.prod(storage.shape)).reshape(storage.shape).astype(np.float64)
    plain = Backend.NUMPY.run(projector(pattern), w)
    got = xp.run(projector(pattern, storage.layout), storage.stored(w))
    assert_same([got.support], [storage.stored(plain.support)])
    assert_same([got.values], [storage.stored(plain.values)])


@pytest.mark.parametrize(
    "pattern", [*PATTERNS, Unstructured(0.4, "tensor")], ids=lambda pattern: str(pattern)[:16]
)
def test_stacked_weights_project_one_by_one(xp: Backend, pattern: Any) -> None:
    stack = np.round(np.random.default_rng(0).normal(size=(4, 3, 8)), 1)
    layout = Layout(input_axes=(2,), output_axes=(0,), batch_axes=(1,))
    got = xp.run(projector(pattern, layout), stack).support
    one_by_one = [Backend.NUMPY.run(projector(pattern), stack[:, i]).support for i in range(3)]
    assert_same([got], [np.stack(one_by_one, axis=1)])


def test_stacked_weights_compete_together_where_the_scope_is_global(xp: Backend) -> None:
    stack = np.asarray([[[1.0, 2.0]], [[3.0, 4.0]]])
    layout = Layout(input_axes=(2,), output_axes=(1,), batch_axes=(0,))
    for pattern in (Unstructured(0.5), Channel(0.5, "global"), Block((1, 2), 0.5, "global")):
        support = xp.run(projector(pattern, layout), stack).support
        assert support.ravel().tolist() == [False, False, True, True]


def test_negative_axes_count_from_the_end(xp: Backend) -> None:
    w = np.round(np.random.default_rng(0).normal(size=(3, 4, 4)), 1)
    for pattern in (NM(2, 4), Channel(0.5)):
        negative = xp.run(projector(pattern, Layout((-2,), (-1,), (-3,))), w)
        positive = xp.run(projector(pattern, Layout((1,), (2,), (0,))), w)
        assert_same([negative.support], [positive.support])


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_importance_per_input_goes_to_the_input_axes(xp: Backend, storage: Storage) -> None:
    w = np.random.default_rng(0).normal(size=storage.shape)
    per_input = np.asarray([1.0, 64.0, 2.0, 16.0, 0.0, 8.0, 32.0, 4.0])
    pattern = Unstructured(0.5, "row")
    plain = Backend.NUMPY.run(projector(pattern), w, per_input).support
    support = xp.run(projector(pattern, storage.layout), storage.stored(w), per_input).support
    assert_same([support], [storage.stored(plain)])
    assert not np.array_equal(plain, Backend.NUMPY.run(projector(pattern), w).support)


def test_importance_per_input_may_have_the_shape_of_the_input_axes(xp: Backend) -> None:
    w, p = np.ones((2, 2, 3)), np.asarray([[1.0, 4.0], [3.0, 2.0]])
    support = xp.run(projector(Unstructured(0.5, "row"), Layout((0, 1), (2,))), w, p).support
    assert support[..., 0].tolist() == [[False, True], [True, False]]


def test_a_layout_per_array_by_position_and_by_name(xp: Backend) -> None:
    w = np.asarray([[1.0, 2.0], [4.0, 3.0]])
    across = Layout(input_axes=(0,), output_axes=(1,))
    wanted = [
        np.asarray([[False, True], [True, False]]),
        np.asarray([[False, False], [True, True]]),
    ]

    def by_position(a: Any, b: Any) -> Any:
        return project([a, b], NM(1, 2), layout=[None, across]).support

    def by_name(a: Any, b: Any) -> Any:
        support = project({"a": a, "b": b}, NM(1, 2), layout={"b": across}).support
        return [support["a"], support["b"]]

    assert_same(xp.run(by_position, w, w), wanted)
    assert_same(xp.run(by_name, w, w), wanted)


def test_a_vector_is_the_inputs_of_one_output(xp: Backend) -> None:
    v = np.asarray([1.0, 4.0, 3.0, 2.0])
    assert xp.run(projector(NM(2, 4)), v).support.tolist() == [False, True, True, False]
    support = xp.run(projector(Unstructured(0.25, "row")), v).support
    assert support.tolist() == [False, True, True, True]
