"""Prune a random Llama block by every method: time, and peak memory against its prediction."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from safe_core.adapters.torch.blocks import PruningReport, SafeReconstruction, prune_blocks
from safe_core.adapters.torch.blocks.solver import as_block_solver
from safe_core.solvers import named_solvers

from .devices import torch_device
from .timing import Result

__all__ = ["LLAMA_2_7B", "SMALL", "TINY", "Sizes", "model", "pruning", "training_bytes"]

VOCABULARY = 256  # not that of LLaMA: the embedding stays outside the block
BATCH = 8
_FIRST = ("magnitude", "wanda", "sparsegpt", "alps")  # the first is the baseline of the times


@dataclass(frozen=True)
class Sizes:
    """The sizes of a block and of its calibration samples."""

    hidden: int
    feed_forward: int
    heads: int
    samples: int
    length: int
    epochs: int = 30

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, feed-forward {self.feed_forward}, {self.heads} heads, "
            f"{self.samples} samples of {self.length} tokens"
        )


LLAMA_2_7B = Sizes(4096, 11008, 32, 128, 2048)
SMALL = Sizes(256, 688, 2, 32, 128, epochs=3)
TINY = Sizes(64, 172, 2, 8, 16, epochs=1)


def model(sizes: Sizes) -> nn.Module:
    """Return a random model of one block in bfloat16, on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).bfloat16()


def methods(sizes: Sizes, *, compiled: bool) -> Iterator[tuple[str, Any]]:
    """Yield every named method, and the compiled ones that train if ``compiled``."""
    steps = sizes.epochs * -(-sizes.samples // BATCH)
    for name in dict.fromkeys((*_FIRST, *named_solvers())):
        solver = as_block_solver(name)
        if not isinstance(solver, SafeReconstruction):
            yield name, name  # a name gives a layer-wise solver its published scope
            continue
        solver = replace(
            solver,
            epochs=sizes.epochs,
            batch_size=BATCH,
            dual_update_interval=min(32, steps),  # so that there is one
        )
        yield name, solver
        if compiled:
            yield f"{name}, compiled", replace(solver, compile=True)


def pruned(network: nn.Module, sizes: Sizes, solver: Any) -> PruningReport:
    """Prune a copy of a model to half of its weights, and return the report.

    On the CPU the tensors are counted while it runs, which takes time.
    """
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (sizes.samples, sizes.length))
    device = torch_device()
    return prune_blocks(
        copy.deepcopy(network), tokens, solver, 0.5, device=device, measure_memory=device == "cpu"
    )


def pruning(sizes: Sizes, *, compiled: bool) -> list[Result]:
    """Measure every method once: seconds for the block, and peak memory.

    The ratio of the memory is the larger of the measured and the predicted peak over the smaller,
    so that a prediction may be neither too low nor too high.
    """
    device, network = torch_device(), model(sizes)
    pruned(model(TINY), TINY, "wanda")  # starts the libraries of the device
    found = {
        name: pruned(network, sizes, solver) for name, solver in methods(sizes, compiled=compiled)
    }
    first = next(iter(found.values())).seconds
    case = f"block-wise pruning of a Llama block in bfloat16 to 50%: {sizes}"
    times = [
        Result(case + ("" if device == "cuda" else "; with tensors counted"), *row)
        for row in ((name, r.seconds, "s", r.seconds / first) for name, r in found.items())
    ]
    memory = [
        Result(
            f"peak memory of {case}",
            f"{name}; predicted {r.predicted.device / 1e6:.4g} MB",
            r.peak / 1e6,
            "MB",
            max(r.peak / r.predicted.device, r.predicted.device / r.peak),
            1.2,
        )
        for name, r in found.items()
        if r.peak is not None
    ]
    return times + memory


def training_bytes(sizes: Sizes) -> dict[str, int]:
    """Return the estimate of `docs/transformers.md`, by row: ``safe+`` under autocast on a GPU."""
    entries = 4 * sizes.hidden**2 + 3 * sizes.hidden * sizes.feed_forward + 2 * sizes.hidden
    tokens = BATCH * sizes.length
    return {
        "parameters, gradient, two moments of Adam": 16 * entries,
        "a copy of the parameters at the start, and its supports": 5 * entries,
        "anchor and mask": 5 * entries,
        "bfloat16 copies of the parameters": 2 * entries,
        "activations": 56 * sizes.hidden * tokens,
        "inputs and targets of two steps": 4 * 2 * sizes.hidden * tokens,
    }
