"""Measure in which forms zeros of a Flax model pay on this machine."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safe_core._synthetic import synthetic_weight
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.export_forms import Sparsity
from safe_core.adapters.export_measurements import (
    LITERT,
    Collected,
    check_call,
    check_fit,
    check_plan,
    measure_litert,
    measure_own,
    resized,
    single_sample,
)
from safe_core.adapters.export_sums import SummedTimes, summed, zeroed_bytes
from safe_core.adapters.layer_timing import LayerTiming, interleaved, processor
from safe_core.compressed.forms import chosen_form

from ..compressed import raw_array
from ..litert import litert_graph
from ..weights import known_layouts
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


def advise(
    model: Any,
    example_inputs: Any,
    *,
    variables: PyTree = None,
    batch_sizes: Collection[int] | None = None,
    sparsities: Collection[float] = (0.8, 0.9, 0.95),
    forms: Collection[str] | None = None,
    repeats: int = 9,
    progress: Callable[[int, int], object] | None = None,
) -> ExportAdvice:
    """Measure in which forms zeros would pay on this machine, before or after training.

    Random weights with zeros at random positions replace those of the linear layers. Only shapes
    matter, so the model need not be trained. It measures

    - files of the whole model for LiteRT: dense in float32 and int8, and with zeros in blocks of
      1x4 (float32) and 1x16 (int8), with one thread;
    - its linear layers in BCSR, compiled, where the arrays are.

    If at least a hundredth of the weights are zero, the same is measured with these zeros. A form
    pays if it takes at most nine tenths of the time of the dense model.

    JAX uses all its threads and wall-clock time, so other programs disturb its figures. LiteRT is
    measured only where JAX computes on the CPU.

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
        cut to that size. By default 1 if the inputs hold one sample, and otherwise the inputs are
        used as they are.
    sparsities : list of float
        Fractions of zeros in the kernels of linear layers.
    forms : list of str, optional
        Forms to measure beside the dense ones: ``"1x4"``, ``"1x16"`` and ``"bcsr"``; by default
        all.
    repeats : int
        Timed samples of each form. LiteRT files are called at least this often, and for about a
        second in all.
    progress : callable, optional
        Called with the number of finished parts and the total.

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
        If an argument is out of range, or the model fails on ``example_inputs``.

    Examples
    --------
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jax.nn.relu)
    >>> found = advise(model, jnp.ones((4, 64)), sparsities=[0.9], forms=["bcsr"], repeats=2)
    >>> sorted(found.form("bcsr").seconds[None]), found.form("1x4").reason
    ([0.9], 'forms= leaves it out')
    """
    layers = layers_of(model, variables)
    if batch_sizes is None:
        given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        batch_sizes = single_sample(given)
    plan = check_plan(
        "JAX",
        _KNOWN,
        forms=forms,
        batch_sizes=batch_sizes,
        sparsities=sparsities,
        repeats=repeats,
        zeros=_zeros(layers),
        dtype=" and ".join(sorted({str(x.dtype) for x in layers.kernels().values()})),
    )
    inputs = {n: _resized(example_inputs, n) for n in plan.batch_sizes}
    found = Collected(plan, parts=3 * len(inputs), progress=progress)
    runs = {batch: layers.call(None, given) for batch, given in inputs.items()}
    for batch, run in runs.items():
        check_call(run, plan.place(batch))
    named = list(layers.params().items())
    layouts = dict(
        zip(layers.params(), known_layouts(named, [None] * len(named), model), strict=True)
    )
    check_fit(found, [(name, x.shape, layouts[name]) for name, x in layers.kernels().items()])
    found.note(
        "JAX uses all its threads and wall-clock time, so other programs disturb its figures"
    )
    if plan.own is not None:
        found.compressed = sum(chosen_form(raw_array(x)).nbytes for x in _arrays(layers))
    backend = jax.default_backend()
    if backend != "cpu":
        found.not_measured(LITERT, f"LiteRT runs on the CPU here, and JAX computes on {backend}")
    bound = model if variables is None else model.bind(variables)
    for batch, given in inputs.items():
        taken = interleaved({"dense": runs[batch]}, plan.repeats)["dense"]
        found.add("dense", batch, 0.0, statistics.median(taken), _nbytes(layers))
        found.finish()
        if "bcsr" in plan.forms:
            _measure_layers(found, batch, layers, given)
        found.finish()
        if backend == "cpu":
            measure_litert(found, batch, lambda given=given: litert_graph(bound, given))  # type: ignore[misc]
        found.finish()
    machine = f"{processor()}, {backend}"
    return found.advice(f"{machine}; LiteRT with one thread" if backend == "cpu" else machine)


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
    return tuple(jnp.asarray(resized(x, batch)) for x in given)


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
    totals = SummedTimes(whole)
    for call, count in calls.items():
        totals.add(count, _times(found, call))
    for (form, at), seconds in totals.seconds():
        weights = [(layer.kernel.size, layer.kernel.dtype.itemsize) for layer in known.values()]
        found.add(form, batch, at, seconds, zeroed_bytes(_nbytes(layers), weights, float(at)))
        found.note(summed("BCSR is an estimate"))
    if found.plan.own is None:
        return
    timings = []
    for name, kernel in layers.kernels().items():
        zeros = 1 - int(jnp.count_nonzero(kernel)) / max(1, kernel.size)
        if zeros:
            timing = LayerTiming(name, kernel.shape, zeros)
            timings.append(timed(timing, every.get(name), found.plan.repeats))
    measure_own(found, batch, ["bcsr"], timings)


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
