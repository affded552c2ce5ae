"""A low-rank change of a sparse model keeps its zeros, and merges into its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from safe_core.adapters.torch import add_low_rank, merge_low_rank

INPUTS, TARGETS = torch.randn(16, 8), torch.randn(16, 3)


def sparse_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 4)),
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
    return model.to(dtype)


def fit(model: nn.Module, steps: int = 60) -> tuple[float, float]:
    """Train what requires a gradient, and return the first and the last loss."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    dtype, losses = next(model.parameters()).dtype, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(INPUTS.to(dtype)) - TARGETS.to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_masked_trains_alone_and_merges(dtype: torch.dtype) -> None:
    model = sparse_model(dtype)
    before = copy.deepcopy(model)
    assert add_low_rank(model, rank=2) == ["1.weight", "4.weight"]
    torch.testing.assert_close(model(INPUTS.to(dtype)), before(INPUTS.to(dtype)), rtol=0, atol=0)
    first, last = fit(model)
    assert last < 0.8 * first
    outputs = model(INPUTS.to(dtype))
    assert merge_low_rank(model) == ["1.weight", "4.weight"]
    torch.testing.assert_close(model(INPUTS.to(dtype)), outputs, rtol=0, atol=0)
    assert dict(model.named_parameters()).keys() == dict(before.named_parameters()).keys()
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())
    for name, now in model.named_parameters():
        then = before.get_parameter(name)
        if name in ("1.weight", "4.weight"):
            assert not torch.equal(now, then)
            assert ((now == 0) >= (then == 0)).all()
        else:
            torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_the_change_has_the_rank_off_the_mask_and_the_scale() -> None:
    layer = nn.Linear(6, 5, bias=False)
    dense = layer.weight.detach().clone()
    add_low_rank(layer, rank=2, alpha=6.0, where=lambda name, p: True)
    a, b = (p for p in layer.parameters() if p.requires_grad)
    with torch.no_grad():
        b.normal_()
    change = layer.weight.detach() - dense
    torch.testing.assert_close(change, 3.0 * (b @ a).detach())
    assert torch.linalg.matrix_rank(change) == 2


def test_every_layer_of_a_recurrent_and_an_attention_module_can_change() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "weight" in name:
                p[:, 0] = 0
    names = add_low_rank(model, rank=1)
    expected = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight"]
    assert names == [*expected, "attention.out_proj.weight"]
    x = torch.randn(5, 2, 4)
    y, _ = model["lstm"](x)
    z, _ = model["attention"](y, y, y)
    z.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merge_low_rank(model)
    assert (model["lstm"].weight_hh_l0[:, 0] == 0).all()


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model must have a weight with zeros, .* got none"):
        add_low_rank(nn.Linear(4, 4), rank=1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_low_rank(sparse_model(), rank=0)
    with pytest.raises(ValueError, match="alpha must be"):
        add_low_rank(sparse_model(), rank=1, alpha=-1.0)
    with pytest.raises(ValueError, match=r"two axes or more, got 1\.bias \(4,\)"):
        add_low_rank(sparse_model(), rank=1, where=lambda name, p: name == "1.bias")
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match=r"got embed\.weight, which is also head\.weight"):
        add_low_rank(tied, rank=1, where=lambda name, p: p.ndim == 2)
    with pytest.raises(ValueError, match=r"model must have weights of add_low_rank\(\), got none"):
        merge_low_rank(sparse_model())
    changed = sparse_model()
    add_low_rank(changed, rank=1)
    with pytest.raises(ValueError, match="its change not added yet"):
        add_low_rank(changed, rank=1)


def test_each_matrix_of_a_stack_of_experts_has_its_own_change() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 8) * (torch.rand(3, 4, 8) < 0.5))
            self.start = nn.Parameter(torch.zeros(3, 4))  # no pruned weight, although all zero

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eoi->beo", x, self.weight) + self.start

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), nn.Flatten(), nn.Linear(12, 3))
    zeros = model[0].weight == 0
    assert add_low_rank(model, rank=1) == ["0.weight"]
    change = model[0].parametrizations.weight[0]
    assert (change.a.shape, change.b.shape) == ((3, 1, 8), (3, 4, 1))
    first, last = fit(model)
    assert last < 0.9 * first
    merge_low_rank(model)
    assert torch.equal(model[0].weight == 0, zeros)
