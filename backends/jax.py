"""The backend of JAX, whose functions trace, map and shard.

Selection is in `jax_counting`, or on the host if `selecting_on_host` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import Array, hashing, jax_counting, selects_on_host, threshold
from . import numpy as numpy_backend
from .standard import detached, peaks, widened

__all__ = [
    "as_program",
    "blockwise",
    "cond",
    "detached",
    "exponents",
    "exponents_along",
    "has_bfloat16",
    "has_nan",
    "is_concrete",
    "joins",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "linalg_errors",
    "norms",
    "on_several_devices",
    "ordering_key",
    "peaks",
    "positions",
    "regrouped",
    "resharded_as",
    "scaled",
    "shardwise",
    "stochastic_bfloat16",
    "unreadable",
    "where_kept",
    "widened",
]

_INTEGER = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
_FORMAT = {4: (127, 23), 8: (1023, 52)}  # bias of the exponent, and bits of the mantissa
_SIGN = 0x80000000
_LARGEST = 0x7F7FFFFF  # bits of the largest finite float32


def unreadable(x: Array) -> str:
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return f"an array of numbers, got dtype {x.dtype}"
    return ""


def is_concrete(x: Array) -> bool:
    return not isinstance(x, jax.core.Tracer)


def has_nan(arrays: Sequence[Array]) -> bool:
    found = as_program(_has_nan, (), list(arrays))
    # Within a traced program, operations on concrete arrays are traced too.
    return is_concrete(found) and bool(found)


def _has_nan(arrays: list[Array]) -> Array:
    return jnp.any(jnp.stack([jnp.any(jnp.isnan(x)) for x in arrays]))


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    # Arrays of one shape and dtype share a program.
    return [as_program(_where_kept, (), x, mask) for x, mask in zip(arrays, masks, strict=True)]


def _where_kept(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def norms(arrays: Sequence[Array], *, dtype: Any) -> Array:
    # Do not flatten the arrays: an array can be sharded over explicit mesh axes along any of
    # its axes, and JAX refuses reshapes that would mix such an axis with others.
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(a.astype(dtype)))) for a in arrays])


def on_several_devices(x: Array) -> bool:
    if is_concrete(x):
        return len(x.sharding.device_set) > 1
    return bool(jax.typeof(x).sharding.mesh.size > 1)


def regrouped(x: Array, *, units: Mapping[int, int]) -> Array:
    spec = _explicit_spec(x)
    cut = {axis for axis, names in enumerate(spec) if names and _cuts(x, axis, names, units)}
    if not cut:
        return x
    moving = [name for axis in sorted(cut) for name in spec[axis]]
    kept = [() if axis in cut else names for axis, names in enumerate(spec)]
    return _resharded(x, _spread(x, kept, moving, units), _mesh(x))


def _spread(
    x: Array, kept: Sequence[tuple[str, ...]], moving: Sequence[str], units: Mapping[int, int]
) -> list[tuple[str, ...]]:
    """Return ``kept`` with the mesh axes ``moving`` on axes of ``x`` where shards cut no unit.

    Mesh axes for which there is no such place are left out, so their devices hold copies. Of
    all choices the one with the most shards wins.
    """
    mesh = jax.typeof(x).sharding.mesh
    found, best = list(kept), (0, 0, 0)
    # Arrays and meshes have few axes, so all choices can be tried. The last place is "nowhere".
    for places in product(range(x.ndim + 1), repeat=len(moving)):
        spec, shards = [list(names) for names in (*kept, ())], 1
        for name, place in zip(moving, places, strict=True):
            spec[place].append(name)
            shards *= 1 if place == x.ndim else mesh.shape[name]
        taken = sorted({place for place in places if place != x.ndim})
        if any(_cuts(x, axis, spec[axis], units, even=True) for axis in taken):
            continue
        # Prefer axes that are not sharded yet, and then long ones.
        shared = sum(bool(kept[axis]) for axis in taken)
        rank = (shards, -shared, max((x.shape[axis] for axis in taken), default=0))
        if rank > best:
            found, best = [tuple(names) for names in spec[:-1]], rank
    return found


def resharded_as(x: Array, result: Array) -> Array:
    spec = _explicit_spec(x)
    if not any(spec):
        return result
    return _resharded(result, spec, _mesh(x))


def shardwise(
    fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
) -> Array:
    specs = [_explicit_spec(x) for x in arrays]
    if not any(specs[0]):
        return fn(*arrays)
    cut = {(axes or {}).get(axis, axis): names for axis, names in enumerate(specs[0]) if names}
    out = [cut.get(axis, ()) for axis in range(max(cut) + 1)]
    # Only axes of explicit type are mapped by hand. The compiler shards over the others.
    mapped = jax.shard_map(
        fn,
        mesh=_mesh(arrays[0]),
        in_specs=tuple(_named(spec) for spec in specs),
        out_specs=_named(out),
        axis_names=set(jax.typeof(arrays[0]).sharding.mesh.explicit_axes),
        check_vma=False,
    )
    return mapped(*arrays)


def _resharded(x: Array, spec: Sequence[tuple[str, ...]], mesh: Any) -> Array:
    sharding = jax.sharding.NamedSharding(mesh, _named(spec))
    return jax.sharding.reshard(x, sharding)  # type: ignore[no-untyped-call]


def _mesh(x: Array) -> Any:
    # A concrete array knows its devices. The type of a traced one knows the abstract mesh.
    return x.sharding.mesh if is_concrete(x) else jax.typeof(x).sharding.mesh


def _named(spec: Sequence[tuple[str, ...]]) -> jax.sharding.PartitionSpec:
    found = [names or None for names in spec]
    return jax.sharding.PartitionSpec(*found)  # type: ignore[no-untyped-call]


def _explicit_spec(x: Array) -> list[tuple[str, ...]]:
    """Return, for each axis of ``x``, the explicit mesh axes that its type is sharded over.

    The compiler decides over which automatic axes to shard, and they are no part of the type.
    """
    sharding = jax.typeof(x).sharding
    explicit = set(sharding.mesh.explicit_axes)
    spec: list[tuple[str, ...]] = []
    for held in (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))):
        names = held if isinstance(held, tuple) else (held,)
        spec.append(tuple(name for name in names if name in explicit))
    return spec


def _cuts(
    x: Array, axis: int, names: Sequence[str], units: Mapping[int, int], even: bool = False
) -> bool:
    """Return whether a shard can begin within a unit, or, if ``even``, shards differ in size."""
    unit, mesh = units.get(axis, 1), jax.typeof(x).sharding.mesh
    count = math.prod(mesh.shape[name] for name in names)
    return unit == 0 or ((even or unit > 1) and x.shape[axis] % (unit * count) != 0)


def known_finite(arrays: Sequence[Array]) -> bool:
    # Neither a traced program nor an asynchronous device can tell without a wait.
    return False


def joins(arrays: Sequence[Array]) -> bool:
    return jax_counting.joins(list(arrays))


def blockwise(
    fn: Callable[..., Array],
    *lists: Sequence[Array],
    static: tuple[Any, ...] | None = None,
    out: Sequence[Array] | None = None,
) -> list[Array]:
    if static is None:
        return [fn(*arrays) for arrays in zip(*lists, strict=True)]
    return [as_program(fn, static, *arrays) for arrays in zip(*lists, strict=True)]


def positions(x: Array) -> Array:
    return jnp.arange(x.size, dtype=jnp.int32)


def ordering_key(x: Array) -> Array:
    # XLA flushes subnormal floats to zero in arithmetic and comparisons, so compare bits.
    # Non-negative floats order as their bits do.
    integer = _INTEGER[x.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(x, integer)
    return bits & (2 ** (8 * x.dtype.itemsize - 1) - 1)


def exponents(arrays: Sequence[Array]) -> Array:
    found = [exponents_along(x, axes=tuple(range(x.ndim))) for x in arrays]
    return jnp.stack([jnp.reshape(exponent, ()) for exponent in found])


def exponents_along(x: Array, *, axes: tuple[int, ...]) -> Array:
    # XLA takes subnormal numbers for zero in a maximum, so take that of their bits.
    keys, infinity = ordering_key(x), ordering_key(jnp.full_like(x, jnp.inf, shape=()))
    finite = jnp.where(keys < infinity, keys, jnp.zeros_like(keys))
    peak = jnp.max(finite, axis=axes, keepdims=True, initial=0)
    bias, shift = _FORMAT[x.dtype.itemsize]
    # A number without the implicit leading bit is n * 2**(1 - bias - shift).
    length = 8 * x.dtype.itemsize - lax.clz(peak)
    subnormal = peak < 2**shift
    found = jnp.where(subnormal, length + (1 - bias - shift), (peak >> shift) - bias + 1)
    return found.astype(jnp.int32)


def scaled(x: Array, exponents: Array, *, dtype: Any) -> Array:
    bias, shift = _FORMAT[x.dtype.itemsize]
    bits = ordering_key(x)
    subnormal = bits < 2**shift
    # XLA takes subnormal numbers for zero, so read n of n * 2**(1 - bias - shift) as an integer.
    magnitude = jnp.where(subnormal, bits.astype(dtype), jnp.abs(x).astype(dtype))
    lifted = jnp.where(subnormal, exponents - (1 - bias - shift), exponents)
    integer = _INTEGER[jnp.dtype(dtype).itemsize]
    bias, shift = _FORMAT[jnp.dtype(dtype).itemsize]
    wide = jnp.dtype(dtype).itemsize == 8
    for part in threshold.parts(lifted.astype(integer), wide=wide, xp=jnp):
        power = lax.bitcast_convert_type((bias - part) << shift, dtype)
        magnitude = magnitude * power
    least = 2.0 ** (1 - bias)  # the smallest normal number
    return jnp.where(magnitude < least, jnp.zeros_like(magnitude), magnitude)


def has_bfloat16() -> bool:
    return True


def stochastic_bfloat16(
    arrays: Sequence[Array], *, step: int | Array, out: Sequence[Array] | None = None
) -> list[Array]:
    return _stochastic_bfloat16(list(arrays), step)


# Compiled as one program, in which the bit operations become one pass over each array.
# The public function stays outside, for a type checker sees no signature behind `jax.jit`.
@jax.jit
def _stochastic_bfloat16(arrays: list[Array], step: int | Array) -> list[Array]:
    salt = hashing.mix(jnp.asarray(step).astype(jnp.int32))

    def rounded(x: Array) -> Array:
        # bfloat16 is the upper half of float32. Adding a uniform 16-bit number to the bits
        # carries into that half with the probability of the lower half, which is what
        # stochastic rounding asks for. The minimum keeps what is finite from being rounded
        # up to infinity.
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        magnitude = bits & 0x7FFFFFFF
        # The hash is one of signed words. To view them as unsigned costs nothing.
        word = lax.bitcast_convert_type(magnitude, jnp.int32)
        hashed = lax.bitcast_convert_type(hashing.mix(word ^ salt), jnp.uint32)
        dithered = magnitude + (hashed >> 16)
        signed = jnp.minimum(dithered, jnp.uint32(_LARGEST)) | (bits & jnp.uint32(_SIGN))
        return lax.bitcast_convert_type((signed >> 16).astype(jnp.uint16), jnp.bfloat16)

    return [rounded(x) for x in arrays]


def as_program(fn: Callable[..., Any], static: tuple[Any, ...], *operands: Any) -> Any:
    # Outside of a traced program JAX compiles every operation apart, for each shape. Arrays on
    # several devices are left to that, because one program takes arrays of one mesh only.
    arrays = [x for x in jax.tree.leaves(operands) if isinstance(x, jax.Array)]
    if selects_on_host() or not all(map(is_concrete, arrays)):
        return fn(*static, *operands)
    if len({device for x in arrays for device in x.sharding.device_set}) > 1:
        return fn(*static, *operands)
    # A Python integer has a weak type, and would need a program beside that for an int32 array.
    same = jax.tree.map(
        lambda x: jax.device_put(np.int32(x)) if isinstance(x, int) else x, operands
    )
    return _program(fn, static, *same)


@partial(jax.jit, static_argnums=(0, 1))
def _program(fn: Callable[..., Any], static: tuple[Any, ...], *operands: Any) -> Any:
    return fn(*static, *operands)


def cond(
    predicate: bool | Array,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    if isinstance(predicate, bool) or is_concrete(predicate):
        # Outside of a traced program, `lax.cond` would compile both branches at every call.
        return true_fun(*operands) if predicate else false_fun(*operands)
    return lax.cond(predicate, true_fun, false_fun, *operands)


def keep_largest(
    scores: Sequence[Array], *, counts: tuple[int, ...], stage: int | Array
) -> list[Array]:
    if selects_on_host():
        return _select_on_host(_arrays_on_host, list(scores), counts, stage)
    return jax_counting.keep_largest(list(scores), counts=counts, stage=stage)


def keep_largest_per_row(scores: Array, *, counts: tuple[int, ...], stage: int | Array) -> Array:
    if selects_on_host():
        return _select_on_host(_rows_on_host, [scores], counts, stage)[0]
    return jax_counting.keep_largest_per_row(scores, counts=counts, stage=stage)


def _select_on_host(
    select: Callable[..., list[Any]],
    scores: list[Array],
    counts: tuple[int, ...],
    stage: int | Array,
) -> list[Array]:
    for score in scores:
        if on_several_devices(score):
            # The host would gather the array, and processes that wait for each other deadlock.
            raise ValueError(
                "the host cannot select from arrays on several devices, got "
                f"{jax.typeof(score).sharding}"
            )
    # Send bits, for NumPy has no bfloat16. Its backend handles scores as integers of their
    # bits, and clears the sign of both alike.
    bits = [lax.bitcast_convert_type(x, _INTEGER[x.dtype.itemsize]) for x in scores]
    masks = [jax.ShapeDtypeStruct(x.shape, jnp.bool) for x in scores]  # type: ignore[no-untyped-call]

    def run(stage: Any, *bits: Any) -> list[Any]:
        arrays = [np.asarray(x) for x in bits]
        return select(arrays, counts, int(stage))

    found: list[Array] = jax.pure_callback(
        run, masks, jnp.asarray(stage), *bits, vmap_method="sequential"
    )
    return found


def _arrays_on_host(scores: Sequence[Any], counts: tuple[int, ...], stage: int) -> list[Any]:
    return numpy_backend.keep_largest(scores, counts=counts, stage=stage)


def _rows_on_host(scores: Sequence[Any], counts: tuple[int, ...], stage: int) -> list[Any]:
    return [numpy_backend.keep_largest_per_row(x, counts=counts, stage=stage) for x in scores]


def linalg_errors() -> tuple[type[Exception], ...]:
    # JAX returns NaN instead.
    return ()
