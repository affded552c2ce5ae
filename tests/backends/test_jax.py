"""Selection in JAX: few passes, on the host by choice, and what the compiled program moves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from array_backends import Backend, assert_same, forget_programs, projector

import safe_core
import safe_core.backends.jax_counting as jax_counting
from safe_core import NM, Channel, Unstructured, project, schedules
from safe_core.adapters.optax import finalize, sparse_optimizer
from safe_core.backends import selecting_on_host, selects_on_host
from safe_core.projection import select

HARD = {
    "sorted": np.arange(4800.0),
    "one value": np.full(4800, 3.0),
    "zeros": np.zeros(4800),
    "two values": np.repeat([1.0, 2.0], 2400),
    "one large": np.concatenate([np.zeros(4799), [1e30]]),
    "tiny": np.arange(4800.0) * 1e-7,
}


@pytest.mark.every_second
@pytest.mark.parametrize("sparsity", [0.01, 0.5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("scope", ["global", "row"])
def test_hard_scores_select_as_the_reference(
    scope: str, kind: str, dtype: Any, sparsity: float
) -> None:
    with np.errstate(over="ignore"):
        arrays = [
            HARD[kind].reshape(40, 120).astype(dtype),
            HARD[kind][::-1].reshape(80, 60).astype(dtype),
        ]
    pattern = Unstructured(sparsity, scope)
    got = Backend.JAX_JIT.run(projector(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        (Unstructured(0.4), 37),
        (NM(8, 32), 38),
        ({"a": Unstructured(0.5), "b": Channel(0.4)}, 39),
    ],
    ids=["unstructured", "N:M", "by name"],
)
def test_an_eager_projection_compiles_few_programs(pattern: Any, rows: int) -> None:
    compiled = []

    def record(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    # No other test has these shapes, so nothing is compiled already.
    arrays = {"a": jnp.ones((rows, 96)), "b": jnp.ones((rows, 192))}
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        project(arrays, pattern)
        # One finds NaN, one selects, and one applies the support. The first call of a process
        # compiles a constant too.
        assert 3 <= len(compiled) <= 4
        before = len(compiled)
        project(arrays, pattern)
        assert len(compiled) == before
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def on_host(pattern: Any) -> Any:
    return lambda arrays: project(arrays, pattern, select_on_host=True)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.4), Unstructured(0.4, "row"), NM(8, 32)], ids=str
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in (Backend.JAX, Backend.JAX_JIT, Backend.TORCH, Backend.NUMPY)
        for dtype in backend.dtypes
    ],
    ids=str,
)
def test_the_host_selects_the_same(backend: Backend, pattern: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = [np.round(2 * rng.normal(size=(4, 64))).astype(dtype) for _ in range(2)]
    got = backend.run(on_host(pattern), arrays)
    assert_same(got.support, reference.select(arrays, pattern))


def test_the_host_selects_under_scan_and_vmap() -> None:
    batch = jnp.asarray(np.round(2 * np.random.default_rng(0).normal(size=(3, 40))))

    def one(x: Any) -> Any:
        return project(x, 0.4, select_on_host=True).support

    wanted = jnp.stack([project(x, 0.4).support for x in batch])
    _, scanned = jax.lax.scan(lambda carry, x: (carry, one(x)), None, batch)
    assert bool((jax.vmap(one)(batch) == wanted).all())
    assert bool((jax.jit(jax.vmap(one))(batch) == wanted).all())
    assert bool((scanned == wanted).all())


@pytest.mark.parametrize("select_on_host", [False, True])
def test_a_training_run_selects_where_it_is_told(select_on_host: bool) -> None:
    method = safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=2)
    tx = sparse_optimizer(optax.sgd(0.1), method, select_on_host=select_on_host)
    params = {"kernel": jnp.arange(8.0).reshape(4, 2)}

    def update(params: Any, state: Any) -> Any:
        return tx.update(params, state, params, grad_fn=lambda params: params)

    def end(params: Any, state: Any) -> Any:
        return finalize(params, state, method, select_on_host=select_on_host)

    state = tx.init(params)
    programs = {
        "init": jax.make_jaxpr(tx.init)(params),
        "update": jax.make_jaxpr(update)(params, state),
        "finalize": jax.make_jaxpr(end)(params, state),
    }
    calls = {name: "pure_callback" in str(program) for name, program in programs.items()}
    assert calls == dict.fromkeys(programs, select_on_host)


def test_the_choice_of_the_host_ends_with_its_context() -> None:
    @selecting_on_host(True)
    def fail() -> None:
        with selecting_on_host(False):
            assert not selects_on_host()
        assert selects_on_host()
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert not selects_on_host()


def test_one_program_serves_every_stage() -> None:
    pattern = Unstructured(schedules.cubic(0.9, steps=4, initial=0.25))
    x = jnp.asarray(np.random.default_rng(0).normal(size=100))
    before = jax_counting.keep_largest._cache_size()
    traces = []

    @jax.jit
    def zeros(step: Any) -> Any:
        traces.append(step)
        (mask,) = select([x], pattern, importance=[None], layouts=[None], names=["x"], step=step)
        return jnp.sum(~mask)

    found = [int(zeros(jnp.asarray(step))) for step in range(5)]
    assert found == sorted(set(found))
    assert len(traces) == 1
    assert jax_counting.keep_largest._cache_size() <= before + 1


def test_the_search_ends_where_a_count_is_exact() -> None:
    passes = []
    keys = jnp.asarray([1, 2**28, 2**29], jnp.uint32)

    def at_least(thresholds: Any) -> Any:
        jax.debug.callback(lambda: passes.append(1))
        return jnp.sum(keys[:, None] >= thresholds, axis=0, dtype=jnp.uint32)

    threshold, exact = jax_counting._search(
        at_least, jnp.uint32(0), jnp.uint32(3), lambda c: c >= 2, lambda c: c == 2, bits=30
    )
    jax.effects_barrier()
    assert bool(exact)
    assert 1 < int(threshold) <= 2**28
    assert len(passes) == 1


@pytest.mark.parametrize(("values", "tied"), [([4, 3, 2, 1], False), ([4, 3, 3, 1], True)])
def test_positions_are_searched_for_ties_alone(values: list[int], tied: bool) -> None:
    passes = []
    keys, index = jnp.asarray(values, jnp.uint32), jnp.arange(4, dtype=jnp.uint32)

    def kept(threshold: Any, end: Any) -> Any:
        return jax_counting._kept(keys[:, None], threshold, index[:, None], end)

    def before(threshold: Any, positions: Any) -> Any:
        jax.debug.callback(lambda: passes.append(1))
        return jnp.sum(kept(threshold, positions), axis=0, dtype=jnp.uint32)

    threshold, position = jax_counting._threshold_and_position(
        lambda thresholds: jnp.sum(keys[:, None] >= thresholds, axis=0, dtype=jnp.uint32),
        before,
        jnp.uint32(0),
        jnp.uint32(4),
        jnp.uint32(2),
        4,
    )
    jax.effects_barrier()
    assert kept(threshold, position)[:, 0].tolist() == [True, True, False, False]
    assert bool(passes) == tied


def in_eight_devices(program: str) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    finished = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


SHARDS = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safe_core import project

mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.{axis_type},))

def shard(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
"""
PROGRAM = """
for n in (2**14, 2**18):
    xs = [shard(jnp.ones((n // 64, 64)), "d"), shard(jnp.ones((64, n // 64)), None, "d")]
    compiled = jax.jit(lambda xs: project(xs, 0.95)).lower(xs).compile()
    print("program", compiled.as_text())
"""
REFUSED = """
x = shard(jnp.ones((64, 64)), "d")
for run in (project, jax.jit(project, static_argnums=1, static_argnames="select_on_host")):
    try:
        run(x, 0.5, select_on_host=True)
    except ValueError as error:
        print("refused" if "must be False for arrays on several devices" in str(error) else error)
"""
MOVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(program: str) -> list[str]:
    """The lines of an HLO program that move data between devices."""
    lines = program.splitlines()
    return [line for line in lines if any(f"{m}(" in line or f"{m}-start(" in line for m in MOVES)]


def moved_bytes(program: str) -> int:
    """The size of what collectives and host transfers of an HLO program return."""
    assert "infeed" not in program
    assert "outfeed" not in program
    assert 'custom-call-target="xla_ffi_python' not in program
    total = 0
    for line in collectives(program):
        result = line.partition(" = ")[2]
        result = result[: min(result.index(f"{name}") for name in MOVES if name in result)]
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            total += WIDTHS[kind] * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
    return total


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_what_a_sharded_projection_moves_does_not_grow_and_the_host_refuses_shards(
    axis_type: str,
) -> None:
    printed = in_eight_devices(SHARDS.format(axis_type=axis_type) + REFUSED + PROGRAM)
    refused, *programs = printed.split("program ")
    assert refused.split() == ["refused", "refused"]
    moved = [moved_bytes(program) for program in programs]
    assert len(moved) == 2
    assert 0 < moved[0] == moved[1] < 16_384, moved
    # Three counts for each of two arrays, in the search of the threshold and in that of ties. A
    # GPU combines them.
    assert [len(collectives(program)) for program in programs] == [12, 12]


@pytest.mark.parametrize("bits", [2, 4])
def test_each_stage_of_a_selection_is_exact_in_float64(
    monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(jax_counting, "_digit_bits", lambda: bits)
    forget_programs()  # JAX would reuse programs with other digits
    x = 1 + np.arange(200)[::-1] * 2.0**-52  # neighbours, which float32 cannot tell apart
    x[::3] *= -1
    weighted = np.asarray(jax.jit(lambda x, p: jnp.sqrt(p) * jnp.abs(x))(x, np.ones(200)))
    np.testing.assert_array_equal(weighted, np.abs(x), err_msg="scores")
    keys = np.asarray(jax.jit(jax_counting._unsigned_key)(x))
    np.testing.assert_array_equal(keys, np.abs(x).view(np.uint64), err_msg="keys")

    @jax.jit
    def counted(keys: Any) -> Any:
        return jnp.stack(jax_counting._reduced([keys >= t for t in (keys[0], keys[99], keys[199])]))

    np.testing.assert_array_equal(counted(keys), [1, 100, 200], err_msg="counts")
    for k in (1, 77, 200):
        (mask,) = jax_counting.keep_largest([jnp.asarray(x)], counts=(k,), stage=0)
        np.testing.assert_array_equal(mask, np.arange(200) < k, err_msg=f"mask of {k}")
        rows = jnp.asarray(np.stack([x, x[::-1]]))
        mask = jax_counting.keep_largest_per_row(rows, counts=(k,), stage=0)
        wanted = np.stack([np.arange(200) < k, np.arange(200) >= 200 - k])
        np.testing.assert_array_equal(mask, wanted, err_msg=f"mask of {k} in each row")
