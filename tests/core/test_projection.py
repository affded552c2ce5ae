"""What `project` promises, on every backend."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
from array_backends import BFLOAT16, Backend, assert_same, bits, projector
from hypothesis import given
from hypothesis import strategies as st

from safe_core import NM, Block, Channel, Layout, Unstructured, project, schedules


class Case(NamedTuple):
    """A pattern with arrays small enough for brute force; shapes are fixed for JAX's sake."""

    pattern: Any
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout, ...] | None = None


FLAX = Layout(input_axes=(-2,), output_axes=(-1,))
CASES = {
    "global": Case(Unstructured(0.5), ((2, 3), (4,), ())),
    "global-floor": Case(Unstructured(0.5, floor=0.9), ((2, 3), (5,), ())),
    "global-floor-of-one": Case(Unstructured(0.7, floor=0.1), ((2, 4), (3,), ())),
    "global-floor-of-none": Case(Unstructured(0.8, floor=0.5), ((7,), (2,), (1,))),
    "global-floor-stacked": Case(
        Unstructured(0.4, floor=1), ((2, 3), (5,)), (Layout((1,), (), batch_axes=(0,)), Layout())
    ),
    "tensor": Case(Unstructured(0.4, "tensor"), ((2, 4), (5,), ())),
    "row": Case(Unstructured(0.6, "row"), ((3, 5), (4,))),
    "row-flax-conv": Case(Unstructured(0.6, "row"), ((2, 3, 2),), (FLAX,)),
    "tensor-stacked": Case(
        Unstructured(0.6, "tensor"), ((2, 5, 2),), (Layout((2,), (0,), batch_axes=(1,)),)
    ),
    "nm": Case(NM(2, 4), ((3, 8), (4,))),
    "nm-heads": Case(NM(1, 4), ((2, 4, 2),), (Layout((0, 1), (2,)),)),
    "nm-tail": Case(NM(2, 3, ragged="dense"), ((2, 8), (2,))),
    "nm-long": Case(NM(3, 17), ((2, 17),)),
    "block": Case(Block((2, 2), 0.5), ((4, 4), (2, 6))),
    "block-global": Case(Block((2, 1), 0.6, "global"), ((4, 3), (2, 2))),
    "block-global-floor": Case(Block((1, 2), 0.5, "global", floor=0.8), ((2, 6), (3, 4))),
    "block-tail": Case(Block((2, 3), 0.7, ragged="dense"), ((5, 7),)),
    "block-flax-conv": Case(Block((2, 2), 0.5), ((2, 4, 2),), (FLAX,)),
    "channel": Case(Channel(0.5), ((5, 2), (4, 1, 2))),
    "channel-global": Case(Channel(0.6, "global"), ((3, 2), (4, 2))),
    "channel-global-floor": Case(Channel(0.5, "global", floor=1.0), ((4, 2), (5, 1))),
    "channel-stacked": Case(Channel(0.5), ((2, 2, 3),), (Layout((1,), (2,), batch_axes=(0,)),)),
}


def cases(*names: str) -> Any:
    """Run a test on the cases of these names, or on all."""
    chosen = names or tuple(CASES)
    return pytest.mark.parametrize("case", [CASES[name] for name in chosen], ids=chosen)


# Multiples of 1/4, so that sums of P v^2 are exact and equal sums are ties.
QUARTERS = st.sampled_from([k / 4 for k in range(-8, 9)] + [-0.0])
SQUARES = st.sampled_from([0.0, 0.25, 1.0, 4.0, 9.0])
ANY_SIZE = st.floats(width=32, allow_nan=False)


def points(case: Case, elements: Any = QUARTERS) -> Any:
    """Lists of float32 arrays of the shapes of a case."""
    return st.tuples(
        *(hnp.arrays(np.float32, shape, elements=elements) for shape in case.shapes)
    ).map(list)


# What must always hold


@cases()
@given(data=st.data())
def test_keeps_what_a_stable_sort_keeps(xp: Backend, case: Case, data: st.DataObject) -> None:
    arrays, importance = data.draw(points(case)), data.draw(st.none() | points(case, SQUARES))
    got = xp.run(projector(case.pattern, case.layouts), arrays, importance)
    wanted = reference.select(arrays, case.pattern, importance, case.layouts)
    assert_same(got.support, wanted)


@cases()
@given(data=st.data())
def test_finds_the_nearest_point(xp: Backend, case: Case, data: st.DataObject) -> None:
    weights = st.sampled_from([0.0, 0.5, 2.0, 3.0, 7.0])
    arrays, importance = data.draw(points(case)), data.draw(st.none() | points(case, weights))
    got = xp.run(projector(case.pattern, case.layouts), arrays, importance)
    nearest = reference.nearest_distance(arrays, case.pattern, importance, case.layouts)
    assert reference.distance(got.values, arrays, importance) == nearest


@cases(
    "global", "global-floor", "tensor", "row", "nm", "nm-long", "block-tail", "channel-global",
    "block-global-floor",
)  # fmt: skip
@given(data=st.data())
def test_is_idempotent(xp: Backend, case: Case, data: st.DataObject) -> None:
    arrays, importance = data.draw(points(case)), data.draw(points(case, SQUARES))
    fn = projector(case.pattern, case.layouts)
    once = xp.run(fn, arrays, importance)
    twice = xp.run(fn, once.values, importance)
    assert_same(twice.values, once.values)
    assert_same(twice.support, once.support)


@cases("global", "row", "nm", "block-tail", "channel")
@given(data=st.data())
def test_kept_entries_keep_their_bits_and_others_are_plus_zero(
    xp: Backend, case: Case, data: st.DataObject
) -> None:
    # Signed zeros and subnormal numbers too, and infinite ones where nothing is squared.
    squares = isinstance(case.pattern, (Block, Channel))
    elements = st.floats(-(2.0**50), 2.0**50, width=32) if squares else ANY_SIZE
    arrays = data.draw(points(case, elements))
    values, support = xp.run(projector(case.pattern), arrays)
    assert_same(
        map(bits, values),
        [np.where(m, bits(v), np.uint32(0)) for m, v in zip(support, arrays, strict=True)],
    )


@cases("global", "tensor", "row", "nm", "nm-long")
@given(data=st.data())
def test_entries_rank_by_magnitude_at_any_size(
    xp: Backend, case: Case, data: st.DataObject
) -> None:
    # Their squares would under- and overflow; subnormal numbers rank by size as well.
    arrays = data.draw(points(case, ANY_SIZE))
    got = xp.run(projector(case.pattern), arrays)
    assert_same(got.support, reference.select(arrays, case.pattern))


NEIGHBOURS = [np.float32(1.25) + k * np.spacing(np.float32(1.25)) for k in range(9)]


@cases("global", "tensor", "row", "nm", "nm-long", "block", "channel")
@given(data=st.data())
def test_scaling_importance_by_a_power_of_two_changes_nothing(
    xp: Backend, case: Case, data: st.DataObject
) -> None:
    # Whether neighbouring floats tie depends on how sqrt(P) |v| is rounded, and
    # sqrt(2 P) is rounded differently.
    arrays = data.draw(points(case, st.sampled_from(NEIGHBOURS)))
    importance = data.draw(points(case, st.sampled_from(np.float32([0.1, 1.5, 3.0]))))
    exponent = data.draw(st.integers(-100, 100))
    fn = projector(case.pattern, case.layouts)
    plain = xp.run(fn, arrays, importance)
    scaled = xp.run(fn, arrays, [np.ldexp(p, exponent) for p in importance])
    assert_same(scaled.support, plain.support)


@cases("global", "nm", "block-global", "channel")
@given(data=st.data())
def test_scaling_the_arrays_by_a_power_of_two_changes_nothing(
    xp: Backend, case: Case, data: st.DataObject
) -> None:
    # Squares of most of these scales are no float32.
    arrays = data.draw(points(case, st.floats(0.5, 1, width=32)))
    importance = data.draw(points(case, st.sampled_from(np.float32([0.1, 1.5, 3.0]))))
    exponent = data.draw(st.integers(-120, 127))
    fn = projector(case.pattern, case.layouts)
    plain = xp.run(fn, arrays, importance)
    scaled = xp.run(fn, [np.ldexp(v, exponent) for v in arrays], importance)
    assert_same(scaled.support, plain.support)


DISTINCT = st.permutations(range(1, 17)).map(
    lambda order: np.reshape(np.asarray(order, np.float32), (4, 4))
)


@pytest.mark.parametrize(
    ("pattern", "axis"),
    [
        (Unstructured(0.3), 0),
        (Unstructured(0.3), 1),
        (Unstructured(0.5, "row"), 0),
        (Unstructured(0.5, "row"), 1),
        (NM(1, 2), 0),
        (Block((1, 2), 0.5), 0),
        (Channel(0.5), 0),
        (Channel(0.5), 1),
    ],
    ids=str,
)
@given(data=st.data())
def test_follows_a_permutation(xp: Backend, pattern: Any, axis: int, data: st.DataObject) -> None:
    x, order = data.draw(DISTINCT), data.draw(st.permutations(range(4)))
    plain = xp.run(projector(pattern), x)
    permuted = xp.run(projector(pattern), np.take(x, order, axis))
    assert_same([permuted.values], [np.take(plain.values, order, axis)])


@given(data=st.data())
def test_follows_a_permutation_of_the_arrays(xp: Backend, data: st.DataObject) -> None:
    arrays, order = list(data.draw(DISTINCT)), data.draw(st.permutations(range(4)))
    plain = xp.run(projector(Unstructured(0.4)), arrays)
    permuted = xp.run(projector(Unstructured(0.4)), [arrays[i] for i in order])
    assert_same(permuted.support, [plain.support[i] for i in order])


# Counts


@pytest.mark.parametrize(
    ("sparsity", "zeros"),
    [
        (0, 0),
        (0.29, 29),  # 0.29 * 100 < 29 in binary
        (0.57, 57),
        (0.999, 99),
        (np.float32(0.29), 29),
        (Decimal("0.29"), 29),
        (Fraction(1, 3), 33),
        (schedules.cubic(0.7, steps=4), 70),
    ],
)
def test_number_of_zeros_is_the_floor_of_the_decimal_fraction(
    xp: Backend, sparsity: Any, zeros: int
) -> None:
    v = np.arange(1.0, 101.0, dtype=np.float32)
    assert np.count_nonzero(~xp.run(projector(Unstructured(sparsity)), v).support) == zeros


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.29, "tensor"), Unstructured(0.29, "row"), Block((1, 1), 0.29), Channel(0.29)],
    ids=str,
)
def test_every_pool_loses_the_same_number_of_units(xp: Backend, pattern: Any) -> None:
    v = np.arange(1.0, 101.0, dtype=np.float32)
    pools = v[None, :] if pattern.scope == "row" else v[:, None]
    got = xp.run(projector(pattern), [pools, -pools])
    assert [np.count_nonzero(~mask) for mask in got.support] == [29, 29]


def test_a_fraction_and_a_string_stand_for_patterns(xp: Backend) -> None:
    v = [np.asarray([[4.0, 3.0, 2.0, 1.0]]), np.asarray([[8.0, 7.0, 6.0, 5.0]])]
    assert_same(xp.run(projector(0.5), v).support, [np.zeros((1, 4), bool), np.ones((1, 4), bool)])
    assert_same(xp.run(projector("2:4"), v).support, [np.asarray([[True] * 2 + [False] * 2])] * 2)


def test_a_rising_block_pattern_advises_its_final_sparsity() -> None:
    """The schedule is derived, so a message must not ask a user to write it."""
    rising = Block((5, 4), 0.75).rising(100, 10)
    with pytest.raises(ValueError, match=r"pass sparsity=Block\(shape=\(5, 4\), sparsity=0\.75, "):
        rising.check((10, 50), Layout((1,), (0,)), "w")


# Ties

SHAPES = ((12, 16), (48,), (8, 4, 4))
ENTRIES = [
    Unstructured(0.37),
    Unstructured(0.37, "tensor"),
    Unstructured(0.37, "row"),
    NM(2, 4),
    NM(5, 24, ragged="dense"),
]
UNITS = [Block((2, 4), 0.4), Block((4, 2), 0.4, "global"), Channel(0.4)]


def shapes_for(pattern: Any) -> list[tuple[int, ...]]:
    return [shape for shape in SHAPES if len(shape) > 1 or pattern in ENTRIES]


def drawn(pattern: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes_for(pattern)]


TIED = {
    "equal": lambda v: np.copysign(0.5, v),
    "zero": lambda v: np.copysign(0.0, v),
    "rounded": lambda v: np.round(2 * v) / 2,
}


@pytest.mark.every_second
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("pattern", ENTRIES + UNITS, ids=str)
def test_of_equal_scores_the_lowest_position_is_kept(xp: Backend, pattern: Any, kind: str) -> None:
    arrays = [TIED[kind](v).astype(np.float32) for v in drawn(pattern)]
    got = xp.run(projector(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


def test_of_equal_entries_the_first_are_kept(xp: Backend) -> None:
    got = xp.run(projector(Unstructured(0.29)), [np.ones((2, 2)), -np.ones(3)])
    assert [mask.ravel().tolist() for mask in got.support] == [[True] * 4, [True, False, False]]


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", [ENTRIES[0], ENTRIES[2], *ENTRIES[3:]], ids=str)
def test_16_bit_entries_tie_by_the_same_rule(xp: Backend, pattern: Any, dtype: np.dtype) -> None:
    arrays = [np.round(8 * v).astype(dtype) for v in drawn(pattern)]
    if dtype not in xp.dtypes:
        with pytest.raises(TypeError):
            xp.run(projector(pattern), arrays)
        return
    got = xp.run(projector(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


@pytest.mark.parametrize("pattern", ENTRIES + UNITS, ids=str)
def test_support_is_the_same_on_every_backend(xp: Backend, pattern: Any) -> None:
    # Rounded scores of arbitrary P collide in float32, and must do so in the same places.
    arrays = [v.astype(np.float32) for v in drawn(pattern)]
    importance = [np.exp(8 * p).astype(np.float32) for p in drawn(pattern, seed=1)]
    wanted = Backend.NUMPY.run(projector(pattern), arrays, importance)
    assert_same(xp.run(projector(pattern), arrays, importance).support, wanted.support)


# Edge cases


@pytest.mark.every_second
@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(0.5),
        Unstructured(0.5, "row"),
        NM(1, 2, ragged="dense"),
        NM(1, 20, ragged="dense"),
        Block((2, 2), 0.5, ragged="dense"),
        Channel(0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (3, 1)], ids=str)
def test_arrays_of_no_one_or_few_entries(xp: Backend, pattern: Any, shape: tuple[int, ...]) -> None:
    v = np.ones(shape, np.float32)
    got = xp.run(projector(pattern), [v])
    assert_same(got.support, reference.select([v], pattern))


def test_no_arrays_project_to_no_arrays() -> None:
    assert project([], 0.5) == ([], [])
    assert project({}, 0.5) == ({}, {})


def test_a_scalar_is_a_pool_of_one(xp: Backend) -> None:
    for pattern in (Unstructured(0.9), Unstructured(0.9, "tensor")):
        values, support = xp.run(projector(pattern), np.asarray(3.0))
        assert (float(values), bool(support), support.shape) == (3.0, True, ())


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(0),
        Unstructured(0, "row"),
        NM(4, 4),
        NM(32, 32, ragged="dense"),
        Block((2, 2), 0),
        Channel(0),
    ],
    ids=str,
)
def test_sparsity_zero_keeps_everything(xp: Backend, pattern: Any) -> None:
    assert xp.run(projector(pattern), np.zeros((4, 8))).support.all()


def test_the_sign_of_zero_ranks_nothing(xp: Backend) -> None:
    values, support = xp.run(projector(0.5), np.asarray([-0.0, 0.0, -0.0, 0.0], np.float32))
    assert support.tolist() == [True, True, False, False]
    assert np.signbit(values).tolist() == [True, False, False, False]


def test_subnormal_entries_beside_a_wider_array_rank_the_same_on_every_backend(
    xp: Backend,
) -> None:
    arrays = [np.asarray([0.0, 1e-40, 2e-40], np.float32), np.asarray([0.0, 0.0, 1.0])]
    wanted = Backend.NUMPY.run(projector(0.5), arrays).support
    assert_same(xp.run(projector(0.5), arrays).support, wanted)


@pytest.mark.parametrize("pattern", [Block((1, 1), 0.5), Channel(0.5)], ids=str)
def test_units_with_subnormal_sums_rank_the_same_on_every_backend(
    xp: Backend, pattern: Any
) -> None:
    for entries in ([1e-25, 1e-20, 2e-20, 0.0], [0.0, 1e-22, 2e-22, 1.0]):
        v = np.asarray(entries, np.float32)[:, None]
        wanted = Backend.NUMPY.run(projector(pattern), v).support
        assert_same([xp.run(projector(pattern), v).support], [wanted])


def transposed_rows(x: Any) -> Any:
    """Every second row of the transpose, which no library stores in order."""
    return x.T[::2, :]


@pytest.mark.parametrize("pattern", [*ENTRIES[:1], *ENTRIES[2:4], *UNITS[1:]], ids=str)
def test_strided_views_project_as_their_copies(xp: Backend, pattern: Any) -> None:
    stored = np.round(np.random.default_rng(0).normal(size=(16, 24)), 1)
    v = np.ascontiguousarray(transposed_rows(stored))

    def run(x: Any) -> Any:
        return project(transposed_rows(x), pattern, importance=abs(transposed_rows(x)))

    got = xp.run(run, stored)
    assert_same([got.support], reference.select([v], pattern, [np.abs(v)]))
    assert_same([got.values], [np.where(got.support, v, 0.0)])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(1, 2), Channel(0.5)], ids=str)
def test_arguments_are_left_as_they_are(xp: Backend, pattern: Any) -> None:
    v, p = np.asarray([[1.0, -3.0], [2.0, 0.5]]), np.asarray([[4.0, 1.0], [0.5, 2.0]])
    arrays, importance = [xp.asarray(v)], [xp.asarray(p)]
    before = list(arrays)
    xp.call(projector(pattern), arrays, importance)
    assert arrays[0] is before[0]
    assert_same([xp.to_numpy(arrays[0]), xp.to_numpy(importance[0])], [v, p])


@pytest.mark.parametrize("backend", [Backend.NUMPY, Backend.STRICT, Backend.TORCH])
def test_values_are_no_view_of_the_argument(backend: Backend) -> None:
    given = backend.asarray(np.ones(4))
    project(given, 0).values[0] = 7.0
    assert backend.to_numpy(given).tolist() == [1.0] * 4


def test_float64_stays_float64(xp: Backend) -> None:
    v = np.asarray([[1.0], [1.0 + 1e-12], [1.0 + 2e-12], [0.0]])
    for pattern in (Unstructured(0.5), Channel(0.5)):
        for importance in (None, np.ones((4, 1), np.float32)):
            values, support = xp.run(projector(pattern), v, importance)
            assert values.dtype == np.float64
            assert support[:, 0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_16_bits_in_are_16_bits_out(xp: Backend, dtype: np.dtype) -> None:
    v = np.asarray([[1, 2], [4, 3]], dtype)
    for pattern in (Unstructured(0.5), NM(1, 2), Block((1, 2), 0.5), Channel(0.5)):
        if dtype not in xp.dtypes:
            with pytest.raises(TypeError):
                xp.run(projector(pattern), v)
            continue
        values, support = xp.run(projector(pattern), v, np.ones((2, 2), np.float32))
        assert (values.dtype, support.dtype) == (dtype, np.dtype(bool))


def test_sums_of_16_bit_entries_do_not_overflow(xp: Backend) -> None:
    # The squares exceed the largest float16: only a wider sum tells them apart.
    dtype = np.float16 if np.dtype(np.float16) in xp.dtypes else np.float32
    v = np.asarray([[300, 300], [400, 400], [500, 500], [600, 600]], dtype)
    assert xp.run(projector(Channel(0.5)), v).support[:, 0].tolist() == [False, False, True, True]


def test_arrays_of_several_dtypes_compete_by_value(xp: Backend) -> None:
    narrow = np.float16 if np.dtype(np.float16) in xp.dtypes else np.float32
    arrays = [np.asarray([4, 1], narrow), np.asarray([2, 3], np.float32), np.asarray([5, 0.5])]
    got = xp.run(projector(0.5), arrays)
    assert [mask.tolist() for mask in got.support] == [[True, False], [False, True], [True, False]]
    assert [v.dtype for v in got.values] == [v.dtype for v in arrays]


def test_a_mapping_keeps_its_keys_and_their_order(xp: Backend) -> None:
    got = xp.run(projector(Unstructured(0.5)), {"w": np.ones(2), "head": np.ones(2)})
    # jax.jit hands mappings over sorted by key.
    keys = ["head", "w"] if xp.traces else ["w", "head"]
    assert list(got.values) == list(got.support) == keys
    assert [got.support[key].tolist() for key in keys] == [[True, True], [False, False]]


# Refusals


@pytest.mark.parametrize("dtype", [np.complex64, np.int32, np.bool_], ids=lambda d: d.__name__)
def test_only_real_floating_arrays_are_accepted(xp: Backend, dtype: Any) -> None:
    arrays = [np.ones(2, np.float32), np.ones(2, dtype)]
    with pytest.raises(TypeError, match=rf"arrays\[1\] must be real floating.*{dtype.__name__}"):
        xp.run(projector(0.5), arrays)


def test_nan_is_refused_where_it_can_be_read(xp: Backend) -> None:
    arrays = {"body": np.ones(2), "head": np.asarray([1.0, np.nan])}
    if xp.traces:
        # A traced program cannot raise; NaN ranks above all and the count still holds.
        support = xp.run(projector(0.5), arrays).support
        assert [support[key].tolist() for key in arrays] == [[True, False], [False, True]]
    else:
        with pytest.raises(ValueError, match=r"arrays\['head'\] must not hold NaN"):
            xp.run(projector(0.5), arrays)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [(NM(2, 4), 6), (NM(2, 4), 2), (NM(16, 32), 6), (Block((1, 4), 0.5), 6)],
    ids=str,
)
def test_a_ragged_input_axis_is_refused_by_name(xp: Backend, pattern: Any, size: int) -> None:
    arrays = {"body": np.ones((2, 32)), "head": np.ones((2, size))}
    with pytest.raises(ValueError, match=rf"input axis of arrays\['head'\] has {size} entries"):
        xp.run(projector(pattern), arrays)


def test_a_ragged_output_axis_is_refused_by_name(xp: Backend) -> None:
    with pytest.raises(ValueError, match=r"output axis of arrays\[0\] has 3 entries"):
        xp.run(projector(Block((2, 2), 0.5)), [np.ones((3, 2))])


def test_a_ragged_tail_can_stay_dense(xp: Backend) -> None:
    v = np.asarray([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0]])
    got = xp.run(projector(NM(2, 4, ragged="dense")), v)
    assert got.support.tolist() == [[True, True, False, False, True, True]]
    got = xp.run(projector(Block((1, 4), 0.5, ragged="dense")), np.concatenate([v, -v]))
    assert got.support.tolist() == [[True] * 6, [False] * 4 + [True] * 2]


def test_arrays_of_two_libraries_are_refused() -> None:
    with pytest.raises(TypeError):
        project([Backend.NUMPY.asarray(np.ones(2)), Backend.STRICT.asarray(np.ones(2))], 0.5)


def test_a_large_importance_does_not_overflow(xp: Backend) -> None:
    v = np.asarray([1e30, 2e30, 3e30, 4e30], np.float32)
    p = np.full(4, 1e30, np.float32)
    assert xp.run(projector(0.5), v, p).support.tolist() == [False, False, True, True]
    rows = v.reshape(4, 1)
    kept = xp.run(projector(Channel(0.5)), rows, p.reshape(4, 1)).support
    assert kept.ravel().tolist() == [False, False, True, True]


def test_an_infinite_entry_of_no_importance_ranks_lowest(xp: Backend) -> None:
    v, p = np.asarray([np.inf, 1.0, 2.0, 3.0]), np.asarray([0.0, 1.0, 1.0, 1.0])
    assert xp.run(projector(0.5), v, p).support.tolist() == [False, False, True, True]
