"""Buffers of the modules of model= are updated once a step, whatever updates them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import safe_core
from safe_core.adapters.torch import SparseOptimizer

METHOD = safe_core.safe(0.5, rho=0.5, penalty=0.1)


class Codebook(nn.Module):
    """Buffers as custom modules update them: in-place, through .data, and by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("hidden", torch.zeros(4))
        self.register_buffer("assigned", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("fixed", torch.ones(1).expand(4))
        self.register_buffer("nothing", None)

    def forward(self, x):
        now = x.detach().mean(0)
        with torch.no_grad():
            self.average.lerp_(now, 0.1)
            self.count += 1
        self.hidden.data.mul_(0.9).add_(0.1 * now)
        self.assigned = 0.9 * self.assigned + 0.1 * now
        return x + self.fixed


class Observer(nn.Module):
    """An observer of ranges, which resizes its buffer at the first batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x):
        if self.largest.shape != x.shape[1:]:
            self.largest.resize_(x.shape[1:]).zero_()
        self.largest.copy_(torch.maximum(self.largest, x.detach().amax(0)))
        return x


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 4))


def buffers_of(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert found
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


LAYERS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "codebook": Codebook,
    "observer": Observer,
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "fake quantization": lambda: torch.ao.quantization.FakeQuantize(),
}


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_buffer_is_updated_once_at_x(layer, blocks):
    model = network(LAYERS[layer]())
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()]},
        *([{"params": [*model[1].parameters()], "sparsify": False}] if layer == "spectral" else []),
    ]
    base = torch.optim.SGD(groups, lr=0.1)
    optimizer = SparseOptimizer(base, METHOD, model=model)
    inputs = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        reference = copy.deepcopy(model)
        reference(inputs)
        if blocks:
            closure()
            with optimizer.perturbed():
                model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(closure)
        check_same(buffers_of(model), buffers_of(reference))


def test_buffers_are_restored_if_the_block_raises():
    model = network(Codebook())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, METHOD, model=model)
    model(torch.randn(8, 4)).square().mean().backward()
    before = buffers_of(model)
    with pytest.raises(RuntimeError, match="shapes"), optimizer.perturbed():
        model[2](model[1](torch.randn(8, 4)))[:, :3] @ model[0].weight
    check_same(buffers_of(model), before)


def gan():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    critic = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return generator, critic


@pytest.mark.parametrize("form", [list, tuple, dict])
def test_the_other_network_of_a_gan_keeps_its_statistics(form):
    generator, critic = gan()
    modules = {"generator": generator, "critic": critic}
    model = modules if form is dict else form(modules.values())
    first, second = modules if form is dict else ("model[0]", "model[1]")
    base = torch.optim.SGD(generator.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, METHOD, model=model)
    assert list(optimizer.sparse_parameters()) == [f"{first}.0.weight", f"{first}.2.weight"]
    dense = f"dense: {second}.0.weight, {second}.2.weight, because base holds nothing of its module"
    assert dense in repr(optimizer)
    reference = copy.deepcopy((generator, critic))
    noise = torch.randn(8, 3)

    def closure():
        optimizer.zero_grad()
        loss = critic(generator(noise)).square().mean()
        loss.backward()
        return loss

    reference[1](reference[0](noise))
    optimizer.step(closure)
    for module, wanted in zip((generator, critic), reference, strict=True):
        check_same(buffers_of(module), buffers_of(wanted))


def test_a_module_of_which_the_base_holds_a_part_is_warned_of():
    generator, critic = gan()
    base = torch.optim.SGD([*generator.parameters(), *critic[1].parameters()], lr=0.1)
    with pytest.warns(safe_core.DenseWeightWarning, match=r"model\[1\]\.2\.weight, because base"):
        SparseOptimizer(base, METHOD, model=[generator, critic])


def test_a_graph_from_before_the_block_can_still_be_differentiated():
    generator, critic = gan()
    fake = generator(torch.randn(8, 3))
    base = torch.optim.SGD(critic.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, METHOD, model=[generator, critic])
    critic(fake.detach()).square().mean().backward()
    with optimizer.perturbed():
        critic(fake.detach()).square().mean().backward()
    optimizer.step()
    critic(fake).mean().backward()
    assert all(p.grad is not None for p in generator.parameters())


# Names of several modules


def names(model, params):
    base = torch.optim.SGD(params, lr=0.1)
    return list(SparseOptimizer(base, METHOD, model=model).sparse_parameters())


def test_names_get_a_prefix_only_where_two_modules_share_one():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    params = [*first.parameters(), *second.parameters()]
    assert names([first, second], params) == ["model[0].weight", "model[1].weight"]
    assert names({"a": first, "b": second}, params) == ["a.weight", "b.weight"]
    other = nn.ModuleDict({"head": second})
    assert names([first, other], params) == ["weight", "head.weight"]
    assert names([first], first.parameters()) == ["weight"]
    assert names({"training": first, "forward": other}, params) == ["weight", "head.weight"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([], "model must be a module or several, got none"),
        ({"a.b": nn.Linear(2, 2)}, r"strings without dots, got 'a\.b'"),
        ({3: nn.Linear(2, 2)}, "strings without dots, got 3"),
    ],
)
def test_modules_that_cannot_be_named_are_refused(model, message):
    base = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(base, METHOD, model=model)


def test_names_that_two_parameters_share_are_refused():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    groups = [{"params": m.named_parameters()} for m in (first, second)]
    with pytest.raises(ValueError, match="different names, got weight twice"):
        SparseOptimizer(torch.optim.SGD(groups), METHOD, where=lambda name, p: p.ndim == 2)
