"""What one library can do beyond the others: devices, tracing, mapping, sharding, counting."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from array_api_compat import array_namespace
from array_backends import BFLOAT16, Backend, assert_same, forget_programs, projector
from hypothesis import example, given
from hypothesis import strategies as st

import safe_core.backends.jax_counting as jax_counting
import safe_core.backends.torch as torch_backend
import safe_core.backends.torch_accelerator as torch_accelerator
import safe_core.backends.torch_counting as torch_counting
from safe_core import NM, Block, Channel, Unstructured, project, schedules
from safe_core.backends import backend_of, threshold
from safe_core.projection import select

PATTERNS = [
    Unstructured(0.4),
    Unstructured(0.4, "tensor"),
    Unstructured(0.4, "row"),
    NM(2, 4),
    NM(8, 32, ragged="dense"),
    Block((2, 4), 0.4),
    Channel(0.4),
]


def rounded(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    """Arrays with a tie at every threshold."""
    rng = np.random.default_rng(0)
    return [np.round(2 * rng.normal(size=shape)).astype(dtype) for shape in shapes]


def test_cond_takes_the_branch_of_its_predicate(xp: Backend) -> None:
    def branch(predicate: Any, x: Any) -> Any:
        return backend_of(x).cond(predicate, lambda a, b: a - b, lambda a, b: a + b, x, x)

    for predicate, wanted in ((True, 0.0), (False, 4.0)):
        given = xp.asarray(np.asarray(predicate)) if xp.traces else predicate
        assert float(xp.call(branch, given, xp.asarray(np.asarray(2.0)))) == wanted


# PyTorch


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_results_live_on_the_device_of_the_arrays(pattern: Any, weighted: bool) -> None:
    # The meta device has shapes and no values: nothing may be read, nothing made elsewhere.
    arrays = [torch.ones(4, 32, dtype=d, device="meta") for d in (torch.float32, torch.bfloat16)]
    importance = [torch.ones(32, device="meta")] * 2 if weighted else None
    values, support = project(arrays, pattern, importance)
    assert [(v.shape, v.dtype, v.device.type) for v in values] == [
        (x.shape, x.dtype, "meta") for x in arrays
    ]
    assert [(m.shape, m.dtype, m.device.type) for m in support] == [
        (x.shape, torch.bool, "meta") for x in arrays
    ]


def _by_sample(scores: Any, *, counts: Any, stage: int) -> Any:
    found = torch_accelerator.keep_largest([x.detach() for x in scores], k=counts[stage])
    return _by_counting(scores, counts=counts, stage=stage) if found is None else found


def _by_counting(scores: Any, *, counts: Any, stage: int) -> Any:
    return torch_counting.keep_largest([x.detach() for x in scores], k=counts[stage])


def _rows_on_an_accelerator(scores: Any, *, counts: Any, stage: int) -> Any:
    keys = torch_backend.ordering_key(scores)
    kth = torch_backend._kth_largest_per_row
    return threshold.keep_largest_per_row(
        keys, k=counts[stage], kth_largest=kth, xp=array_namespace(keys), can_branch=False
    )


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32", "float64"], ids=str)
@pytest.mark.parametrize("select", [_by_sample, _by_counting])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_accelerators_select_what_partition_selects(
    monkeypatch: pytest.MonkeyPatch, pattern: Any, select: Any, dtype: Any
) -> None:
    monkeypatch.setattr(torch_backend, "keep_largest", select)
    monkeypatch.setattr(torch_backend, "keep_largest_per_row", _rows_on_an_accelerator)
    arrays = rounded((8, 32), (4, 64), dtype=dtype)
    got = Backend.TORCH.run(projector(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


def test_a_parameter_projects_without_a_graph_on_its_support() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 3.0, 2.0]))
    values, support = project(weight, 0.5, importance=torch.ones(3))
    assert support.tolist() == [False, True, True]
    assert not support.requires_grad
    values.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([0.0, 1.0, 1.0]))


# JAX


@pytest.mark.every_second
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.4), Unstructured(0.4, "row"), NM(2, 4), Channel(0.4)], ids=str
)
def test_selects_the_same_without_64_bit_numbers(pattern: Any) -> None:
    # The default of JAX, which the other tests lift for the sake of float64.
    arrays, importance = rounded((8, 32), (4, 64)), [np.float32([[2.0]]), np.float32([[3.0]])]
    with jax.enable_x64(False):
        plain = Backend.JAX.run(projector(pattern), arrays)
        weighted = Backend.JAX_JIT.run(projector(pattern), arrays, importance)
    assert_same(plain.support, reference.select(arrays, pattern))
    assert_same(weighted.support, Backend.NUMPY.run(projector(pattern), arrays, importance).support)


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("piece", "summand", "sparsity"),
    [(2, 12, 0.4), (3, 12, 0), (5, 12, 0.4), (5, 100, 0.9), (12, 12, 0.4), (12, 12, 0.9)],
)
def test_arrays_too_large_for_one_count_are_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch, piece: int, summand: int, sparsity: float
) -> None:
    monkeypatch.setattr(jax_counting, "_PIECE", piece)
    monkeypatch.setattr(jax_counting, "_SUMMAND", summand)  # more entries are counted in pairs
    forget_programs()  # JAX would reuse programs with larger pieces
    split, pieces = jax_counting._split, []
    monkeypatch.setattr(jax_counting, "_split", lambda key: pieces.append(split(key)) or pieces[-1])
    arrays = rounded((3, 2, 2), (5,), ())
    got = Backend.JAX.run(projector(Unstructured(sparsity)), arrays)
    assert_same(got.support, reference.select(arrays, Unstructured(sparsity)))
    assert any(len(found) > 1 for found in pieces) == (piece < 12)


@pytest.mark.parametrize("chunk", [2**25, 40, 7])
@pytest.mark.parametrize("sparsity", [0.4, 0.9])
def test_arrays_that_are_joined_give_the_same(
    monkeypatch: pytest.MonkeyPatch, chunk: int, sparsity: float
) -> None:
    monkeypatch.setattr(jax_counting, "_CHUNK", chunk)
    monkeypatch.setattr(jax_counting, "joins", lambda arrays: True)
    monkeypatch.setattr(jax_counting, "_digit_bits", lambda: 4)  # as on an accelerator
    forget_programs()  # JAX would reuse programs that do not join
    chunked, chunks = jax_counting._chunks, []
    monkeypatch.setattr(
        jax_counting, "_chunks", lambda scores: chunks.append(chunked(scores)) or chunks[-1]
    )
    arrays = rounded((0, 2), (3, 2, 2), (5,), (), (0, 2), (6, 7))
    got = Backend.JAX.run(projector(Unstructured(sparsity)), arrays)
    assert_same(got.support, reference.select(arrays, Unstructured(sparsity)))
    assert [len(found) for found in chunks] == [{2**25: 1, 40: 2, 7: 4}[chunk]]


def test_large_arrays_are_not_copied_to_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_counting, "_SMALL", 6)
    monkeypatch.setattr(jax_counting, "_CHUNK", 10)
    arrays = [jnp.ones(size) for size in (7, 3, 6, 2, 0, 8, 9, 1, 0, 20, 5)]
    chunks = [[x.size for x in chunk] for chunk in jax_counting._chunks(arrays)]
    assert chunks == [[7], [3, 6], [2, 0], [8], [9], [1, 0], [20], [5]]
    assert jax_counting._chunks([]) == []


def test_arrays_of_an_explicit_mesh_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.device_put(jnp.arange(8.0).reshape(2, 4), jax.NamedSharding(mesh, jax.P(None, "x")))
    assert backend_of(split).joins([jnp.ones(3)])
    assert not backend_of(split).joins([split])
    forget_programs()  # JAX would reuse programs for other meshes
    assert project([split, split], 0.5).support[0].tolist() == [[False] * 4, [True] * 4]


def test_a_pass_over_joined_arrays_is_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_counting, "joins", lambda arrays: True)

    def reductions(arrays: int) -> int:
        # A function of its own for each count, because JAX caches what it traced.
        def select(scores: Any) -> Any:
            return jax_counting.keep_largest.__wrapped__(scores, counts=(100,), stage=0)

        program = jax.make_jaxpr(select)([jnp.ones((90, 90))] * arrays)
        return str(program).count(" reduce[")

    assert 0 < reductions(3) == reductions(30)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_counts_past_16_bits(xp: Backend, dtype: str, sparsity: float) -> None:
    if np.dtype(dtype) not in xp.dtypes:
        dtype = "float64"
    arrays = rounded((300, 400), (70_000,), dtype=dtype)
    assert_sorted(xp.run(projector(Unstructured(sparsity)), arrays).support, arrays, sparsity)


def test_counts_in_pairs_past_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_counting, "_SUMMAND", 150_000)
    forget_programs()  # JAX would reuse programs that count in one number
    arrays = rounded((300, 400), (70_000,))
    assert_sorted(Backend.JAX.run(projector(Unstructured(0.2)), arrays).support, arrays, 0.2)


@pytest.mark.parametrize("scope", ["global", "row"])
def test_counting_keeps_no_copy_of_the_arrays(scope: str) -> None:
    arrays = [jnp.ones((64, 650)), jnp.ones((3, 3, 32, 16))]
    if scope == "global":
        select = jax_counting.keep_largest.lower(arrays, counts=(1000,), stage=0)
    else:
        select = jax_counting.keep_largest_per_row.lower(arrays[0], counts=(10,), stage=0)
    needed = select.compile().memory_analysis()
    assert needed.temp_size_in_bytes < needed.argument_size_in_bytes / 20


@pytest.mark.parametrize("width", [2, 4])
def test_a_digit_is_set_at_every_place_of_a_pair(width: int) -> None:
    for shift in range(0, 48, width):
        found = 2**48 - 2 ** (shift + width)  # the bits above the digit
        for digit in range(1, 2**width):
            pair = jax_counting._with_digit(
                jax_counting._pick((found,), 0, large=True), jnp.uint32(digit), jnp.int32(shift)
            )
            assert [int(x) for x in pair] == list(divmod(found | digit << shift, 2**16))


@pytest.mark.parametrize("k", [2**20, 2**32 - 1, 2**32 + 5])
def test_ties_are_cut_past_32_bits(k: int) -> None:
    sizes = [2**31 - 1] * 4  # all entries tie, so those before a position are as many as it is

    def before(positions: Any) -> Any:
        ends = zip(sizes, jax_counting._ends(positions, sizes), strict=True)
        return jax_counting._sum_of([jnp.minimum(end, size) for size, end in ends], sizes)

    nothing, wanted = (jax_counting._pick((n,), 0, large=True) for n in (0, k))
    position, exact = jax_counting._search(
        before,
        nothing,
        nothing,
        lambda count: jax_counting._at_least(wanted, count),
        lambda count: jax_counting._same(wanted, count),
        sum(sizes).bit_length(),
    )
    assert bool(exact)
    assert value(position) == k


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("x", [np.arange(24.0), np.ones(24)], ids=["distinct", "tied"])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_nothing_is_promoted(scope: str, x: np.ndarray) -> None:
    arrays, pattern = [x.reshape(4, 6).astype(np.float32)], Unstructured(0.5, scope)
    got = Backend.JAX.run(projector(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


def value(pair: Any) -> int:
    """Return the number that a pair (high, low) stands for."""
    return (int(pair[0]) << 16) + int(pair[1])


def assert_sorted(support: Any, arrays: Any, sparsity: float) -> None:
    """Assert that the support is that of a stable sort."""
    scores = np.concatenate([np.abs(v).ravel() for v in arrays])
    wanted = np.zeros(scores.size, bool)
    wanted[np.argsort(-scores, kind="stable")[: scores.size - int(sparsity * scores.size)]] = True
    assert_same([np.concatenate([mask.ravel() for mask in support])], [wanted])


COUNTS = st.integers(0, 2**48 - 1)


@given(a=COUNTS, b=COUNTS)
def test_counts_in_pairs_are_exact(a: int, b: int) -> None:
    a, b = max(a, b), min(a, b)

    def pair(count: int) -> Any:
        return jax_counting._pick((count,), 0, large=True)

    assert value(jax_counting._subtract(pair(a), pair(b))) == a - b
    assert bool(jax_counting._at_least(pair(a), pair(b)))
    assert bool(jax_counting._at_least(pair(b), pair(a))) == (a == b)


@example(sizes=[2**31 - 1] * 4, share=Fraction(3, 4))
@given(
    sizes=st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4),
    share=st.fractions(0, 1),
)
def test_entries_before_a_position_lie_in_the_first_pieces(
    sizes: list[int], share: Fraction
) -> None:
    position = int(share * sum(sizes))
    large = sum(sizes) > jax_counting._SUMMAND
    ends = jax_counting._ends(jax_counting._pick((position,), 0, large), sizes)
    found = [min(int(end), size) for end, size in zip(ends, sizes, strict=True)]
    wanted = []
    for size in sizes:
        wanted.append(min(size, position))
        position -= wanted[-1]
    assert found == wanted


@pytest.mark.parametrize("kind", ["global", "row", "channel"])
def test_a_traced_step_picks_the_stage(kind: str) -> None:
    sparsity = schedules.cubic(0.9, steps=4, initial=0.25, start=2)
    pattern: Any = Channel(sparsity) if kind == "channel" else Unstructured(sparsity, kind)

    @jax.jit
    def zeros(x: Any, step: Any) -> Any:
        (mask,) = select(
            [x],
            pattern,
            importance=[None],
            layouts=[reference.default_layout(x.ndim)],
            names=["x"],
            step=step,
        )
        return jnp.sum(~mask)

    shape, pools = {"global": ((100,), 1), "row": ((2, 100), 2), "channel": ((100, 1), 1)}[kind]
    x = jnp.asarray(rounded(shape)[0])
    for step in range(9):
        stage = Fraction(min(max(step - 2, 0), 4), 4)
        exact = Fraction(9, 10) + (Fraction(1, 4) - Fraction(9, 10)) * (1 - stage) ** 3
        assert int(zeros(x, jnp.asarray(step))) == pools * int(100 * exact)


@pytest.mark.every_second
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.4), Unstructured(0.4, "row"), NM(2, 4), NM(5, 17, "dense")], ids=str
)
def test_vmap_projects_every_vector(pattern: Any) -> None:
    batch, importance = rounded((3, 24))[0], np.arange(1.0, 25.0, dtype=np.float32) % 7

    def one(x: Any, p: Any) -> Any:
        return project(x, pattern, p)

    mapped = jax.vmap(one, in_axes=(0, None))(jnp.asarray(batch), jnp.asarray(importance))
    for i, x in enumerate(batch):
        wanted = Backend.NUMPY.run(one, x, importance)
        assert_same([np.asarray(mapped.support[i])], [wanted.support])
        assert_same([np.asarray(mapped.values[i])], [wanted.values])


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safe_core import NM, Block, Channel, Unstructured, project

mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.{axis_type},))
rng = np.random.default_rng(0)
matrix = np.round(2 * rng.normal(size=(16, 32))).astype(np.float32)
vector = np.round(2 * rng.normal(size=(32,))).astype(np.float32)
importance = np.exp2(rng.integers(-2, 3, size=32)).astype(np.float32)


def shard(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


eager = [(Unstructured(0.4), ("d",)), (NM(2, 4), ("d",)), (NM(2, 4), (None, "d"))]
for pattern, spec, p in {cases}:
    whole, parts = [matrix], [shard(matrix, *spec)]
    if isinstance(pattern, Unstructured):
        whole, parts = [matrix, vector], [parts[0], shard(vector, "d")]
    p = [importance] * len(whole) if p else None
    q = None if p is None else [shard(w) for w in p]
    wanted = project(whole, pattern, p)
    jitted = jax.jit(project, static_argnums=1)
    for run in [project, jitted] if (pattern, spec) in eager else [jitted]:
        got = run(parts, pattern, q)
        for a, b in zip(wanted.support + wanted.values, got.support + got.values):
            np.testing.assert_array_equal(a, b, err_msg=str((pattern, spec)))
        for value, x in zip(got.values, parts):
            assert value.sharding.is_equivalent_to(x.sharding, x.ndim), value.sharding
    print("agrees")
"""
ENTRIES = """[
    (Unstructured(0.4), ("d",), False),
    (Unstructured(0.4), (None, "d"), True),
    (Unstructured(0.4, "row"), (None, "d"), False),
    (NM(2, 4), ("d",), False),
    (Channel(0.4), ("d",), False),
]"""
ACROSS_SHARDS = """[
    (NM(2, 4), (None, "d"), True),
    (NM(8, 32), (None, "d"), False),
    (Block((4, 4), 0.4), ("d",), False),
    (Block((4, 4), 0.4), (None, "d"), True),
]"""
REGROUPED = """[
    (NM(2, 4), (None, "d"), True),
    (NM(8, 32), (None, "d"), False),
    (NM(2, 5, "dense"), (None, "d"), False),
    (Block((2, 4), 0.4), ("d",), False),
    (Block((4, 4), 0.4), (None, "d"), True),
    (Block((4, 4), 0.4), ("d",), True),
    (Block((8, 8), 0.4), ("d",), False),
    (Channel(0.4), (None, "d"), True),
]"""


@pytest.mark.parametrize(
    ("axis_type", "cases"),
    [
        pytest.param("Auto", ACROSS_SHARDS, id="auto"),
        pytest.param("Auto", ENTRIES, id="entries, auto", marks=pytest.mark.long),
        pytest.param("Explicit", ENTRIES + " + " + REGROUPED, id="explicit"),
    ],
)
def test_eight_devices_select_what_one_selects(axis_type: str, cases: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    finished = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "error",
            "-c",
            SHARDED.format(axis_type=axis_type, cases=cases),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["agrees"] * cases.count("),\n")
