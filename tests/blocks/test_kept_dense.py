"""Block-wise pruning leaves dense what nobody asked to prune, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import Tensor, nn

from safe_core import NM, Unstructured
from safe_core.adapters.torch.blocks.pruning import (
    SafeReconstruction,
    plan_pruning,
    prune_blocks,
)

pytestmark = short_run  # what stays dense does not depend on how long a block is trained

SAFE = SafeReconstruction(epochs=2, batch_size=2, learning_rate=1e-2)


class Part(nn.Module):
    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **shared: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **shared)
        return x


def chain(kind: type[nn.Module] = Part) -> Chain:
    torch.manual_seed(0)
    return Chain(kind(), kind())


def data(rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(1))


def zeros(model: nn.Module) -> dict[str, int]:
    return {n: int((p == 0).sum()) for n, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("solver", [SAFE, "wanda", "safe+"])
def test_a_second_call_keeps_the_zeros_of_the_first(solver: Any) -> None:
    model = chain()
    prune_blocks(model, data(), solver, "2:4", where=lambda name, p: "up" in name)
    first = {name: p == 0 for name, p in model.named_parameters() if "up.weight" in name}
    prune_blocks(model, data(), solver, 0.75, where=lambda name, p: "down" in name)
    assert zeros(model) == {
        f"blocks.{i}.{w}.weight": n for i in range(2) for w, n in (("up", 64), ("down", 96))
    }
    for name, mask in first.items():
        assert torch.equal(model.get_parameter(name) == 0, mask)


def test_what_is_trained_beside_keeps_its_zeros_and_still_learns() -> None:
    model = chain()
    with torch.no_grad():
        model.blocks[0].down.weight[:, ::2] = 0
    before = model.blocks[0].down.weight.detach().clone()
    prune_blocks(model, data(), SAFE, 0.5, where=lambda name, p: "up" in name)
    after = model.blocks[0].down.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("solver", [SAFE, "wanda", "sparsegpt"])
@pytest.mark.parametrize("how", ["mapping", "function"])
def test_weights_can_have_sparsities_of_their_own(solver: Any, how: str) -> None:
    wanted = {"blocks.0.up.weight": "2:4", "blocks.0.down.weight": 0.75, "blocks.1.up.weight": 0.25}
    sparsity: Any = wanted if how == "mapping" else lambda name, p: wanted.get(name)
    model = chain()
    report = prune_blocks(model, data(), solver, sparsity)
    assert zeros(model) == {
        "blocks.0.up.weight": 64,
        "blocks.0.down.weight": 96,
        "blocks.1.up.weight": 32,
        "blocks.1.down.weight": 0,
    }
    groups = (model.blocks[0].up.weight.detach() != 0).reshape(-1, 4).sum(1)
    assert set(groups.tolist()) == {2}
    assert report.dense == {"blocks.1.down.weight": "sparsity gives it no pattern"}


def test_a_run_with_sparsities_by_name_is_resumed(tmp_path: Any) -> None:
    sparsity = {"blocks.0.up.weight": "2:4", "blocks.1.up.weight": 0.25}

    def stop(progress: Any) -> None:
        if progress.block == 0 and progress.epoch is None:
            raise KeyboardInterrupt

    whole, halves = chain(), chain()
    prune_blocks(whole, data(), SAFE, sparsity)
    with pytest.raises(KeyboardInterrupt):
        prune_blocks(halves, data(), SAFE, sparsity, work_dir=tmp_path, progress=stop)
    halves = chain()
    with pytest.raises(ValueError, match="sparsity="):
        prune_blocks(halves, data(), SAFE, {**sparsity, "blocks.1.up.weight": 0.5},
                     work_dir=tmp_path)  # fmt: skip
    prune_blocks(halves, data(), SAFE, sparsity, work_dir=tmp_path)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"blocks.0.upp.weight": 0.5}, "sparsity must name weights of the blocks, such as blocks"),
        ({"blocks.0.up": 0.5}, "got 'blocks.0.up': it is a module; name its weight, blocks.0.up.w"),
        (lambda name, p: "24", "blocks.0.up.weight: sparsity must be"),
        (lambda name, p: Unstructured(0.5), "blocks.0.up.weight: sparsity must not compare"),
        (lambda name, p: None, "blocks must hold weights to prune, got none in blocks: blocks.0"),
        ({"blocks.0.up.weight": NM(1, 3)}, "sparsity must divide the inputs"),
    ],
)
def test_sparsities_that_do_not_fit_are_refused(sparsity: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        plan_pruning(chain(), data(), SAFE, sparsity)


class Experts(nn.Module):
    """Route each token, in one of the ways of models in use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.route = nn.Linear(8, 1 if how == "gate" else 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.route(x)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        if self.how == "gate":
            return x + torch.sigmoid(scores) * outputs.sum(-2)
        if self.how == "softmax":
            return x + (scores.softmax(-1)[..., None] * outputs).sum(-2)
        if self.how == "sigmoid":
            parts = [scores.sigmoid()[..., e, None] * outputs[..., e, :] for e in range(4)]
            return x + torch.stack(parts).sum(0)
        chosen = {
            "topk": lambda s: s.float().softmax(-1).topk(2).indices,
            "argmax": lambda s: s.sigmoid().argmax(-1, keepdim=True),
            "max": lambda s: (s * 2 + 1).max(-1, keepdim=True).indices,
            "sort": lambda s: s.sort(-1, descending=True).indices[..., :2],
        }[self.how](scores)
        return x + outputs.gather(-2, chosen[..., None].expand(*chosen.shape, 8)).sum(-2)


@pytest.mark.parametrize("solver", ["magnitude", SAFE])
@pytest.mark.parametrize(
    "how", ["topk", "argmax", "max", "sort", "softmax", "sigmoid", "gate"]
)  # fmt: skip
def test_routers_and_gates_stay_dense_whatever_their_name(how: str, solver: Any) -> None:
    torch.manual_seed(0)
    model = Chain(Experts(how), Experts(how))
    report = prune_blocks(model, data(), solver, 0.5)
    assert set(report.dense) == {"blocks.0.route.weight", "blocks.1.route.weight"}
    assert "choose or weigh experts" in report.dense["blocks.0.route.weight"]
    assert zeros(model)["blocks.0.route.weight"] == 0
    assert zeros(model)["blocks.1.experts.3.weight"] == 32


def test_a_router_that_sparsity_names_is_pruned() -> None:
    torch.manual_seed(0)
    model = Chain(Experts("topk"))
    prune_blocks(model, data(), "magnitude", {"blocks.0.route.weight": 0.5})
    assert zeros(model)["blocks.0.route.weight"] == 16


class Glu(nn.Module):
    """Elementwise gates, pooled tokens and attention are no routers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.query(x) @ self.key(x).mT).softmax(-1) @ x
        x = x + self.down(self.gate(mixed).sigmoid() * self.up(mixed))
        return x + x.max(dim=1, keepdim=True).values


def test_gates_of_single_features_are_pruned() -> None:
    report = prune_blocks(chain(Glu), data(), "magnitude", 0.5)
    assert not report.dense
    assert [len(block.weights) for block in report.blocks] == [5, 5]


class Flat(nn.Module):
    """Experts in one matrix that no linear layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4 * 8, 8) / 8)
        self.table, self.out = nn.Embedding(5, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + sum(x @ e for e in self.experts.view(4, 8, 8)) + self.table.weight[0]
        return self.out(x)


@pytest.mark.parametrize("solver", ["magnitude", SAFE])
def test_matrices_outside_of_linear_layers_are_listed(solver: Any) -> None:
    report = prune_blocks(chain(Flat), data(), solver, 0.5)
    assert report.dense["blocks.0.experts"] == (
        "it is no weight of a linear layer, nor a stack of experts"
    )
    assert report.dense["blocks.1.table.weight"] == "it is an embedding"
    assert set(report.blocks[0].weights) == {"out.weight"}


@pytest.mark.every_second
@pytest.mark.parametrize("mode", ["autocast", "no_grad", "inference", "made in inference"])
@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", SAFE, "safe+"])
def test_modes_around_the_call_change_nothing(mode: str, solver: Any) -> None:
    plain = chain()
    wanted = prune_blocks(plain, data(), solver, 0.5)
    modes = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "made in inference": torch.inference_mode,
    }
    model = chain()
    with modes[mode]():
        if mode == "made in inference":
            model = chain()
        found = prune_blocks(model, data(), solver, 0.5)
    assert found.sparsity == wanted.sparsity == 0.5
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


class Cast(nn.Module):
    """A layer whose weight reaches no product as it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.layer.weight * 2).mT


def test_a_run_that_prunes_nothing_is_an_error() -> None:
    model = chain(Cast)
    with pytest.raises(ValueError, match=r"got none that does: all of blocks\.0\.layer"):
        prune_blocks(model, data(), "wanda", 0.5)
    assert zeros(model) == {"blocks.0.layer.weight": 0, "blocks.1.layer.weight": 0}


class Biased(nn.Module):
    """Attention with a bias between positions and a memory, which all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor) -> Tensor:
        weights = (x @ self.key(x).mT + bias).softmax(-1)
        return x + weights @ self.value(x) + memory.mean(0)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_arguments_of_all_samples_are_not_repeated(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    bias, memory = torch.randn(5, 5, generator=generator), torch.randn(3, 8, generator=generator)
    batch = {"x": data(4), "bias": bias, "memory": memory}
    one, other = chain(Biased), chain(Biased)
    wanted = prune_blocks(one, batch, "wanda", 0.5, batch_size=1)
    found = prune_blocks(other, batch, "wanda", 0.5, batch_size=batch_size)
    assert found.blocks[1].loss == pytest.approx(wanted.blocks[1].loss, rel=1e-4)
    with torch.no_grad():
        dense = chain(Biased)
        apart = [dense(x[None], bias=bias, memory=memory) for x in batch["x"]]
        sparse = [one(x[None], bias=bias, memory=memory) for x in batch["x"]]
    assert len(apart) == len(sparse)


def test_a_tensor_that_may_be_shared_or_not_is_refused() -> None:
    batch = {"x": data(5), "bias": torch.zeros(5, 5), "memory": torch.ones(3, 8)}
    with pytest.raises(ValueError, match="batches must show which tensors all samples share"):
        prune_blocks(chain(Biased), batch, "wanda", 0.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8])
def test_quantised_weights_are_refused_before_any_work(dtype: torch.dtype) -> None:
    model = chain()
    stored = torch.zeros(16, 8).to(dtype)
    model.blocks[1].up.weight = nn.Parameter(stored, requires_grad=False)
    with pytest.raises(ValueError, match=r"Got torch\..* for blocks.1.up.weight"):
        prune_blocks(model, data(), "wanda", 0.5)


def test_layers_without_a_weight_of_their_own_are_listed() -> None:
    model = chain()
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.up)
    report = prune_blocks(model, data(), "magnitude", 0.5)
    assert any("up" in name for name in report.dense)
    assert set(report.blocks[0].weights) == {"down.weight"}


class Heads(nn.Module):
    """One gate for each head weighs a part of the features, not an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.value = nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.value(x).unflatten(-1, (2, 4))
        return x + (self.beta(x).sigmoid()[..., None] * heads).flatten(-2)


def test_gates_of_heads_are_pruned() -> None:
    report = prune_blocks(chain(Heads), data(), "magnitude", 0.5)
    assert not report.dense
    assert set(report.blocks[0].weights) == {"beta.weight", "value.weight"}
