"""Time networks from which `shrink` removed channels against the original networks.

The networks are those of the studies of AdaSAP. Half to nine tenths of the channels of each layer
are zero, those with the smallest norms among random weights, so the smaller networks have the
shapes of the studies. ResNet-20 also loses the channels of its residual stream that are zero in all
layers that write to it. One thread computes in PyTorch, and in JAX with the setting below.

XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m benchmarks.smaller_networks --docs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

import safe_core
from safe_core import Channel
from safe_core.adapters.jax import flax as in_flax
from safe_core.adapters.torch import shrink, silence_channels
from safe_core.layout import Layout
from safe_core.study.models import Architecture, LeNet, ResNet, initial_variables
from safe_core.study.models.flax import Network
from safe_core.study.models.torch import build

from .report import write_below_machine
from .timing import interleaved

__all__ = ["NETWORKS", "Row", "markdown", "measure"]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "smaller_networks_table.md"
REMOVED = (0.5, 0.8, 0.9)
NETWORKS: dict[str, Architecture] = {
    "LeNet-300-100, digits": LeNet(image=(8, 8, 1)),
    "LeNet-300-100, MNIST": LeNet(image=(28, 28, 1)),
    "ResNet-20": ResNet(20),
}


class Row(NamedTuple):
    """The times of a network with and without its zero channels.

    Attributes
    ----------
    network : str
        Its name in `NETWORKS`.
    framework : {"PyTorch", "JAX"}
    batch : int
        Images in a call.
    removed : float
        Share of the channels of each layer that is zero.
    parameters : int
        Number of parameters of the smaller network.
    dense : float
        Median time of a call of the dense network, in ms.
    speedup : float
        One over the median ratio of the smaller network's time to the dense one's, timed in turn.
    """

    network: str
    framework: str
    batch: int
    removed: float
    parameters: int
    dense: float
    speedup: float


def _pruned(architecture: Architecture, removed: float) -> dict[str, Any]:
    """Return variables in Flax's layout, with zero channels in all layers but that of classes."""
    pattern = Channel(removed, scope="tensor")

    def project(x: Any) -> Any:
        if x.ndim == 1 or x.shape[-1] == architecture.classes:
            return x
        layout = Layout(input_axes=(x.ndim - 2,), output_axes=(x.ndim - 1,))
        return safe_core.project([x], pattern, layout=[layout]).values[0]

    variables = initial_variables(architecture, seed=0)
    return {**variables, "params": jax.tree.map(project, variables["params"])}


def measure(name: str, batch: int, removed: float, *, repeats: int, calls: int) -> Iterator[Row]:
    """Yield the times in PyTorch and, for networks without batch norms, in JAX."""
    architecture = NETWORKS[name]
    variables = _pruned(architecture, removed)
    images = np.random.default_rng(0).random((batch, *architecture.image)).astype("float32")
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    dense, smaller = (build(architecture, variables).eval() for _ in range(2))
    silence_channels(smaller, inputs)
    left = shrink(smaller, inputs).parameters[1]

    def call(model: torch.nn.Module) -> Any:
        with torch.inference_mode():
            return model(inputs)

    def timed(framework: str, runs: dict[str, Any]) -> Row:
        slow, fast = interleaved(name, runs, repeats=repeats, calls=calls)
        return Row(name, framework, batch, removed, left, slow.value, 1 / fast.ratio)

    yield timed("PyTorch", {"dense": lambda: call(dense), "smaller": lambda: call(smaller)})
    if "batch_stats" in variables:  # the study's batch norm is not Flax's, so `shrink` keeps it
        return
    network = Network(architecture)
    silent = in_flax.silence_channels(network, images, variables=variables).variables
    found = in_flax.shrink(network, images, variables=silent)
    programs = [
        (jax.jit(model.apply), jax.device_put(held))
        for model, held in ((network, variables), (found.model, found.variables))
    ]
    x = jax.device_put(images)
    (wide, all_of_it), (narrow, part) = programs
    runs = {"dense": lambda: wide(all_of_it, x), "smaller": lambda: narrow(part, x)}
    yield timed("JAX", runs)


def markdown(rows: list[Row]) -> str:
    """Return a table with a line for each network, framework and batch size."""
    shares = sorted({row.removed for row in rows})
    heads = " | ".join(f"{share:.0%} removed" for share in shares)
    lines = [
        f"| network | framework | images in a call | dense, ms | {heads} |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(shares)}",
    ]
    cells: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.network, row.framework, row.batch), []).append(row)
    for (network, framework, batch), found in cells.items():
        of = {row.removed: row for row in found}
        texts = [f"{of[share].speedup:.2f}" for share in shares]
        dense = min(row.dense for row in found)
        lines.append(f"| {network} | {framework} | {batch} | {dense:.3g} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time all networks, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smaller_networks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=30, help="turns of each pair of networks")
    parser.add_argument("--docs", action="store_true", help="update the table in docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for name in NETWORKS
        for batch in (1, 64)
        for removed in REMOVED
        for row in measure(
            name, batch, removed, repeats=options.repeats, calls=20 if batch == 1 else 1
        )
    ]
    print(markdown(rows))
    if options.docs:
        write_below_machine(TABLE, markdown(rows))


if __name__ == "__main__":
    main()
