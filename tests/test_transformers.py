"""Pruning of transformers block by block: families, SAFE, memory, faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import safe_core
from safe_core import Layout, Unstructured
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.transformers import (
    Progress,
    SafeReconstruction,
    calibration_batches,
    plan_pruning,
    prune_blocks,
)
from safe_core.adapters.transformers_memory import Activations, TensorBytes

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


def configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**TEXT, **GROUPED),
        "mistral": t.MistralConfig(**TEXT, **GROUPED, sliding_window=4),
        "qwen3": t.Qwen3Config(**TEXT, **GROUPED),
        "gemma2": t.Gemma2Config(**TEXT, **GROUPED, sliding_window=4),
        "gemma3": t.Gemma3TextConfig(
            **TEXT, **GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=4
        ),
        "phi": t.PhiConfig(**TEXT),
        "opt": t.OPTConfig(**TEXT, ffn_dim=32, word_embed_proj_dim=WIDTH),
        "gpt2": t.GPT2Config(**TEXT | {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": 32}),
        "gpt_neox": t.GPTNeoXConfig(**TEXT),
        "bert": t.BertConfig(**TEXT),
        "mixtral": t.MixtralConfig(**TEXT, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "vit": t.ViTConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=2,
        ),
    }  # fmt: skip


CONFIGS = configs()
AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AUTO.get(family, transformers.AutoModelForCausalLM).from_config(CONFIGS[family])
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
    assert report.dense == ()
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


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_block_sees_what_the_blocks_before_it_return(propagate: str) -> None:
    dense, inputs, solver = model_of("llama"), inputs_of("llama"), Watched()
    model = model_of("llama")
    prune_blocks(model, inputs, solver, 0.5, propagate=propagate)
    before = model if propagate == "pruned" else dense
    wanted = grams_of(before, "model.layers", rows("llama", inputs))[7]  # first of block 1
    torch.testing.assert_close(solver.grams[7], wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_the_error_is_against_the_targets(targets: str) -> None:
    dense, inputs = model_of("llama"), inputs_of("llama")
    model = model_of("llama")
    report = prune_blocks(model, inputs, wanda, 0.5, targets=targets)
    with torch.no_grad():
        hidden = dense(inputs, output_hidden_states=True).hidden_states[1]
        if targets == "pruned":
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


@pytest.mark.parametrize("plus", [True, False], ids=["safe+", "layerwise"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(plus: bool) -> None:
    model = moe_with_an_idle_expert()
    idle = model.model.layers[0].mlp.experts.down_proj[3].detach().clone()
    epochs = SafeReconstruction(importance="wanda", epochs=1, warmup_epochs=0)
    report = prune_blocks(model, inputs_of("mixtral"), epochs if plus else wanda, 0.5)
    assert report.blocks[0].weights["mlp.experts.down_proj"].tokens == 0
    kept = model.model.layers[0].mlp.experts.down_proj[3] != 0
    assert torch.equal(kept, safe_core.project(idle, 0.5).support)


# SAFE

SHORT = SafeReconstruction(importance="wanda", epochs=4, warmup_epochs=1, batch_size=2)


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


def test_safe_is_a_plain_loop() -> None:
    model, wanted, inputs = model_of("llama"), model_of("llama"), inputs_of("llama")
    solver = SafeReconstruction(importance="wanda", epochs=5, batch_size=len(inputs))
    losses: list[Progress] = []
    prune_blocks(model, inputs, solver, 0.5, progress=losses.append)
    hidden = wanted.model.embed_tokens(inputs).detach()
    block, loss = plain_loop(wanted, hidden)
    assert losses[4].loss == pytest.approx(float(loss), rel=1e-4)
    for got, want in zip(model.model.layers[0].parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got == 0, want == 0)


def test_safe_lowers_the_error_of_the_projection() -> None:
    errors = {}
    solver = SafeReconstruction(importance="wanda", epochs=20, batch_size=2, learning_rate=5e-3)
    for name, how in (("one-shot", wanda), ("safe+", solver)):
        report = prune_blocks(model_of("llama"), inputs_of("llama"), how, 0.5)
        errors[name] = report.blocks[0].relative_error
    assert errors["safe+"] < 0.8 * errors["one-shot"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bits_keep_their_dtype_and_exact_zeros(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    report = prune_blocks(model, inputs_of("llama"), SHORT, 0.5)
    in_32_bits = prune_blocks(model_of("llama"), inputs_of("llama"), SHORT, 0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for block in report.blocks:
        for name, weight in block.weights.items():
            p = model.get_parameter(f"{block.name}.{name}")
            assert weight.kept * 2 == p.numel()
            assert int((p == 0).sum()) == p.numel() // 2
    error = in_32_bits.blocks[0].relative_error
    assert report.blocks[0].relative_error == pytest.approx(error, rel=0.05)


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


def test_progress_and_modes() -> None:
    model, seen = model_of("opt").train(), []
    model.config.use_cache = True
    report = prune_blocks(model, inputs_of("opt"), SHORT, 0.5, progress=seen.append)
    assert [(p.block, p.epoch) for p in seen] == [
        (block, epoch) for block in (0, 1) for epoch in (0, 1, 2, 3, None)
    ]
    assert seen[-1] == Progress(1, 2, None, report.blocks[1].loss, 0.0)
    assert seen[0].seconds_left > 0
    assert all(m.training for m in model.modules())
    assert model.config.use_cache
    assert "forward" not in vars(model.model.decoder.layers[0])
