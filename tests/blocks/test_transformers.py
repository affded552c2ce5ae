"""Pruning of transformers block by block: families, SAFE, memory, faults."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import json
import os
import signal
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import output_of
from short_runs import short_run
from torch import Tensor, nn

import safe_core
from safe_core import Block, Layout, Unstructured
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.blocks import run as block_run
from safe_core.adapters.torch.blocks.activations import Activations
from safe_core.adapters.torch.blocks.fingerprints import identity
from safe_core.adapters.torch.blocks.memory import forward_backward_bytes
from safe_core.adapters.torch.blocks.solver import (
    BlockProblem,
    BlockSolver,
    LayerByLayer,
    as_block_solver,
)
from safe_core.adapters.transformers import (
    Progress,
    PruningSettings,
    SafeReconstruction,
    calibration_batches,
    plan_pruning,
    prune_blocks,
)
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import ALPS, LayerSolver, SparseGPT, Wanda

VOCABULARY, WIDTH, LENGTH = 61, 16, 16
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}


# The name of a class, and its arguments. Transformers imports each class where it is used.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TEXT | GROUPED),
    "mistral": ("MistralConfig", TEXT | GROUPED | {"sliding_window": 4}),
    "qwen3": ("Qwen3Config", TEXT | GROUPED),
    "gemma2": ("Gemma2Config", TEXT | GROUPED | {"sliding_window": 4}),
    "gemma3": (
        "Gemma3TextConfig",
        TEXT | GROUPED
        | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    ),
    "phi": ("PhiConfig", TEXT),
    "opt": ("OPTConfig", TEXT | {"ffn_dim": 32, "word_embed_proj_dim": WIDTH}),
    "gpt2": ("GPT2Config", TEXT | {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": 32}),
    "gpt_neox": ("GPTNeoXConfig", TEXT),
    "bert": ("BertConfig", TEXT),
    "mixtral": (
        "MixtralConfig", TEXT | GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 2,
        },
    ),
}  # fmt: skip


DATA = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
AUTO = {"bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    name, arguments = CONFIGS[family]
    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    model = auto.from_config(getattr(transformers, name)(**arguments))
    for p in model.parameters():  # so that no weight is symmetric or zero, biases included
        p.data = torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.05) + (p.ndim == 1)
    return model.to(dtype).eval()


def inputs_of(family: str, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return torch.randn(samples, 3, 8, 8, generator=generator)
    return torch.randint(3, VOCABULARY, (samples, LENGTH), generator=generator)


def wanda(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Layout | None = None) -> Any:
    return safe_core.project(weight, sparsity, importance=gram.diagonal(), layout=layout)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_pruned_exactly(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    report = prune_blocks(model, inputs_of(family), wanda, 0.5, batch_size=4)
    routers = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
    assert list(report.dense) == (routers if family == "mixtral" else [])
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert len(block.weights) >= 4
        for name, weight in block.weights.items():
            p = model.get_parameter(f"{block.name}.{name}")
            assert weight.kept * 2 == weight.entries == p.numel()
            assert int((p == 0).sum()) == p.numel() // 2
            assert bool((p == dense[f"{block.name}.{name}"])[p != 0].all())
    pruned = {f"{block.name}.{name}" for block in report.blocks for name in block.weights}
    for name, p in model.state_dict().items():
        assert name in pruned or torch.equal(p, dense[name])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, p in model.state_dict().items():
        assert torch.equal(p, loaded.state_dict()[name])


class Watched:
    """A layer-wise solver that prunes by magnitude and keeps what it is given."""

    def __init__(self) -> None:
        self.grams: list[Tensor] = []

    def __call__(self, weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Layout) -> Any:
        assert weight.dtype == gram.dtype == torch.float32
        self.grams.append(gram)
        return safe_core.project(weight, sparsity, layout=layout)


def grams_of(model: nn.Module, name: str, samples: list[dict[str, Tensor]]) -> list[Tensor]:
    """``X^T X`` of every linear layer of the blocks, by hooks on the whole model."""
    sums: dict[str, Tensor] = {}
    handles = []
    for key, module in model.get_submodule(name).named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(module: nn.Module, args: Any, key: str = key) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                sums[key] = sums.get(key, 0) + x.T @ x

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for handle in handles:
        handle.remove()
    modules = dict(model.get_submodule(name).named_modules())
    return [sums[key] for key in modules if key in sums]


def rows(family: str, inputs: Tensor) -> list[dict[str, Tensor]]:
    key = "pixel_values" if family == "vit" else "input_ids"
    return [{key: inputs[i : i + 1]} for i in range(len(inputs))]


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "mixtral"])
def test_blocks_see_what_they_see_in_the_model(family: str) -> None:
    model, inputs, solver = model_of(family), inputs_of(family), Watched()
    plan = plan_pruning(model, inputs, solver, 0.0, batch_size=4)
    wanted = grams_of(model, plan.name, rows(family, inputs))
    plan.apply()
    assert len(solver.grams) == len(wanted) >= 8
    for got, want in zip(solver.grams, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # by sdpa and by eager attention
def test_masks_and_lengths_go_with_their_samples(family: str) -> None:
    long, short = inputs_of(family), inputs_of(family)[:, :10]
    samples = [{"input_ids": row[None]} for row in (*long, *short)]
    for i, sample in enumerate(samples):
        mask = torch.ones_like(sample["input_ids"])
        mask[0, : 3 * (i % 3)] = 0  # padding of their own
        sample["attention_mask"] = mask
    model, solver = model_of(family), Watched()
    plan = plan_pruning(model, samples, solver, 0.0, batch_size=3)
    wanted = grams_of(model, plan.name, samples)
    plan.apply()
    for got, want in zip(solver.grams, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


class Carrying(nn.Module):
    """A block that takes tensors with and without a batch, and what the last one has found."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, shared: Tensor, *, own: Tensor, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y = self.linear(x * shared) + own.sum(0)
        y = y if carried is None else y + carried
        return y, y.mean(-1, keepdim=True)


class Carriers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Carrying() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        own, carried = torch.stack([x, -2 * x]), None  # the batch runs along the second axis
        for block in self.blocks:
            x, carried = block(x, torch.arange(1.0, 9.0), own=own, carried=carried)
        return x


def test_every_argument_is_replayed_for_its_samples() -> None:
    model, solver = Carriers(), Watched()
    plan = plan_pruning(model, DATA, solver, 0.0, batch_size=5)
    wanted = grams_of(model, "blocks", [{"x": DATA}])
    report = plan.apply()
    for got, want in zip(solver.grams, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert max(block.loss for block in report.blocks) == 0.0


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_block_sees_what_the_blocks_before_it_return(propagate: str) -> None:
    dense, inputs, solver = model_of("llama"), inputs_of("llama"), Watched()
    model = model_of("llama")
    prune_blocks(model, inputs, solver, 0.5, propagate=propagate)
    before = model if propagate == "pruned" else dense
    wanted = grams_of(before, "model.layers", rows("llama", inputs))[7]  # first of block 1
    torch.testing.assert_close(solver.grams[7], wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("target_inputs", ["pruned", "dense"])
def test_the_error_is_against_the_targets(target_inputs: str) -> None:
    dense, inputs = model_of("llama"), inputs_of("llama")
    model = model_of("llama")
    report = prune_blocks(model, inputs, wanda, 0.5, target_inputs=target_inputs)
    with torch.no_grad():
        hidden = dense(inputs, output_hidden_states=True).hidden_states[1]
        if target_inputs == "pruned":
            dense.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
        found = {}
        for name, which in (("dense", dense), ("pruned", model)):
            handle = which.model.layers[1].register_forward_hook(
                lambda m, a, out, name=name: found.update({name: out})
            )
            which(inputs)
            handle.remove()
    error = (found["pruned"] - found["dense"]).square().mean()
    assert report.blocks[1].loss == pytest.approx(float(error), rel=1e-4)
    relative = float(error / found["dense"].square().mean())
    assert report.blocks[1].relative_error == pytest.approx(relative, rel=1e-4)
    assert hidden.shape == found["dense"].shape


@short_run
def test_frozen_parameters_stay_as_they_are() -> None:
    model = Chain()
    for block in model.blocks:
        block.requires_grad_(False)
    model.blocks[1].bias.requires_grad_(True)
    prune_blocks(model, DATA, SHORT, 0.5)
    for i, (block, dense) in enumerate(zip(model.blocks, Chain().blocks, strict=True)):
        assert torch.equal(block.bias, dense.bias) == (i != 1)
        assert not torch.equal(block.weight[block.weight != 0], dense.weight[block.weight != 0])


@short_run
def test_a_model_may_be_its_list_of_blocks() -> None:
    chain = Chain()
    model = nn.Sequential(*Chain().blocks)
    prune_blocks(chain, DATA, SHORT, 0.5)
    for blocks in ("", model):
        plan = plan_pruning(model, DATA, SHORT, 0.5, blocks=blocks)
        assert list(plan.weights) == [f"{i}.weight" for i in range(4)]
    report = plan.apply()
    assert [block.name for block in report.blocks] == ["0", "1", "2", "3"]
    assert_equal(chain, model)


@short_run
def test_tokens_are_unknown_where_nothing_looks_at_them() -> None:
    solver = SafeReconstruction(epochs=1, batch_size=4, start="dense")
    report = prune_blocks(Chain(), DATA, solver, 0.5)
    assert [b.weights["weight"].tokens for b in report.blocks] == [None] * 4


# Weights and how they are used


class Custom(nn.Module):
    """A block that multiplies hidden states with its weight in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.idle = how, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        if self.how == "module":
            return self.layer(x)
        if self.how == "keyword":
            return nn.functional.linear(x, weight=w, bias=self.layer.bias)
        if self.how == "einsum":
            return torch.einsum("ti,oi->to", x, w)
        if self.how == "left":
            return (w @ x.T).T
        return (x[:, None, :] * w).sum(-1) if self.how == "sum" else x @ w.clone().T


class Blocks(nn.Module):
    """A chain of given blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("how", ["module", "keyword", "einsum", "left", "sum", "clone"])
def test_a_weight_is_pruned_by_the_inputs_that_it_takes_or_not_at_all(how: str) -> None:
    torch.manual_seed(0)
    model, solver = Blocks(Custom(how)), Watched()
    dense = model.blocks[0].layer.weight.clone()
    report = prune_blocks(model, DATA, solver, 0.5)
    tokens = {name: weight.tokens for name, weight in report.blocks[0].weights.items()}
    if how in ("sum", "clone"):
        assert report.dense == {"blocks.0.layer.weight": "no matrix product uses it"}
        assert tokens == {"idle.weight": 0}  # by magnitude, for it is not used
        assert torch.equal(model.blocks[0].layer.weight, dense)
    else:
        assert not report.dense
        assert tokens == {"layer.weight": 12, "idle.weight": 0}
        torch.testing.assert_close(solver.grams[0], DATA.T @ DATA)


def test_attention_of_torch_is_watched_within() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 5, 8)
    kinds = {"dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(8, 2, 16, **kinds).eval()
    model, solver = Blocks(layer), Watched()
    wanted: list[Tensor] = []
    attention = layer.self_attn
    query, key, value = nn.functional.linear(
        inputs, attention.in_proj_weight, attention.in_proj_bias
    ).detach().reshape(6, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)  # fmt: skip
    mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    for x in (inputs, mixed.transpose(1, 2)):
        wanted.append(x.reshape(30, 8).T @ x.reshape(30, 8))
    report = prune_blocks(model, inputs, solver, 0.5)
    assert not report.dense
    assert [w.tokens for w in report.blocks[0].weights.values()] == [30] * 4
    for got, want in zip(solver.grams, wanted, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


class Columns(nn.Module):
    """Of its eight columns, half are never active."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * (torch.arange(8) < 4))


@pytest.mark.parametrize("solver", [SparseGPT(), ALPS(), Wanda()], ids=lambda s: type(s).__name__)
def test_columns_that_are_never_active_are_pruned_first(solver: Any) -> None:
    torch.manual_seed(0)
    model = Blocks(Columns())
    with torch.no_grad():
        model.blocks[0].layer.weight[:, 4:] *= 100
    report = prune_blocks(model, DATA, solver, 0.5)
    assert report.blocks[0].relative_error < 1e-10
    assert bool((model.blocks[0].layer.weight[:, 4:] == 0).all())


# Experts


def moe_with_an_idle_expert() -> Any:
    """The router reads one feature, which is positive, and the last expert is its last choice."""
    model = model_of("mixtral")
    layer = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, -9.0])
    return model


def test_stacked_experts_see_the_tokens_that_are_sent_to_them() -> None:
    model, inputs, solver = model_of("mixtral"), inputs_of("mixtral"), Watched()
    experts = model.model.layers[0].mlp.experts
    found: dict[tuple[str, int], Tensor] = {}

    def hook(module: nn.Module, args: Any) -> None:
        hidden, chosen, _ = args
        for e in range(4):
            x = hidden[(chosen == e).any(dim=1)]
            gate, up = (x @ module.gate_up_proj[e].T).chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
            found["up", e], found["down", e] = x.T @ x, inner.T @ inner

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(inputs)
    handle.remove()
    report = prune_blocks(model, inputs, solver, 0.5)
    first = list(report.blocks[0].weights)
    assert first[4:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wanted = [found[kind, e] for kind in ("up", "down") for e in range(4)]
    for got, want in zip(solver.grams[4:12], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert [int((w == 0).sum()) for w in weight] == [weight[0].numel() // 2] * 4


@short_run
@pytest.mark.parametrize("plus", [True, False], ids=["safe+", "layerwise"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(plus: bool) -> None:
    model = moe_with_an_idle_expert()
    idle = model.model.layers[0].mlp.experts.down_proj[3].detach().clone()
    solver = SafeReconstruction(importance="wanda", epochs=1) if plus else wanda
    report = prune_blocks(model, inputs_of("mixtral"), solver, 0.5)
    assert report.blocks[0].weights["mlp.experts.down_proj"].tokens == 0
    kept = model.model.layers[0].mlp.experts.down_proj[3] != 0
    assert torch.equal(kept, safe_core.project(idle, 0.5).support)


class Stacked(nn.Module):
    """Three experts in one parameter, of which each sees all tokens, and their mean."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.experts = how, nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "right":
            return torch.matmul(x, self.experts).mean(0)
        if self.how == "left":
            return (self.experts.mT @ x.T).mean(0).T
        return torch.bmm(x.expand(3, -1, -1), self.experts).mean(0)


@pytest.mark.parametrize("how", ["right", "left", "bmm"])
def test_stacked_experts_may_share_their_inputs(how: str) -> None:
    torch.manual_seed(0)
    model, solver = Blocks(Stacked(how)), Watched()
    report = prune_blocks(model, DATA, solver, 0.5)
    assert report.blocks[0].weights["experts"].tokens == 12
    assert len(solver.grams) == 3
    for gram in solver.grams:
        torch.testing.assert_close(gram, DATA.T @ DATA)


# SAFE

SHORT = SafeReconstruction(importance="wanda", epochs=4, warmup_epochs=1, batch_size=2)


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bert"])
@pytest.mark.parametrize("sparsity", ["2:4", Unstructured(0.6, scope="row")], ids=str)
def test_safe_prunes_exactly(family: str, sparsity: Any) -> None:
    model = model_of(family)
    report = prune_blocks(model, inputs_of(family), SHORT, sparsity)
    for block in report.blocks:
        for name, weight in block.weights.items():
            p = model.get_parameter(f"{block.name}.{name}")
            layout = Layout((0,), (1,)) if family == "gpt2" else Layout((1,), (0,))
            layout = Layout((2,), (1,), (0,)) if p.ndim == 3 else layout
            again = safe_core.project(p.detach(), sparsity, layout=layout)
            assert torch.equal(again.values, p)  # sparse already
            assert int((p != 0).sum()) == weight.kept == int(again.support.sum())


def plain_loop(model: Any, hidden: Tensor) -> tuple[Any, Tensor]:
    """SAFE+ on the first block of a Llama, written out; importance and rate by the formulas."""
    block, base_model = model.model.layers[0], model.model
    position = base_model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    call = lambda: block(hidden, position_embeddings=position)  # noqa: E731
    linear = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    importance = {}
    for name, module in linear.items():

        def watch(module: nn.Module, args: Any, key: str = f"{name}.weight") -> None:
            importance.setdefault(key, args[0].detach().square().mean(dim=(0, 1)))

        module.register_forward_pre_hook(watch)
    target = call().detach()
    optimizer = SparseOptimizer(
        torch.optim.Adam(block.parameters(), lr=1.0, betas=(0.9, 0.95)),
        safe_core.safe(Unstructured(0.5, scope="tensor"), rho=2e-4),
        model=block,
        importance=importance,
    )
    rates = [1e-4, 2e-4, 2e-4, 4e-4 / 3, 2e-4 / 3]  # two of warm-up, and down
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(call(), target)
            loss.backward()
            return loss

        loss = optimizer.step(closure).detach()
    optimizer.finalize()
    return block, loss


@short_run
def test_safe_is_a_plain_loop() -> None:
    model, wanted, inputs = model_of("llama"), model_of("llama"), inputs_of("llama")
    solver = SafeReconstruction(
        importance="wanda", published=True, epochs=5, batch_size=len(inputs)
    )
    losses: list[Progress] = []
    prune_blocks(model, inputs, solver, 0.5, progress=losses.append)
    hidden = wanted.model.embed_tokens(inputs).detach()
    block, loss = plain_loop(wanted, hidden)
    assert losses[4].loss == pytest.approx(float(loss), rel=1e-4)
    for got, want in zip(model.model.layers[0].parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got == 0, want == 0)


@short_run
def test_blocks_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    pruned = []
    for compile in (False, True):
        model = model_of("llama")
        solver = SafeReconstruction(epochs=2, warmup_epochs=1, compile=compile)
        prune_blocks(model, inputs_of("llama"), solver, 0.5)
        pruned.append(list(model.parameters()))
    assert len(compiled) == 1
    for plain, ours in zip(*pruned, strict=True):
        torch.testing.assert_close(ours, plain)
    with pytest.raises(ValueError, match=r"compile must be one of .*, got 'c'"):
        SafeReconstruction(compile="c")


def test_safe_lowers_the_error_of_the_projection() -> None:
    errors = {}
    method = safe_core.safe(0.5, rho=2e-4, penalty=0.1, dual_update_interval=4)
    solver = SafeReconstruction(
        method, importance="wanda", epochs=8, batch_size=2, learning_rate=2e-2
    )
    for name, how in (("one-shot", wanda), ("safe+", solver)):
        report = prune_blocks(model_of("llama"), inputs_of("llama"), how, 0.5)
        errors[name] = report.blocks[0].relative_error
    assert errors["safe+"] < 0.5 * errors["one-shot"]


# ALPS meets near-ties in these small layers, which 16 bits turn the other way.
@pytest.mark.every_second
@short_run
@pytest.mark.parametrize(("published", "rel"), [(True, 0.05), (False, 0.15)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bits_keep_their_dtype_and_exact_zeros(
    dtype: torch.dtype, published: bool, rel: float
) -> None:
    model, solver = model_of("llama", dtype), dataclasses.replace(SHORT, published=published)
    report = prune_blocks(model, inputs_of("llama"), solver, 0.5)
    in_32_bits = prune_blocks(model_of("llama"), inputs_of("llama"), solver, 0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for block in report.blocks:
        for name, weight in block.weights.items():
            p = model.get_parameter(f"{block.name}.{name}")
            assert weight.kept * 2 == p.numel()
            assert int((p == 0).sum()) == p.numel() // 2
    error = in_32_bits.blocks[0].relative_error
    assert report.blocks[0].relative_error == pytest.approx(error, rel=rel)


@short_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_positions_have_the_dtype_that_a_block_is_computed_in(dtype: torch.dtype) -> None:
    model, seen = model_of("llama", dtype), set()

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (args[0], *kwargs["position_embeddings"], module.mlp.up_proj.weight)
        seen.add((torch.is_grad_enabled(), *(t.dtype for t in tensors)))

    model.model.layers[1].register_forward_pre_hook(watch, with_kwargs=True)
    solver = SafeReconstruction(epochs=1, start="dense")
    prune_blocks(model, inputs_of("llama"), solver, 0.5)
    trained = {(grad, *[torch.float32] * 4) for grad in (False, True)}
    assert seen == {(False, *[dtype] * 4), *trained}


@short_run
def test_what_is_tied_or_left_out_stays_dense() -> None:
    model = model_of("llama")
    layer = model.model.layers[0]
    model.head = nn.Linear(WIDTH, 32, bias=False)
    model.head.weight = layer.mlp.up_proj.weight  # tied to what is outside the blocks
    before = layer.mlp.up_proj.weight.clone()
    report = prune_blocks(
        model, inputs_of("llama"), SHORT, 0.5, where=lambda name, p: "self_attn" not in name
    )
    assert list(report.blocks[0].weights) == ["mlp.gate_proj.weight", "mlp.down_proj.weight"]
    assert len(report.blocks[1].weights) == 3
    assert torch.equal(before, layer.mlp.up_proj.weight)


def test_encoder_and_decoder_are_pruned_one_after_the_other() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = inputs_of("t5")
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    for name in ("encoder.block", "decoder.block"):
        # The first block returns a position bias, which the others take.
        solver = Watched()
        plan = plan_pruning(model, batch, solver, 0.0, blocks=name)
        wanted = grams_of(model, name, [batch])
        plan.apply()
        for got, want in zip(solver.grams, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.max()))
        assert prune_blocks(model, batch, wanda, 0.5, blocks=name).sparsity == 0.5


@short_run
def test_the_sparse_loss_of_the_last_epoch_is_that_of_the_pruned_block() -> None:
    model, seen = model_of("opt"), []
    solver = dataclasses.replace(SHORT, batch_size=len(inputs_of("opt")), start="dense")
    report = prune_blocks(model, inputs_of("opt"), solver, 0.5, progress=seen.append)
    assert all(p.sparse_loss > p.loss for p in seen if p.epoch == 0)
    last = [p.sparse_loss for p in seen if p.epoch == 3]
    assert last == pytest.approx([block.loss for block in report.blocks], rel=1e-5)


@short_run
def test_progress_and_modes() -> None:
    model, seen = model_of("opt").train(), []
    model.config.use_cache = True
    report = prune_blocks(model, inputs_of("opt"), SHORT, 0.5, progress=seen.append)
    assert [(p.block, p.epoch) for p in seen] == [
        (block, epoch) for block in (0, 1) for epoch in (0, 1, 2, 3, None)
    ]
    final, kept = report.blocks[1].loss, report.blocks[1].training_kept
    error = report.blocks[1].relative_error
    assert seen[-1] == Progress(1, 2, None, 4, final, 0.0, final, error, kept)
    assert seen[0].seconds_left > 0
    assert [p.done for p in seen] == [block + k / 5 for block in (0, 1) for k in range(1, 6)]
    assert all(m.training for m in model.modules())
    assert model.config.use_cache
    assert "forward" not in vars(model.model.decoder.layers[0])


# Memory


def wide_llama() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | sizes))


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize(
    ("how", "target_inputs"),
    [
        ("safe+", "pruned"),
        pytest.param("safe+", "dense", marks=pytest.mark.long),
        pytest.param("wanda", "pruned", marks=pytest.mark.long),
        ("wanda", "dense"),
        ("sparsegpt", "pruned"),
        ("alps", "pruned"),
    ],
)
def test_memory_is_predicted(how: str, target_inputs: str) -> None:
    model, ids = wide_llama(), torch.randint(3, VOCABULARY, (16, 64))
    solvers = {
        "safe+": SafeReconstruction(importance="wanda", epochs=1),
        "wanda": wanda,
        "sparsegpt": SparseGPT(),
        "alps": ALPS(iterations=6),
    }
    rules = {"target_inputs": target_inputs, "measure_memory": True}
    report = prune_blocks(model, ids, solvers[how], 0.5, **rules)
    assert report.peak == pytest.approx(report.predicted.device, rel=0.2)
    assert report.predicted.device > 5 * 16 * 64 * 128 * 4  # it is not of activations alone


@short_run
def test_what_is_frozen_takes_no_gradients() -> None:
    def work(trained: set[str] | None) -> int:
        layer, x, device = nn.Linear(500, 8), torch.zeros(1, 500), torch.device("cpu")
        return forward_backward_bytes(
            layer, lambda m, make: m(make(x)).sum(), device, backward=True, trained=trained
        )

    assert work(None) - work({"bias"}) >= 4 * 8 * 500

    model, ids = wide_llama(), torch.randint(3, VOCABULARY, (2, 16))
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" not in name)
    solver = SafeReconstruction(epochs=1)
    plan = plan_pruning(model, ids, solver, 0.5, where=lambda name, p: "mlp" not in name)
    report = plan.apply(measure_memory=True)
    assert report.peak == pytest.approx(plan.memory.device, rel=0.2)
    model.requires_grad_(True)
    again = plan_pruning(model, ids, solver, 0.5, where=lambda name, p: "mlp" not in name)
    more = again.memory.device - plan.memory.device
    assert more >= 16 * 3 * 128 * 384  # a gradient, a copy and two moments of each


@short_run
def test_activations_on_disk_are_the_same_bits(tmp_path: Path) -> None:
    models = [model_of("llama"), model_of("llama")]
    inputs = inputs_of("llama")
    in_memory = prune_blocks(models[0], inputs, SHORT, 0.5)
    work = tmp_path / "work"
    plan = plan_pruning(models[1], inputs, SHORT, 0.5, offload="disk", work_dir=work)
    seen: list[str] = []
    plan.apply(lambda _: seen.extend(p.name for p in work.glob("*.bin")))
    assert set(seen) == {"inputs-0.bin", "targets-0.bin"}
    assert not list(work.glob("*.bin"))
    assert plan.memory.disk == 2 * 6 * LENGTH * WIDTH * 4
    assert plan.memory.device < in_memory.predicted.device
    assert_equal(*models)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# Faults


class Chain(nn.Module):
    """Four blocks, without transformers, for it takes seconds to import."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


KILLED = """
import os, signal, traceback
import torch
from torch import nn, Tensor
import safe_core
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks

{chain}
data = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
solver = SafeReconstruction(importance="wanda", epochs=4, warmup_epochs=1, batch_size=2)
torch.set_num_threads(1)
replaced, replace = 0, os.replace

def run(at, file):
    def progress(p):
        if (p.block, p.epoch) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(a, b):
        global replaced
        replaced += 1
        if replaced == file:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)

    os.replace = counted
    prune_blocks(Chain(), data, solver, 0.5, work_dir={work!r}, progress=progress)

# Within an epoch of block 1; then before the manifest names block 2, whose file is there.
for at, file in (((1, 2), None), (None, 4)):
    child = os.fork()  # a copy of this process, which has imported everything
    if child == 0:
        try:
            run(at, file)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@short_run
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, resumed, seen = Chain(), Chain(), []
    prune_blocks(whole, DATA, SHORT, 0.5)
    chain = textwrap.dedent(inspect.getsource(Chain))
    work = str(tmp_path / "work")
    killed = output_of("-P", "-c", KILLED.format(chain=chain, work=work))
    assert killed.split() == 2 * [str(-signal.SIGKILL)]
    assert (tmp_path / "work" / "block-00002.safetensors").exists()
    prune_blocks(resumed, DATA, SHORT, 0.5, work_dir=work, progress=seen.append)
    assert {p.block for p in seen} == {2, 3}
    assert_equal(whole, resumed)


@short_run
@pytest.mark.every_second
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("target_inputs", ["pruned", "dense"])
def test_an_interrupted_run_goes_on(target_inputs: str, propagate: str, tmp_path: Path) -> None:
    rules: Any = {"target_inputs": target_inputs, "propagate": propagate}
    whole, model = model_of("llama"), model_of("llama")
    report = prune_blocks(whole, inputs_of("llama"), SHORT, 0.5, **rules)

    def stop(p: Progress) -> None:
        if p.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        prune_blocks(
            model, inputs_of("llama"), SHORT, 0.5, **rules, work_dir=tmp_path, progress=stop
        )
    assert "model.layers.0 to model.layers.0 are pruned" in error.value.__notes__[0]
    dense = model_of("llama")
    assert_equal(model.model.layers[1], dense.model.layers[1])
    assert_equal(model.model.layers[0], whole.model.layers[0])
    again = prune_blocks(dense, inputs_of("llama"), SHORT, 0.5, **rules, work_dir=tmp_path)
    assert_equal(whole, dense)
    assert again.blocks[0]._replace(seconds=0.0) == report.blocks[0]._replace(seconds=0.0)
    if rules == {"target_inputs": "pruned", "propagate": "pruned"}:
        prune_blocks(model, inputs_of("llama"), SHORT, 0.5, **rules, work_dir=tmp_path)
        assert_equal(whole, model)  # of which one block was pruned before


@short_run
@pytest.mark.parametrize("solver", [SHORT, wanda], ids=["safe+", "layerwise"])
def test_an_interrupt_while_a_block_is_written_leaves_it_dense(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, write, calls = Chain(), block_run._write_back, []

    def interrupted(block: nn.Module, values: Any) -> None:
        write(block, values)
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(block_run, "_write_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_blocks(model, DATA, solver, 0.5)
    assert_equal(model.blocks[1], Chain().blocks[1])
    assert int((model.blocks[0].weight == 0).sum()) == 32


def test_a_finished_block_that_is_damaged_is_refused(tmp_path: Path) -> None:
    prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)
    file = tmp_path / "block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = Chain()
    with pytest.raises(ValueError, match=r"work_dir must hold block 1 as .* another block-00001"):
        prune_blocks(model, DATA, wanda, 0.5, work_dir=tmp_path)
    assert_equal(model.blocks[1], Chain().blocks[1])
    file.unlink()
    with pytest.raises(ValueError, match=r"work_dir must hold block 1 as .* got no block-00001"):
        prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def another(_: Progress) -> None:
        with pytest.raises(ValueError, match="work_dir must be of one run at a time"):
            prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)

    prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path, progress=another)
    prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)


def test_a_solver_is_known_by_its_arguments(tmp_path: Path) -> None:
    def share(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Layout, top: int) -> Any:
        return safe_core.project(weight * top, sparsity, layout=layout)

    prune_blocks(Chain(), DATA, functools.partial(share, top=2), 0.5, work_dir=tmp_path)
    with pytest.raises(ValueError, match=r"run with the same settings, .*: top was 2, now 3;"):
        prune_blocks(Chain(), DATA, functools.partial(share, top=3), 0.5, work_dir=tmp_path)
    for unknown in (lambda w, g, s, layout: None, Watched()):
        with pytest.raises(ValueError, match=r"solver must be of functions .*, got .*(<lam|Wat)"):
            prune_blocks(Chain(), DATA, unknown, 0.5, work_dir=tmp_path)


class Stateless:
    def __repr__(self) -> str:
        return "a solver"


class Likewise(Stateless):
    pass


class Kept:
    def __init__(self, *kept: Any) -> None:
        self.kept = kept


def closing_over(kept: Any) -> Any:
    def solve(default: int = 3) -> Any:
        return kept, default

    return solve


def test_solvers_that_differ_are_told_apart() -> None:
    long = [torch.arange(5000.0), torch.arange(5000.0)]
    long[1][2500] = -1  # within what a repr leaves out
    different = [
        SafeReconstruction(), SafeReconstruction(epochs=29), Wanda(), Wanda, SparseGPT(), ALPS(),
        ALPS(rho=1), ALPS().__call__, ALPS(iterations=6).__call__, Stateless, Stateless(),
        Likewise(), wanda, functools.partial(wanda), functools.partial(wanda, 1),
        functools.partial(wanda, a=1), closing_over(1), closing_over("1"), closing_over([1]),
        closing_over((1,)), closing_over({1: 2}), closing_over(long[0]), closing_over(long[1]),
        closing_over(long[0].numpy() + 1),
    ]  # fmt: skip
    found = [json.dumps(identity(solver)) for solver in different]
    assert len(set(found)) == len(found)
    assert found == [json.dumps(identity(solver)) for solver in different]
    assert "0x" not in "".join(found)
    assert all(f'"{f.name}":' in found[0] for f in fields(SafeReconstruction))  # defaults too
    for unknown in (Kept(1), closing_over(Kept(1)), torch.Generator(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="to tell whether a run goes on with the same one"):
            identity(unknown)


@short_run
def test_a_run_does_not_go_on_by_other_defaults(tmp_path: Path, monkeypatch: Any) -> None:
    """A default that a later release changes makes another run."""
    solver = SafeReconstruction(epochs=1, published=True)
    prune_blocks(Chain(), DATA, solver, 0.5, work_dir=tmp_path)
    monkeypatch.setattr(
        SafeReconstruction, "bound", lambda self, sparsity, _: safe_core.safe(sparsity, rho=1e-3)
    )
    with pytest.raises(ValueError, match=r": rho was .*0\.0002.*, now .*0\.001.*; name"):
        prune_blocks(Chain(), DATA, solver, 0.5, work_dir=tmp_path)


def test_pinned_memory_is_copied_once_the_device_has_written_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Activations(torch.device("cpu"), "cpu")
    source.expect([0], torch.zeros(1, 2))
    copy = source.alike("copy")
    copy.device = torch.device("cuda")

    class Stream:
        def synchronize(self) -> None:
            source.put([0], torch.ones(1, 2))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    copy.copy_from(source)
    copy.device = source.device
    assert torch.equal(copy.take([0]), torch.ones(1, 2))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)
    with pytest.raises(ValueError, match=r"work_dir .*: sparsity was 0.5, now 0.25; name"):
        prune_blocks(Chain(), DATA, wanda, 0.25, work_dir=tmp_path)
    with pytest.raises(ValueError, match=r"work_dir .*: the calibration samples differ"):
        prune_blocks(Chain(), DATA + 1, wanda, 0.5, work_dir=tmp_path)
    other = Chain()
    nn.init.ones_(other.blocks[3].weight)
    with pytest.raises(ValueError, match=r"got other weights in blocks\.3"):
        prune_blocks(other, DATA, wanda, 0.5, work_dir=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="work_dir must hold a manifest"):
        prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path)


def test_a_full_disk_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = Chain(), []

    def full(number: int) -> Any:
        calls.append(number)
        if len(calls) > 6:  # two for each of the first manifest, a block and its manifest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="work_dir must have room for block 1, got No space"):
            prune_blocks(model, DATA, wanda, 0.5, work_dir=tmp_path)
    assert not list(tmp_path.glob("*.part"))
    prune_blocks(model, DATA, wanda, 0.5, work_dir=tmp_path)
    whole = Chain()
    prune_blocks(whole, DATA, wanda, 0.5)
    assert_equal(whole, model)

    def none_left(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(OSError, match="work_dir must have room for 384 bytes of activations"):
        prune_blocks(Chain(), DATA, wanda, 0.5, work_dir=tmp_path / "b", offload="disk")


def test_what_is_not_finite_is_named() -> None:
    model = Chain()
    with torch.no_grad():
        model.blocks[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"batches .* finite .* behind blocks\.2") as error:
        prune_blocks(model, DATA, wanda, 0.5)
    assert "blocks.0 to blocks.1 are pruned" in error.value.__notes__[0]
    assert int((model.blocks[1].weight == 0).sum()) == 32
    assert bool((model.blocks[2].weight != 0).all())
    wild = SafeReconstruction(learning_rate=1e30, epochs=2, warmup_epochs=0, batch_size=4)
    with pytest.raises(ValueError, match=r"learning_rate .* epoch . of blocks\.0"):
        prune_blocks(Chain(), DATA, wild, 0.5)


def test_models_that_are_no_chain_of_blocks_are_refused() -> None:
    model = Chain()
    model.blocks[1].weight = model.blocks[0].weight
    with pytest.raises(ValueError, match=r"share parameters, blocks\.0 and blocks\.1 do"):
        prune_blocks(model, DATA, wanda, 0.5)
    with pytest.raises(ValueError, match=r"torch\.nn\.ModuleList, got none"):
        prune_blocks(nn.Linear(8, 8), DATA, wanda, 0.5)
    with pytest.raises(ValueError, match=r"blocks must be a ModuleList .* 'blocks', got 'layers'"):
        prune_blocks(Chain(), DATA, wanda, 0.5, blocks="layers")

    class Changed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x + 1)
            return x

    class Repeated(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    class Skipped(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    for kind, message in (
        (Changed, r"what the block before returns, unchanged, blocks\.1"),
        (Repeated, r"once each and in order, blocks\.0 was called as number 4"),
        (Skipped, r"once each, blocks\.1 was not called"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_blocks(kind(), DATA, wanda, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": Unstructured(0.5)}, "sparsity must not compare entries of different"),
        ({"solver": "obd"}, r"solver must be one of 'alps', .* if a name, got 'obd'"),
        ({"solver": LayerByLayer}, "solver must be an instance of LayerByLayer, which cannot be"),
        (
            {"solver": 3},
            r"solver must be a name, a solver such as ALPS\(\), or a function .* got 3",
        ),
        (
            {"sparsity": Block((3, 2), 0.5)},
            r"output axis of blocks\.0\.weight has 8 entries, which 3",
        ),
        ({"sparsity": "2:3"}, r"groups of 3, got 8 of blocks\.0\.weight: NM\(n=2, m=3,"),
        ({"offload": None}, "offload must be one of 'cpu', 'disk', 'none', got None"),
        ({"batches": []}, "batches must hold at least one sample"),
        ({"batches": [1.0]}, "batches must be tensors or mappings"),
        ({"target_inputs": "both"}, "target_inputs must be one of"),
        ({"targets": "dense"}, "settings must be batch_size, .*, got 'targets'"),
        ({"offload": "disk"}, "work_dir must name a folder"),
        ({"where": lambda name, p: False}, "blocks must hold weights to prune"),
        ({"solver": lambda w, g, s, layout: (w, w > w)}, r"for blocks\.0\.weight .* zero off the"),
        ({"solver": lambda w, g, s, layout: (w, w)}, "support of torch.float32"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = {"batches": DATA, "solver": wanda, "sparsity": 0.5} | change
    with pytest.raises((TypeError, ValueError), match=message):
        prune_blocks(Chain(), given.pop("batches"), **given)


def test_methods_go_by_name() -> None:
    named, given = Chain(), Chain()
    prune_blocks(named, DATA, "sparsegpt", 0.5)
    prune_blocks(given, DATA, SparseGPT(), 0.5)
    assert_equal(named, given)
    prune_blocks(named, DATA, "wanda", 0.75)
    assert [(b.weight == 0).sum(dim=1).tolist() for b in named.blocks] == [[6] * 8] * 4
    recipe = Reconstruction(importance="wanda", epochs=4, warmup_epochs=1, batch_size=2)
    assert as_block_solver(recipe) == SHORT
    assert as_block_solver("safe+") == SafeReconstruction(importance="wanda")
    by_class = Chain()
    prune_blocks(by_class, DATA, SparseGPT, 0.5)
    prune_blocks(given := Chain(), DATA, SparseGPT(), 0.5)
    assert_equal(by_class, given)


@dataclass(frozen=True)
class Needing(LayerSolver):
    """Prunes by magnitude and keeps the statistics that it is given."""

    needs: Any = "gram"
    seen: Any = field(default_factory=list)

    def __call__(
        self, weight: Any, statistics: Any, sparsity: Any, /, *, layout: Layout | None = None
    ) -> Any:
        self.seen.append(statistics)
        return safe_core.project(weight, sparsity, layout=layout)


def test_a_solver_gets_the_statistics_that_it_needs() -> None:
    solvers = {needs: Needing(needs) for needs in ("nothing", "squares", "gram")}
    reports = {needs: prune_blocks(Chain(), DATA, how, 0.5) for needs, how in solvers.items()}
    gram = solvers["gram"].seen[0]
    assert solvers["nothing"].seen == [None] * 4
    torch.testing.assert_close(gram, DATA.T @ DATA)
    torch.testing.assert_close(solvers["squares"].seen[0], gram.diagonal())
    assert [b.weights for b in reports["nothing"].blocks] == [
        b.weights for b in reports["gram"].blocks
    ]  # with the number of inputs
    memory = [reports[needs].predicted.device for needs in ("nothing", "squares", "gram")]
    assert memory == sorted(memory)


def test_alps_needs_more_memory_than_other_solvers() -> None:
    shape, plain = (8, 16), Needing("squares").memory(8, 16)
    assert SparseGPT().memory(*shape) - plain == 3 * 4 * 16**2
    assert ALPS().memory(*shape) - plain == 8 * 4 * 16**2
    assert ALPS().memory(*shape, 8) == 2 * ALPS().memory(*shape) - 8 * 16


class Halved(BlockSolver):
    """A block solver of one's own: it keeps the upper half of each weight."""

    name, watches, epochs = "halved", "nothing", 2

    def prune(self, problem: BlockProblem) -> Any:
        block = problem.in_dtype(torch.float64)
        batches, steps = problem.batches(5, torch.float64)
        for k in range(self.epochs):
            losses = [(b.run(block) - b.target).square().mean() for b in batches(k)]
            assert len(losses) == steps == 3
            problem.report(k, float(sum(losses).detach()))
        params = dict(block.named_parameters())
        supports = {
            key: (torch.arange(len(params[key])) < 4)[:, None].expand(params[key].shape)
            for key in problem.statistics
        }
        return {key: params[key] * mask for key, mask in supports.items()}, supports

    def memory(self, size: Any, work: Any) -> int:
        return size.stored + work(5)


def test_a_block_solver_of_ones_own_prunes_blocks() -> None:
    model, losses = Chain(), []
    report = prune_blocks(model, DATA, Halved, 0.5, progress=losses.append)
    for block, dense in zip(model.blocks, Chain().blocks, strict=True):
        assert torch.equal(block.weight[:4], dense.weight[:4])
        assert not block.weight[4:].any()
    assert report.sparsity == 0.5
    assert [(p.epoch, p.epochs) for p in losses[:3]] == [(0, 2), (1, 2), (None, 2)]
    assert losses[0].loss < 1e-10  # the dense block reproduces its targets


@short_run
def test_settings_may_be_one_object() -> None:
    by_name, by_object = Chain(), Chain()
    settings = PruningSettings(propagate="dense", batch_size=3, seed=5)
    prune_blocks(by_name, DATA, SHORT, 0.5, propagate="dense", batch_size=3, seed=4)
    prune_blocks(by_object, DATA, SHORT, 0.5, settings=settings, seed=4)
    assert_equal(by_name, by_object)


def test_tokens_of_another_model_are_refused() -> None:
    tokens = inputs_of("opt")
    tokens[4, 3] = VOCABULARY
    with pytest.raises(ValueError, match="vocabulary, below 61, got 61 in sample 4"):
        prune_blocks(model_of("opt"), {"input_ids": tokens}, wanda, 0.5)


def test_models_and_devices_that_are_not_there_are_refused(monkeypatch: Any) -> None:
    model = Chain()
    model.blocks[1]._hf_hook = object()
    with pytest.raises(ValueError, match="model must be loaded without device_map"):
        prune_blocks(model, DATA, wanda, 0.5)
    with pytest.raises(ValueError, match="model must be loaded, got parameters on the meta"):
        prune_blocks(Chain().to("meta"), DATA, wanda, 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be available, got 'cuda' and no GPU"):
        prune_blocks(Chain(), DATA, wanda, 0.5, device="cuda")


def test_blocks_whose_shapes_depend_on_values_are_planned() -> None:
    model = model_of("mixtral")
    planned = {}
    for kind in ("eager", "grouped_mm"):
        model.set_experts_implementation(kind)
        planned[kind] = plan_pruning(model, inputs_of("mixtral"), SHORT, 0.5).memory.device
    assert planned["eager"] == pytest.approx(planned["grouped_mm"], rel=0.2)


# Calibration


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) for c in text]}


@pytest.mark.filterwarnings("ignore:texts hold")
def test_calibration_takes_different_windows(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox", encoding="utf-8")
    text = "jumps over the lazy dog, " * 3
    found = calibration_batches(letters, [file, text], samples=20, length=8)
    joined = "the quick brown fox" + text
    assert found.shape == (20, 8)
    assert all("".join(map(chr, row)) in joined for row in found.tolist())
    again = calibration_batches(letters, [file, text], samples=20, length=8)
    other = calibration_batches(letters, [file, text], samples=20, length=8, seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    starts = calibration_batches(letters, "abcdefgh", samples=5, length=4)[:, 0]
    assert sorted(starts.tolist()) == [ord(c) for c in "abcde"]
    with pytest.raises(
        ValueError, match=r"at least 9 tokens for 6 .* got 8: .* a smaller samples= or length="
    ):
        calibration_batches(letters, "abcdefgh", samples=6, length=4)
    with pytest.raises(ValueError, match="got 0"):
        calibration_batches(letters, "", samples=1, length=1)
    for wrong in (str(file), [text, str(file)]):
        with pytest.raises(ValueError, match=r"name of a file as a str: Path\('.*text.txt'\) is"):
            calibration_batches(letters, wrong, samples=1, length=1)
    with pytest.raises(TypeError, match="texts must be str or paths"):
        calibration_batches(letters, [3], samples=1, length=1)
