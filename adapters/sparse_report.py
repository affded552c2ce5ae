"""Decide whether a model is faster with sparse layers, and show the result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safe_core._readable import aligned, readable_ms

from .layer_timing import HALF, MARGIN, LayerTiming

__all__ = ["SparseModules", "decided"]

_HINT = "was optimizer.finalize() called?"


class SparseModules(NamedTuple):
    """Hold the result of `sparse_modules`. Printed, it is a table.

    Attributes
    ----------
    model : torch.nn.Module, flax.nnx.Module or SparseLinen
        The model with the layers that are faster in a sparse form, for inference. If none is, or
        the whole is not a tenth faster with them, the model that was given.
    layers : list of LayerTiming
        All layers with zeros.
    seconds : dict of str to float
        Medians for a pass of the whole model, ``"dense"`` and ``"sparse"``.
    machine : str
        The processor, and the threads of the framework.
    """

    model: Any
    layers: list[LayerTiming]
    seconds: dict[str, float]
    machine: str

    @property
    def replaced(self) -> dict[str, str]:
        """Return the form of every layer that was replaced."""
        return {layer.name: layer.form for layer in self.layers if layer.form != "dense"}

    def __str__(self) -> str:
        """Return a table of the layers, and the times of the whole model."""
        if not self.layers:
            return f"the model has no zeros; {_HINT}"
        head = ("layer", "weight", "zeros", "rows", "dense", "fastest", "time", "result")
        lines = aligned([head, *map(_cells, self.layers)])
        if self.seconds:
            dense, sparse = self.seconds["dense"], self.seconds["sparse"]
            times = f"whole model: {readable_ms(dense)} dense, {readable_ms(sparse)} sparse"
            if self.replaced:
                lines.append(f"{times}, {dense / sparse:.2f} times faster")
            else:
                lines.append(f"{times}, {dense / sparse:.2f} times as fast, so it stays as it is")
        else:
            lines.append("whole model: unchanged, because no layer gets faster")
        if all(layer.sparsity < HALF for layer in self.layers):
            lines.append(f"no layer has enough zeros to skip; {_HINT}")
        if any(layer.seconds for layer in self.layers):
            lines.append(f"medians on {self.machine}")
        return "\n".join(lines)


def _cells(layer: LayerTiming) -> tuple[str, ...]:
    shape = " x ".join(map(str, layer.shape))
    known = [layer.name, shape, f"{layer.sparsity:.1%}", str(layer.rows or "")]
    sparse = {form: taken for form, taken in layer.seconds.items() if form != "dense"}
    dense = readable_ms(layer.seconds["dense"]) if layer.seconds else ""
    fastest = min(sparse, key=lambda form: sparse[form], default="")
    ms = readable_ms(sparse[fastest]) if sparse else ""
    result = f"dense: {layer.reason}" if layer.form == "dense" else layer.form
    return (*known, dense, fastest, ms, result)


def decided(
    given: Any,
    sparse: Any,
    layers: Sequence[LayerTiming],
    times: Mapping[str, Sequence[float]],
    machine: str,
) -> SparseModules:
    """Return the model with sparse layers if it is at least a tenth faster, or the one given.

    Medians decide, because they are what the result shows.

    Parameters
    ----------
    given, sparse : module
        The model as it was given, and with sparse layers.
    layers : sequence of LayerTiming
        With the forms in ``sparse``.
    times : mapping of str to sequence of float
        Seconds of passes, ``"dense"`` and ``"sparse"``.
    machine : str

    Examples
    --------
    >>> layer = LayerTiming("fc", (4, 4), 0.9, 1, {"dense": 2.0, "CSR": 1.0}, "CSR")
    >>> decided("a", "b", [layer], {"dense": [3.0], "sparse": [2.0]}, "").model
    'b'
    >>> decided("a", "b", [layer], {"dense": [3.0], "sparse": [2.8]}, "").replaced
    {}
    """
    seconds = {form: statistics.median(times[form]) for form in ("dense", "sparse")}
    if seconds["sparse"] <= MARGIN * seconds["dense"]:
        return SparseModules(sparse, list(layers), seconds, machine)
    reason = "the whole model is not a tenth faster"
    kept = [
        layer._replace(form="dense", reason=reason) if layer.form != "dense" else layer
        for layer in layers
    ]
    return SparseModules(given, kept, seconds, machine)
