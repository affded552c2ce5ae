"""Measure in which forms zeros of a Flax model pay on this machine."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safe_core._checks import shown
from safe_core._synthetic import synthetic_weight
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.export_forms import OWN, Sparsity
from safe_core.adapters.export_measurements import (
    Collected,
    Totals,
    check_plan,
    measure_litert,
    own_times,
    stored_bytes,
)
from safe_core.adapters.layer_timing import LayerTiming, interleaved, processor
from safe_core.compressed.forms import chosen_form

from ..compressed import raw_array
from ..litert import litert_graph
from .sparse_model import (
    Layer,
    LinenLayers,
    NnxLayers,
    bcsr,
    layers_of,
    product,
    timed,
    waiting,
)

__all__ = ["advise"]

PyTree = Any
_KNOWN = ("dense", "litert", "int8", "1x4", "1x16", "bcsr")
_SUMMED = (
    "BCSR: the time of the dense model, less what its linear layers save that get a tenth faster; "
    "layers of equal shapes were measured once"
)


def advise(
    model: Any,
    example_inputs: Any,
    *,
    variables: PyTree = None,
    batch_sizes: Collection[int] | None = None,
    sparsities: Collection[float] = (0.8, 0.9, 0.95),
    forms: Collection[str] | None = None,
    repeats: int = 9,
) -> ExportAdvice:
    """Measure in which forms zeros would pay on this machine, before or after training.

    Random weights, with zeros at random places, stand in for those of the model. So only its
    shapes count, and it need not be trained. Measured are

    - files of the whole model for LiteRT: dense in float32 and int8, and with zeros in blocks of
      1x4 (float32) and 1x16 (int8), with one thread;
    - its linear layers in BCSR, compiled, where the arrays are.

    If at least a hundredth of the weights are zero, the same is measured with these zeros. A form
    pays if it takes at most nine tenths of the time of dense float32.

    ``model`` and ``variables`` stay as they are.

    Parameters
    ----------
    model : flax.nnx.Module or flax.linen.Module
        Trained or not, dense or sparse.
    example_inputs : array or tuple of arrays
        The arguments of the model. Random values will do.
    variables : pytree, optional
        Those of a Linen module.
    batch_sizes : list of int, optional
        Numbers of samples of a call, along the first axis of all inputs, which are repeated or
        cut to that size. By default the inputs are used as they are.
    sparsities : list of float
        Fractions of zeros in the kernels of linear layers.
    forms : list of str, optional
        Forms to measure beside the dense ones: ``"1x4"``, ``"1x16"`` and ``"bcsr"``; by default
        all.
    repeats : int
        Measurements of each form; LiteRT takes more in the same time.

    Returns
    -------
    ExportAdvice
        Print it for a table with the advice. Forms that cannot be measured are in it with their
        reasons.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jax.nn.relu)
    >>> found = advise(model, jnp.ones((4, 64)), sparsities=[0.9], forms=["bcsr"], repeats=2)
    >>> sorted(found.form("bcsr").seconds[None]), found.form("1x4").reason
    ([0.9], 'forms= leaves it out')
    """
    layers = layers_of(model, variables)
    plan = check_plan(
        "JAX",
        _KNOWN,
        forms=forms,
        batch_sizes=batch_sizes,
        sparsities=sparsities,
        repeats=repeats,
        zeros=_zeros(layers),
    )
    inputs = {n: _resized(example_inputs, n) for n in plan.batch_sizes}
    found = Collected(plan)
    bound = model if variables is None else model.bind(variables)
    for batch, given in inputs.items():
        run = layers.call(None, given)
        taken = interleaved({"dense": run}, plan.repeats)["dense"]
        found.add("dense", batch, 0.0, statistics.median(taken), _nbytes(layers))
        if "bcsr" in plan.forms:
            _measure_layers(found, batch, layers, given)
        measure_litert(found, batch, lambda given=given: litert_graph(bound, given))  # type: ignore[misc]
    machine = f"{processor()}, {jax.default_backend()}; LiteRT with one thread"
    return found.advice(machine)


def _zeros(layers: NnxLayers | LinenLayers) -> float:
    kernels = layers.kernels().values()
    if not kernels:
        raise ValueError("model must have weights that can be pruned, got none")
    entries = sum(kernel.size for kernel in kernels)
    return 1 - sum(int(jnp.count_nonzero(kernel)) for kernel in kernels) / max(1, entries)


def _resized(example_inputs: Any, batch: int | None) -> tuple[Any, ...]:
    """Return inputs with a number of samples."""
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if batch is None:
        return given
    for x in given:
        if not getattr(x, "ndim", 0) or not len(x):
            raise ValueError(
                "example_inputs must be arrays with samples on their first axes for batch_sizes=, "
                f"got {shown(x)}"
            )
    return tuple(jnp.asarray(x)[jnp.arange(batch) % len(x)] for x in given)


def _nbytes(layers: NnxLayers | LinenLayers) -> int:
    return sum(int(x.nbytes) for x in _arrays(layers))


def _arrays(layers: NnxLayers | LinenLayers) -> list[jax.Array]:
    """Return the arrays of a model without the keys of random numbers, which no file holds."""
    found = map(jnp.asarray, layers.arrays())
    return [x for x in found if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


class _Call(NamedTuple):
    """A call of a linear layer: the shapes of its kernel and inputs, and its dtypes."""

    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    dtypes: tuple[Any, Any]
    bias: bool


def _measure_layers(
    found: Collected, batch: int | None, layers: NnxLayers | LinenLayers, inputs: tuple[Any, ...]
) -> None:
    """Time the linear layers in BCSR, after the dense model."""
    every = layers.layers(inputs)
    known = {name: x for name, x in every.items() if isinstance(x, Layer)}
    for name in layers.kernels():
        if name not in known:
            found.note(f"BCSR: {name} stays dense: {every.get(name, 'it has no sparse kernel')}")
    calls: Counter[_Call] = Counter()
    for layer in known.values():
        for (shape, dtype), count in layer.calls.items():
            dtypes = layer.kernel.dtype, dtype
            calls[_Call(layer.kernel.shape, shape, dtypes, layer.bias is not None)] += count
    whole = found.seconds["dense"][batch][0.0]
    totals = Totals(whole)
    for call, count in calls.items():
        totals.add(count, _times(found, call))
    for (form, at), seconds in totals.seconds():
        kept = {name: _kept(layer.kernel, float(at)) for name, layer in known.items()}
        found.add(form, batch, at, seconds, _stored(layers, kept))
        found.note(_SUMMED)
    if found.plan.own is None:
        return
    totals = Totals(whole)
    for name, layer in known.items():
        zeros = 1 - int(jnp.count_nonzero(layer.kernel)) / max(1, layer.kernel.size)
        timing = timed(LayerTiming(name, layer.kernel.shape, zeros), layer, found.plan.repeats)
        if timing.seconds:
            totals.add(1, own_times(timing))
    for (form, _), seconds in totals.seconds():
        size = sum(chosen_form(raw_array(x)).nbytes for x in _arrays(layers))
        found.add(form, batch, OWN, seconds, size)


def _times(found: Collected, call: _Call) -> dict[tuple[str, Sparsity], float]:
    x = jax.random.normal(jax.random.key(0), call.inputs, call.dtypes[1])
    bias = jnp.zeros(call.kernel[1], call.dtypes[0]) if call.bias else None
    size = call.kernel[1], call.kernel[0]
    kernels: dict[tuple[str, Sparsity], Any] = {
        ("dense", 0.0): jnp.asarray(synthetic_weight(size, (1, 1), 0.0).T, call.dtypes[0])
    }
    for sparsity in found.plan.sparsities:
        values = jnp.asarray(synthetic_weight(size, (1, 1), sparsity).T, call.dtypes[0])
        kernels["bcsr", sparsity] = bcsr(values)
    runs = {
        f"{form} {at}": waiting(jax.jit(product), kernel, bias, x)
        for (form, at), kernel in kernels.items()
    }
    taken = interleaved(runs, found.plan.repeats)
    return {key: statistics.median(taken[f"{key[0]} {key[1]}"]) for key in kernels}


def _kept(kernel: jax.Array, sparsity: float) -> int:
    return kernel.size - math.floor(sparsity * kernel.size)


def _stored(layers: NnxLayers | LinenLayers, kept: Mapping[str, int]) -> int:
    """Return the bytes of a compressed file, by the entries of kernels that are not zero."""
    kernels = layers.kernels()
    saved = (
        kernels[name].nbytes - stored_bytes(kernels[name].size, count, kernels[name].dtype.itemsize)
        for name, count in kept.items()
    )
    return _nbytes(layers) - sum(saved)
