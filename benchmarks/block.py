"""Time the reconstruction of a transformer block: the optimizer alone, and a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import safe_core
from safe_core.adapters.torch import SparseOptimizer

from .devices import torch_device
from .peers import MinimalSAM, TwoArrayADMM
from .steps import give
from .timing import Result, interleaved

__all__ = ["block_step"]

INTERVAL = 32
RATE, BETAS, RHO, PENALTY = 2e-4, (0.9, 0.95), 2e-4, 1e-3


class _Loop:
    """A plain SAFE loop: one tensor at a time, z and u as dense lists, and a full sort."""

    def __init__(self, params: list[Tensor]) -> None:
        self.sam = MinimalSAM(params, torch.optim.Adam, rho=RHO, lr=RATE, betas=BETAS)
        options = {"sparsity": 0.5, "penalty": PENALTY, "interval": INTERVAL}
        self.admm = TwoArrayADMM(params, self, **options)

    def step(self) -> None:
        """Take the step that ADMM wraps."""
        self.sam.second_step()

    def run(self, closure: Callable[[], object]) -> None:
        closure()
        self.sam.first_step()
        closure()
        self.admm.step()


def block_step(*, hidden: int, tokens: int, repeats: int) -> list[Result]:
    """Time steps of SAFE with Adam on a Llama block, in runs of 32 that include a dual update."""
    torch.manual_seed(0)
    method = safe_core.safe(
        safe_core.Unstructured(0.5, scope="tensor"),
        rho=RHO,
        penalty=PENALTY,
        dual_update_interval=INTERVAL,
    )

    def runner(ours: bool, forward: bool) -> Callable[[], None]:
        block, closure = _block(hidden, tokens if forward else 1)
        params = list(block.parameters())
        if ours:
            base = torch.optim.Adam(params, lr=RATE, betas=BETAS)
            step: Any = SparseOptimizer(base, method, where=lambda name, p: p.ndim > 1).step
        else:
            step = _Loop(params).run
        if forward:
            return lambda: step(closure)
        gradients = [torch.randn_like(p) / 100 for p in params]
        return lambda: step(lambda: give(params, gradients))

    results = []
    for case, forward, budget in (
        (f"the optimizer's own time per step, a Llama block of width {hidden}", False, 0.5),
        (f"a whole step of its reconstruction, {tokens} tokens", True, 1.0),
    ):
        candidates = {"a plain loop": runner(False, forward), "safe_core": runner(True, forward)}
        budgets = {"safe_core": budget}
        results += interleaved(case, candidates, repeats=repeats, calls=INTERVAL, budgets=budgets)
    return results


def _block(hidden: int, tokens: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a block and a closure that computes its reconstruction error."""
    device = torch_device()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, layer_idx=0).to(device)
    x = torch.randn(1, tokens, hidden, device=device)
    places = torch.arange(tokens, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(x, places)
    target = torch.randn_like(x)

    def closure() -> Tensor:
        for p in block.parameters():
            p.grad = None
        out = block(x, position_embeddings=rotary)
        loss = nn.functional.mse_loss(out[0] if isinstance(out, tuple) else out, target)
        loss.backward()
        return loss

    return block, closure
