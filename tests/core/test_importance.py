"""Where P comes from, and how `project` takes it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from array_backends import BFLOAT16, Backend, assert_same, projector

from safe_core import (
    NM,
    ArrayInfo,
    Block,
    Channel,
    Layout,
    Mask,
    Method,
    RandomOrder,
    SquaredGradient,
    Unstructured,
    project,
)
from safe_core.importance import wanda

# Sources


def averaged(source: SquaredGradient, xp: Backend, gradients: list[list[np.ndarray]]) -> Any:
    state = xp.run(source.init, gradients[0])
    for g in gradients:
        state = xp.run(source.refresh, state, g)
    return state


@functools.cache
def metric(source: SquaredGradient, joint: bool) -> Any:
    return lambda state: source.metric(state, joint=joint)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_squared_gradients_are_averaged(xp: Backend, decay: float) -> None:
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=(2, 3)), rng.normal(size=3)] for _ in range(4)]
    got = averaged(SquaredGradient(decay), xp, gradients)
    for i, m in enumerate(got):
        wanted = sum((1 - decay) * decay ** (3 - t) * g[i] ** 2 for t, g in enumerate(gradients))
        np.testing.assert_allclose(m, wanted, rtol=1e-13)


def test_importance_is_one_until_a_gradient_was_seen(xp: Backend) -> None:
    source = SquaredGradient(0.5)
    state = xp.run(source.init, [np.ones(2), np.ones(2)])
    assert_same(xp.run(metric(source, True), state), [np.ones(2)] * 2)
    state = xp.run(source.refresh, state, [np.asarray([2.0, 0.0]), np.zeros(2)])
    seen = np.asarray([2.0, 0.0])
    # In one pool the second array has lost to the first; by itself it knows nothing yet.
    assert_same(xp.run(metric(source, True), state), [seen, np.zeros(2)])
    assert_same(xp.run(metric(source, False), state), [seen, np.ones(2)])
    assert source.metric([], joint=True) == []


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_entry_that_is_not_finite_changes_nothing(xp: Backend, bad: float) -> None:
    source = SquaredGradient(0.5)
    got = averaged(source, xp, [[np.asarray([2.0, 4.0])], [np.asarray([bad, 4.0])]])
    assert_same(got, [np.asarray([2.0, 12.0])])


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_squares_of_16_bit_gradients_are_kept_in_float32(xp: Backend, dtype: np.dtype) -> None:
    dtype = dtype if dtype in xp.dtypes else np.dtype(np.float32)
    got = averaged(SquaredGradient(0.0), xp, [[np.asarray([512.0, 2.0**-14], dtype)]])
    assert_same(got, [np.asarray([2.0**18, 2.0**-28], np.float32)])


def test_wanda_is_the_diagonal_of_the_gram_matrix(xp: Backend) -> None:
    activations = np.random.default_rng(0).normal(size=(5, 7, 3))
    flat = activations.reshape(-1, 3)
    of_tokens = functools.partial(wanda, axis=-1)
    np.testing.assert_allclose(xp.run(of_tokens, activations), np.diag(flat.T @ flat), rtol=1e-13)
    parts = xp.run(of_tokens, activations[:2]) + xp.run(of_tokens, activations[2:])
    np.testing.assert_allclose(parts, np.diag(flat.T @ flat), rtol=1e-13)
    assert xp.run(wanda, np.asarray([1.0, -3.0])).tolist() == [1.0, 9.0]
    assert xp.run(wanda, np.full((4, 1), 2.0, np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 4, 5, 4), 1), ((2, 5, 4, 4), -1), ((4, 3, 4), 0), ((2, 4, 4), 1)]
)
def test_wanda_has_one_value_per_channel_of_a_convolution(
    xp: Backend, shape: tuple[int, ...], axis: int
) -> None:
    activations = np.random.default_rng(0).normal(size=shape)
    channels = np.moveaxis(activations, axis, 0).reshape(4, -1)
    found = xp.run(functools.partial(wanda, axis=axis), activations)
    np.testing.assert_allclose(found, (channels**2).sum(axis=1), rtol=1e-13)


def test_wanda_of_a_convolution_is_that_of_its_patches() -> None:
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)  # as wide as it has channels
    convolution = torch.nn.Conv2d(4, 3, 1, dtype=torch.float64)
    patches = torch.nn.functional.unfold(x, 1).transpose(1, 2).reshape(-1, 4)
    importance = wanda(x, axis=1)
    torch.testing.assert_close(importance, (patches.T @ patches).diagonal())
    layout = Layout((1,), (0,))
    found = project(convolution.weight.detach(), NM(2, 4), importance, layout).support
    scores = convolution.weight.detach()[:, :, 0, 0].abs() * patches.norm(dim=0)
    largest = scores.topk(2).indices
    assert bool(found[:, :, 0, 0].gather(1, largest).all())


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 4, 5, 4), (2, 4, 5, 5, 4)])
def test_wanda_asks_for_the_axis_where_the_shape_cannot_tell(
    xp: Backend, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="axis must name the axis of the features"):
        xp.run(wanda, np.ones(shape))


@pytest.mark.parametrize(
    ("axis", "error"), [(2, ValueError), (-3, ValueError), (True, TypeError), ("1", TypeError)]
)
def test_wanda_refuses_what_is_no_axis(axis: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^axis must be"):
        wanda(np.ones((2, 3)), axis)


def test_wanda_sums_16_bit_activations_in_float32(xp: Backend) -> None:
    dtype = np.float16 if np.dtype(np.float16) in xp.dtypes else np.float32
    assert_same([xp.run(wanda, np.full((4, 2), 300, dtype))], [np.full(2, 360_000, np.float32)])


def test_wanda_refuses_complex_activations(xp: Backend) -> None:
    with pytest.raises(TypeError, match="activations must be real"):
        xp.run(wanda, np.ones((2, 2), np.complex64))


# In a projection


def test_wanda_ranks_by_magnitude_times_the_norm_of_the_input(xp: Backend) -> None:
    rng = np.random.default_rng(0)
    w, activations = rng.normal(size=(4, 6)), rng.normal(size=(50, 6)) * np.arange(1, 7)
    ranked = np.abs(w) * np.linalg.norm(activations, axis=0)
    importance = xp.run(wanda, activations)
    got = xp.run(projector(Unstructured(0.5, "row")), w, importance).support
    assert_same([got], [np.argsort(np.argsort(ranked, axis=1), axis=1) >= 3])
    grouped = np.argsort(np.argsort(ranked.reshape(4, 2, 3), axis=2), axis=2) >= 2
    assert_same([xp.run(projector(NM(1, 3)), w, importance).support], [grouped.reshape(4, 6)])


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("importance", "full"),
    [
        (np.asarray([[1.0, 9.0, 4.0]]), np.asarray([[1.0, 9.0, 4.0]] * 2)),
        (np.asarray([[1.0], [9.0]]), np.asarray([[1.0] * 3, [9.0] * 3])),
        (np.asarray([1.0, 9.0, 4.0]), np.asarray([[1.0, 9.0, 4.0]] * 2)),
        (np.asarray(2.0), np.full((2, 3), 2.0)),
        (2.0, np.full((2, 3), 2.0)),
        (3, np.full((2, 3), 3.0)),
    ],
    ids=["row", "column", "per-input", "scalar-array", "scalar", "integer"],
)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(1, 3), Channel(0.5), Block((1, 3), 0.5)])
def test_importance_broadcasts(
    xp: Backend, pattern: Any, importance: Any, full: np.ndarray
) -> None:
    v = np.asarray([[3.0, 1.0, 2.0], [1.0, 2.0, 0.5]])
    wanted = Backend.NUMPY.run(projector(pattern), v, full).support
    assert_same([xp.run(projector(pattern), v, importance).support], [wanted])


# Pairs of neighbouring floats, whose scores tie or not by rounding.
START = np.float32(1.2)
PAIRS = (START + np.arange(64, dtype=np.float32) * np.spacing(START)).reshape(32, 2)


def test_a_scalar_importance_ranks_the_same_on_every_backend(xp: Backend) -> None:
    def run(x: Any) -> Any:
        return project(x, Unstructured(0.5, "row"), importance=3.0)

    assert_same([xp.run(run, PAIRS).support], [Backend.NUMPY.run(run, PAIRS).support])


@pytest.mark.parametrize("first", [1.5, 3.0])
def test_doubling_importance_moves_no_tie(xp: Backend, first: float) -> None:
    fn = projector(Unstructured(0.5, "row"))
    p = np.full((1, 2), first, np.float32)
    supports = [xp.run(fn, PAIRS, np.ldexp(p, k)).support for k in (-125, -2, -1, 0, 1, 2, 126)]
    assert_same(supports, [supports[0]] * len(supports))


def test_importance_lies_beside_its_array_in_any_structure(xp: Backend) -> None:
    a, b = np.asarray([1.0, 2.0]), np.asarray([[3.0, 1.0]])
    pa, pb = np.asarray([100.0, 0.0]), np.asarray([[1.0, 1.0]])
    fn = projector(Unstructured(0.5))
    wanted = [np.asarray([True, False]), np.asarray([[True, False]])]
    assert_same(xp.run(fn, [a, b], [pa, pb]).support, wanted)
    assert_same(xp.run(fn, (a, b), (pa, pb)).support, wanted)
    assert_same([xp.run(fn, a, pa).support], wanted[:1])
    by_name = xp.run(fn, {"b": b, "a": a}, {"a": pa, "b": pb}).support
    assert_same([by_name["a"], by_name["b"]], wanted)


def test_an_array_without_importance_ranks_by_magnitude(xp: Backend) -> None:
    v, fn = np.asarray([1.0, 2.0]), projector(Unstructured(0.5, "tensor"))
    got = xp.run(fn, [v, v], [np.asarray([9.0, 1.0]), None]).support
    assert_same(got, [np.asarray([True, False]), np.asarray([False, True])])
    named = xp.run(fn, {"a": v, "b": v}, {"b": np.asarray([9.0, 1.0])}).support
    assert_same([named["b"], named["a"]], got)


def test_a_global_pool_wants_importance_for_all_or_none(xp: Backend) -> None:
    v = np.ones(2)
    with pytest.raises(ValueError, match=r"importance must be given for all.*lacks arrays\[1\]"):
        xp.run(projector(Unstructured(0.5)), [v, v], [v, None])


def test_zero_importance_ranks_lowest(xp: Backend) -> None:
    v, p = np.asarray([[100.0, 0.5, 0.25]]), np.asarray([[0.0, 1.0, 1.0]])
    for pattern in (Unstructured(0.34), NM(2, 3), Block((1, 1), 0.34)):
        support = xp.run(projector(pattern), v, p).support
        assert support.tolist() == [[False, True, True]]


def test_an_infinite_entry_of_zero_importance_ranks_lowest(xp: Backend) -> None:
    v, p = np.asarray([[np.inf, 1.0, 2.0, -np.inf]]), np.asarray([[0.0, 1.0, 1.0, 1.0]])
    for pattern in (Unstructured(0.5), NM(2, 4), Block((1, 1), 0.5)):
        support = xp.run(projector(pattern), v, p).support
        assert support.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("value", "importance"), [(1e-40, 1.0), (1e-40, 1e30), (1.0, 1e-40), (1e-30, 1e-30)], ids=str
)
def test_scores_that_would_be_subnormal_rank_above_zero(
    xp: Backend, value: float, importance: float
) -> None:
    # XLA flushes subnormal numbers, so the scores must be scaled before they are computed.
    v, p = np.asarray([0.0, value, 1.0], np.float32), np.asarray([1.0, importance, 1.0], np.float32)
    assert xp.run(projector(0.34), v, p).support.tolist() == [False, True, True]


def test_importance_at_the_smallest_normal_number_ranks_the_same_on_every_backend(
    xp: Backend,
) -> None:
    # Making the exponent of the largest P even must not make the smallest subnormal.
    v = np.ones(3, np.float32)
    p = np.asarray([1.0, 0.0, np.finfo(np.float32).smallest_normal], np.float32)
    wanted = Backend.NUMPY.run(projector(0.34), v, p).support
    assert_same([xp.run(projector(0.34), v, p).support], [wanted])


@pytest.mark.every_backend
@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_bad_importance_is_refused_where_it_can_be_read(xp: Backend, bad: float) -> None:
    arrays, importance = [np.ones(2), np.ones(2)], [np.ones(2), np.asarray([1.0, bad])]
    if xp.traces:
        # A traced program cannot raise, but the count still holds.
        support = xp.run(projector(0.5), arrays, importance).support
        assert sum(map(np.count_nonzero, support)) == 2
    else:
        with pytest.raises(ValueError, match=r"importance of arrays\[1\] must be finite and non-"):
            xp.run(projector(0.5), arrays, importance)


def test_complex_importance_is_refused(xp: Backend) -> None:
    with pytest.raises(TypeError, match=r"importance of arrays"):
        xp.run(projector(0.5), np.ones(2), np.ones(2, np.complex64))


@pytest.mark.parametrize("shape", [(3,), (4,), (4, 1, 2), (4, 3), (2, 2), (1, 4)], ids=str)
def test_importance_of_another_shape_is_refused(xp: Backend, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"importance of arrays\[0\] must.*got shape"):
        xp.run(projector(0.5), [np.ones((4, 2))], [np.ones(shape)])


def test_importance_of_another_library_is_refused() -> None:
    with pytest.raises(TypeError, match=r"importance of arrays must be .*numpy"):
        project(np.ones(2), 0.5, importance=Backend.STRICT.asarray(np.ones(2)))


@functools.cache
def random_order(seed: int) -> Any:
    return RandomOrder(seed).init


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_random_order_is_that_of_every_library_and_no_magnitude(xp: Backend, seed: int) -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e-9, 1.0, 1e9], 100)
    arrays = [rng.permutation(sizes).reshape(20, 15) * s for s in (1, -1)]
    got = xp.run(random_order(seed), arrays)
    wanted = RandomOrder(seed).init(arrays)
    scores = [np.sqrt(np.asarray(p)) * np.abs(x) for p, x in zip(got, arrays, strict=True)]
    for p, expected, score in zip(got, wanted, scores, strict=True):
        np.testing.assert_allclose(p, expected, rtol=1e-6)
        assert 0 < score.min() < score.max() < 1
    assert len(np.unique(np.concatenate(scores).round(12))) == 600
    for size in (1e-9, 1.0, 1e9):
        mean = np.mean(scores[0][np.abs(arrays[0]) == size])
        assert mean == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_a_random_order_has_room_for_small_entries_and_none_for_zeros(dtype: np.dtype) -> None:
    x = np.asarray([0.0, 6e-8, -1.0, 1e-30, 9.0, 6e4]).astype(dtype)
    (p,) = RandomOrder().init([x])
    assert p.dtype == np.float32
    assert np.isfinite(p).all()
    assert (p > 0).tolist() == [False, True, True, False, True, True]


def test_a_mask_in_random_order_prunes_at_initialisation() -> None:
    x = np.linspace(1, 2, 200).reshape(10, 20)
    info = ArrayInfo(("w",), (Layout((1,), (0,)),))
    masks = []
    for seed in (0, 1):
        method = Method(Unstructured(0.9, "row"), Mask(), importance=RandomOrder(seed))
        state = method.init_importance([x])
        first = method.importance.first_metric(state, joint=False)
        masks.append(method.init([x], info, first).support[0])
        assert masks[-1].sum(1).tolist() == [2] * 10
    assert (masks[0] != masks[1]).any()
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*32, got 4294967296"):
        RandomOrder(2**32)
