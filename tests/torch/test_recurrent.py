"""Recurrent weights are made sparse as those of linear layers are."""

from __future__ import annotations

import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import NM, Channel, Unstructured
from safe_core.adapters.torch import SparseOptimizer

pytestmark = [
    short_run,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


class Sequence(nn.Module):
    """An embedding, a recurrent layer and a head."""

    def __init__(self, recurrent):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.recurrent = recurrent
        self.head = nn.LazyLinear(4)
        self(torch.zeros(2, 5, dtype=torch.long))

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0][:, -1])


class Cell(nn.Module):
    """A loop over a cell, with the interface of a recurrent layer."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        states, state = [], None
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 1), state


LAYERS = {
    "lstm": lambda: nn.LSTM(8, 8, num_layers=2, batch_first=True),
    "projected": lambda: nn.LSTM(8, 8, proj_size=4, batch_first=True, bidirectional=True),
    "gru": lambda: nn.GRU(8, 8, batch_first=True, bidirectional=True),
    "rnn": lambda: nn.RNN(8, 8, batch_first=True),
    "lstm cell": lambda: Cell(nn.LSTMCell(8, 8)),
    "gru cell": lambda: Cell(nn.GRUCell(8, 8)),
    "rnn cell": lambda: Cell(nn.RNNCell(8, 8)),
}


def trained(layer, pattern, steps=3, **options):
    torch.manual_seed(0)
    model = Sequence(LAYERS[layer]())
    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, method, model=model, **options)
    tokens, targets = torch.randint(10, (6, 5)), torch.randint(4, (6,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), targets)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer, closure


def weights(model):
    named = model.recurrent.named_parameters()
    return {f"recurrent.{name}": p for name, p in named if "weight" in name}


@pytest.mark.parametrize("layer", LAYERS)
def test_finalize_makes_recurrent_weights_sparse(layer):
    model, optimizer, closure = trained(layer, Unstructured(0.75, scope="tensor"))
    assert list(optimizer.sparse_parameters()) == [*weights(model), "head.weight"]
    optimizer.finalize(freeze=True)
    optimizer.step(closure)
    optimizer.check_sparsity()
    for name, p in weights(model).items():
        assert int((p == 0).sum()) == p.numel() * 3 // 4, name
    assert not bool((model.embedding.weight == 0).any())
    assert not optimizer.coverage().unexpected


@pytest.mark.parametrize("layer", LAYERS)
def test_groups_run_along_the_inputs_of_every_gate(layer):
    model, optimizer, _ = trained(layer, NM(2, 4))
    optimizer.finalize()
    for name, p in weights(model).items():
        kept = (p.detach() != 0).reshape(p.shape[0], -1, 4).sum(-1)
        assert bool((kept == 2).all()), name


def test_rows_and_channels_are_outputs_of_one_gate():
    model, optimizer, _ = trained("lstm", Unstructured(0.5, scope="row"))
    optimizer.finalize()
    for p in weights(model).values():
        assert p.shape[0] == 32  # four gates of eight
        assert bool(((p == 0).sum(1) == p.shape[1] // 2).all())
    model, optimizer, _ = trained("lstm", Channel(0.25))
    optimizer.finalize()
    for p in weights(model).values():
        assert int((p == 0).all(1).sum()) == 8


def test_an_importance_per_input_belongs_to_the_inputs_of_the_gates():
    inputs = {"ih": torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]), "hh": torch.tensor([1.0] + [0] * 7)}

    def importance(params):
        return {name: inputs.get(name[17:19], torch.tensor(1.0)) for name in params}

    model, optimizer, _ = trained("rnn", Unstructured(0.875, scope="row"), importance=importance)
    optimizer.finalize()
    assert bool((model.recurrent.weight_hh_l0[:, 0] != 0).all())
    assert bool((model.recurrent.weight_ih_l0[:, [1, 2, 4, 5, 6, 7]] == 0).all())


def test_a_step_keeps_the_memory_that_fused_kernels_read():
    model, optimizer, closure = trained("lstm", 0.5, steps=0)
    flat = [p.data_ptr() for p in model.recurrent._flat_weights]
    for _ in range(2):
        optimizer.step(closure)
    optimizer.finalize()
    assert [p.data_ptr() for p in model.recurrent._flat_weights] == flat
    named = [
        dict(model.recurrent.named_parameters())[n] for n in model.recurrent._flat_weights_names
    ]
    assert all(a is b for a, b in zip(model.recurrent._flat_weights, named, strict=True))
