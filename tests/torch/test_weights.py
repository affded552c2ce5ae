"""Which parameters of a torch model are made sparse, how far, and which never are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import NM, Block, Channel, DenseWeightWarning, Layout, Unstructured
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.weights import prunable_weights

OUTPUT_INPUT = Layout(input_axes=(1,), output_axes=(0,))
INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))


def found(model):
    """Layouts of the prunable weights by name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: layout for p, layout in prunable_weights(model).items()}


# Module types


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (nn.Linear(4, 6), {"weight": OUTPUT_INPUT}),
        (nn.Conv1d(4, 6, 3), {"weight": OUTPUT_INPUT}),
        (nn.Conv2d(4, 6, 3), {"weight": OUTPUT_INPUT}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": OUTPUT_INPUT}),
        (nn.Conv3d(4, 6, 3), {"weight": OUTPUT_INPUT}),
        (nn.ConvTranspose1d(4, 6, 3), {"weight": INPUT_OUTPUT}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": INPUT_OUTPUT}),
        (nn.ConvTranspose3d(4, 6, 3), {"weight": INPUT_OUTPUT}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": None}),
        (nn.Bilinear(3, 4, 6), {"weight": Layout(input_axes=(1, 2), output_axes=(0,))}),
        (
            nn.MultiheadAttention(8, 2),
            {"in_proj_weight": OUTPUT_INPUT, "out_proj.weight": OUTPUT_INPUT},
        ),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            {
                "q_proj_weight": OUTPUT_INPUT,
                "k_proj_weight": OUTPUT_INPUT,
                "v_proj_weight": OUTPUT_INPUT,
                "out_proj.weight": OUTPUT_INPUT,
            },
        ),
        (
            nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3),
            {
                f"weight_{kind}_l{layer}{end}": OUTPUT_INPUT
                for layer in (0, 1)
                for end in ("", "_reverse")
                for kind in ("ih", "hh", "hr")
            },
        ),
        (nn.GRU(4, 6), {"weight_ih_l0": OUTPUT_INPUT, "weight_hh_l0": OUTPUT_INPUT}),
        (nn.RNN(4, 6), {"weight_ih_l0": OUTPUT_INPUT, "weight_hh_l0": OUTPUT_INPUT}),
        (nn.LSTMCell(4, 6), {"weight_ih": OUTPUT_INPUT, "weight_hh": OUTPUT_INPUT}),
        (nn.GRUCell(4, 6), {"weight_ih": OUTPUT_INPUT, "weight_hh": OUTPUT_INPUT}),
        (nn.RNNCell(4, 6), {"weight_ih": OUTPUT_INPUT, "weight_hh": OUTPUT_INPUT}),
        (
            type("Own", (nn.LSTM,), {})(4, 6),
            {"weight_ih_l0": OUTPUT_INPUT, "weight_hh_l0": OUTPUT_INPUT},
        ),
        (nn.Embedding(5, 4), {}),
        (nn.EmbeddingBag(5, 4), {}),
        (nn.LayerNorm(4), {}),
        (nn.BatchNorm2d(4), {}),
        (nn.GroupNorm(2, 4), {}),
        (nn.RMSNorm(4), {}),
        (nn.PReLU(4), {}),
    ],
    ids=str,
)
def test_weights_of_a_module(module, weights):
    assert found(module) == weights


def test_layouts_name_the_axes_that_modules_contract():
    for module, shape in [
        (nn.Linear(2, 3), (5, 2)),
        (nn.Conv2d(2, 3, 1), (5, 2, 1, 1)),
        (nn.ConvTranspose2d(2, 3, 1), (5, 2, 1, 1)),
    ]:
        (layout,) = found(module).values()
        weight = module.weight
        assert weight.shape[layout.input_axes[0]] == shape[1]
        assert weight.shape[layout.output_axes[0]] == module(torch.ones(shape)).shape[1]


class Conv1D(nn.Module):
    """GPT-2's linear layer as transformers stores it: (input, output)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def test_conv1d_of_transformers_is_input_output():
    assert found(Conv1D(6, 4)) == {"weight": INPUT_OUTPUT}


def test_another_class_of_that_name_is_unknown():
    other = type("Conv1D", (nn.Module,), {})()
    other.weight = nn.Parameter(torch.randn(4, 6))
    assert found(other) == {}


def test_weights_tied_to_an_embedding_are_left_out():
    model = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False), "embedding": nn.Embedding(5, 4)})
    model["head"].weight = model["embedding"].weight
    assert found(model) == {}


def test_tied_weights_are_found_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert found(model) == {"0.weight": OUTPUT_INPUT}


# A model of every kind of layer


class Net(nn.Module):
    """Convolutions, attention, norms, an embedding, a head of its own and a tied one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.batch_norm = nn.BatchNorm2d(6)
        self.embedding = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.tied = nn.Linear(8, 10)
        self.tied.weight = self.embedding.weight

    def forward(self, images, tokens):
        pixels = self.batch_norm(self.conv(images)).mean() + self.up(images).square().mean()
        hidden = self.embedding(tokens)
        hidden = self.norm(self.attention(hidden, hidden, hidden)[0])
        return self.head(hidden).square().mean() + self.tied(hidden).square().mean() + pixels


WEIGHTS = {
    "conv.weight": OUTPUT_INPUT,
    "up.weight": INPUT_OUTPUT,
    "attention.in_proj_weight": OUTPUT_INPUT,
    "attention.out_proj.weight": OUTPUT_INPUT,
    "head.weight": OUTPUT_INPUT,
}
PATTERNS = [
    Unstructured(0.9),
    Unstructured(0.7, scope="tensor"),
    Unstructured(0.6, scope="row"),
    NM(2, 4),
    Block((2, 2), 0.6),
    Block((2, 2), 0.6, scope="global"),
    Channel(0.4),
    Channel(0.4, scope="global"),
]


class Run:
    def __init__(self, method, **options):
        torch.manual_seed(0)
        self.model = Net()
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # biases start at zero
        self.inputs = torch.randn(2, 4, 5, 5), torch.randint(10, (2, 3))
        base = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.optimizer = SparseOptimizer(base, method, model=self.model, **options)
        self.scale = 1.0

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.scale * self.model(*self.inputs)
        loss.backward()
        return loss

    def params(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@short_run
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_finalize_leaves_exactly_as_many_as_the_pattern_asks(pattern):
    run = Run(safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=2))
    for _ in range(4):
        run.optimizer.step(run.closure)
    before = run.params()
    run.optimizer.finalize()
    after = run.params()
    assert set(run.optimizer.sparse_parameters()) == set(WEIGHTS)
    for name, p in before.items():
        if name not in WEIGHTS:
            assert torch.equal(p, after[name]), name
            continue
        kept = after[name] != 0
        assert torch.equal(after[name][kept], p[kept]), name
        assert not after[name][~kept].signbit().any(), name
    arrays = [after[name].numpy().ravel() for name in WEIGHTS]
    shapes = [tuple(after[name].shape) for name in WEIGHTS]
    pools = reference.pools(shapes, pattern, list(WEIGHTS.values()))
    assert sum(len(unit) for pool in pools for unit in pool.units) == sum(map(len, arrays))
    for pool in pools:
        whole = [{bool(arrays[i][flat]) for i, flat in unit} for unit in pool.units]
        assert all(len(values) == 1 for values in whole), "units are kept or zeroed whole"
        assert sum(values == {True} for values in whole) == pool.kept
    once = run.params()
    run.optimizer.finalize()
    assert all(torch.equal(p, once[name]) for name, p in run.params().items())


@short_run
def test_the_penalty_acts_on_the_weights_alone():
    run = Run(safe_core.admm(0.5, penalty=2.0, dual_update_interval=1))
    run.scale = 0.0
    before = run.params()
    for _ in range(3):
        run.optimizer.step(run.closure)
    run.optimizer.finalize()
    moved = {name for name, p in run.params().items() if not torch.equal(p, before[name])}
    assert moved == set(WEIGHTS)
    assert len(before) > 2 * len(WEIGHTS)


def test_only_sparse_parameters_cost_state():
    run = Run(safe_core.safe(0.5))
    run.optimizer.step(run.closure)
    sizes = {p.numel() for p in run.optimizer.sparse_parameters().values()}
    held = [t for entry in run.optimizer.state.values() for t in entry.values()]
    assert len(run.optimizer.state) == len(WEIGHTS)
    assert {t.numel() for t in held} == sizes
    per_entry = sum(t.numel() * t.element_size() for t in held) / sum(
        p.numel() for p in run.optimizer.sparse_parameters().values()
    )
    assert per_entry == 5


@short_run
def test_a_tied_weight_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model)
    assert list(optimizer.sparse_parameters()) == ["0.weight"]
    optimizer.finalize()
    assert int((model[1].weight == 0).sum()) == 8


# Frozen and unused parameters


@short_run
def test_frozen_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    with pytest.warns(DenseWeightWarning, match=r"0\.weight, because requires_grad is False"):
        optimizer = SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
            safe_core.safe(0.5, rho=0.5, dual_update_interval=1),
            model=model,
        )
    inputs = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    optimizer.finalize()
    assert all(torch.equal(p, old) for p, old in zip(model[0].parameters(), frozen, strict=True))
    assert all(p.grad is None for p in model[0].parameters())
    assert list(optimizer.sparse_parameters()) == ["1.weight"]
    assert not any(p in optimizer.state for p in model[0].parameters())
    assert int((model[1].weight == 0).sum()) == 8


@short_run
def test_a_parameter_unfrozen_later_joins():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(DenseWeightWarning, match=r"0\.weight"):
        optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model)
    model[0].requires_grad_(True)
    assert not optimizer.coverage().dense
    assert list(optimizer.sparse_parameters()) == ["0.weight", "1.weight"]
    optimizer.finalize()
    assert sum(int((layer.weight == 0).sum()) for layer in model) == 16


def test_a_parameter_without_gradient_gets_the_penalty_only():
    used, unused = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([used, unused])
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), safe_core.safe(0.5, penalty=0.2), model=model
    )
    x, bias = unused.weight.detach().clone(), unused.bias.detach().clone()
    anchor = optimizer.split().anchor[1].clone()

    def closure():
        optimizer.zero_grad()
        loss = used(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(unused.weight.detach(), x - 0.5 * 0.2 * (x - anchor))
    assert not torch.equal(unused.weight, x)
    assert torch.equal(unused.bias, bias)
    assert unused.bias.grad is None


def test_the_split_starts_from_weights_that_were_loaded_late():
    model = nn.Linear(4, 4)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model)
    loaded = nn.Linear(4, 4)
    model.load_state_dict(loaded.state_dict())
    expected = safe_core.project(loaded.weight.detach(), 0.5).values
    assert torch.equal(optimizer.split().anchor[0], expected)


# The choice of parameters


def names_of(optimizer):
    return list(optimizer.sparse_parameters())


def model_and_sgd(groups=lambda model: model.parameters()):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    return model, torch.optim.SGD(groups(model), lr=0.1)


def test_where_chooses_by_name_and_parameter():
    model, base = model_and_sgd()
    seen = []

    def where(name, parameter):
        seen.append((name, parameter))
        return name.startswith("2.") and parameter.ndim == 2

    optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model, where=where)
    assert names_of(optimizer) == ["2.weight"]
    assert [name for name, _ in seen] == [name for name, _ in model.named_parameters()]
    assert all(p is q for (_, p), q in zip(seen, model.parameters(), strict=True))


@short_run
def test_where_may_choose_what_the_model_would_not():
    model, base = model_and_sgd()
    optimizer = SparseOptimizer(
        base, safe_core.safe(0.5), model=model, where=lambda name, p: name == "1.weight"
    )
    optimizer.finalize()
    assert int((model[1].weight == 0).sum()) == 4


def test_where_without_a_model_knows_names_of_a_base_with_named_parameters():
    _, base = model_and_sgd(lambda model: model.named_parameters())
    optimizer = SparseOptimizer(base, safe_core.safe(0.5), where=lambda name, p: name == "0.weight")
    assert names_of(optimizer) == ["0.weight"]


def test_where_without_any_names_counts_groups_and_places():
    _, base = model_and_sgd()
    optimizer = SparseOptimizer(base, safe_core.safe(0.5), where=lambda name, p: p.ndim == 2)
    assert names_of(optimizer) == ["param_groups[0][0]", "param_groups[0][4]"]


def test_a_group_may_opt_out():
    def groups(model):
        return [
            {"params": model[0].parameters(), "sparsify": False},
            {"params": [*model[1].parameters(), *model[2].parameters()]},
        ]

    for where in (None, lambda name, p: p.ndim == 2):
        model, base = model_and_sgd(groups)
        optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model, where=where)
        assert names_of(optimizer) == ["2.weight"]


@short_run
def test_a_group_may_opt_in_whole():
    def groups(model):
        first, *rest = model.parameters()
        return [{"params": rest}, {"params": [first], "sparsify": True}]

    model, base = model_and_sgd(groups)
    optimizer = SparseOptimizer(base, safe_core.safe(0.5))
    assert names_of(optimizer) == ["param_groups[1][0]"]
    optimizer.finalize()
    assert int((model[0].weight == 0).sum()) == 16


def test_nothing_that_says_which_parameters_is_an_error():
    for group in ({}, {"sparsify": False}):
        _, base = model_and_sgd(
            lambda model, group=group: [{"params": model.parameters(), **group}]
        )
        with pytest.raises(ValueError, match=r'model=.*where=.*"sparsify": True'):
            SparseOptimizer(base, safe_core.safe(0.5))


def test_a_choice_of_nothing_is_an_error():
    model, base = model_and_sgd()
    with pytest.raises(ValueError, match="where= selects none of the 6 that it holds: 0"):
        SparseOptimizer(base, safe_core.safe(0.5), model=model, where=lambda name, p: False)
    with pytest.raises(ValueError, match="selected none of its 6"):
        SparseOptimizer(base, safe_core.safe(0.5), model=nn.LayerNorm(4))


# Layouts


def pruned(layout=None, model=None, pattern="2:4"):
    torch.manual_seed(0)
    model = model or nn.Linear(8, 8)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.safe(pattern), model=model, layout=layout)
    optimizer.finalize()
    return model.weight.detach().numpy()


def is_2_4(weight, axis):
    groups = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool(((groups != 0).sum(axis=1) == 2).all())


@short_run
@pytest.mark.parametrize(
    "layout",
    [
        INPUT_OUTPUT,
        Layout(input_axes=(-2,), output_axes=(-1,)),
        {"weight": INPUT_OUTPUT, "bias": None},
        lambda name, p: INPUT_OUTPUT if (name, p.ndim) == ("weight", 2) else None,
    ],
    ids=["layout", "negative axes", "mapping", "function"],
)
def test_layout_overrides_what_the_module_says(layout):
    assert is_2_4(pruned(layout), axis=0)
    assert not is_2_4(pruned(layout), axis=1)


@short_run
@pytest.mark.parametrize("layout", [None, {}, {"bias": INPUT_OUTPUT}])
def test_layout_of_the_module_holds_otherwise(layout):
    assert is_2_4(pruned(layout), axis=1)
    assert not is_2_4(pruned(layout), axis=0)


@short_run
@pytest.mark.parametrize(
    ("layout", "module"),
    [
        (None, nn.ConvTranspose2d(4, 8, 2, groups=2)),
        ({"weight": None}, nn.Linear(8, 8)),
        (lambda name, p: None, nn.Linear(8, 8)),
    ],
    ids=["grouped", "mapping", "function"],
)
def test_an_unknown_layout_is_an_error_only_where_it_is_needed(layout, module):
    for pattern in ("2:4", Unstructured(0.5, "row"), Block((2, 2), 0.5), Channel(0.5)):
        with pytest.raises(ValueError, match="layout of weight is unknown"):
            pruned(layout, module, pattern)
    assert (pruned(layout, module, 0.5) == 0).sum() == math.prod(module.weight.shape) // 2


@short_run
def test_importance_per_input_follows_the_layout():
    module = nn.ConvTranspose1d(8, 6, 1, bias=False)
    base = torch.optim.SGD(module.parameters(), lr=0.1)
    importance = {"weight": torch.tensor([1e6, 0, 0, 0, 1e6, 0, 0, 1e6])}
    optimizer = SparseOptimizer(base, safe_core.safe(0.625), model=module, importance=importance)
    optimizer.finalize()
    kept = (module.weight.detach() != 0).all(dim=(1, 2))
    assert torch.equal(kept, importance["weight"] > 0)
