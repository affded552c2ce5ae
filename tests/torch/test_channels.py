"""Removing zero channels leaves a smaller network with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import safe_core
from safe_core.adapters.torch import SparseOptimizer, shrink, silence_channels

IMAGES = torch.linspace(-1, 1, 4 * 3 * 8 * 8, dtype=torch.float64).sin().reshape(4, 3, 8, 8)


class Residual(nn.Module):
    """A residual block between a stem and a classifier of flattened maps."""

    def __init__(self, inner: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x))))))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 2), 1))


class Depthwise(nn.Module):
    """Two convolutions side by side, and a depthwise one over both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.a(x), self.b(x)], dim=1).relu()
        return {"maps": self.last(self.depthwise(x).relu())}


class Narrow(nn.Module):
    """Two layers of one channel side by side, and a third that is added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.side = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(3, 2, 1)
        self.middle, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], dim=1).relu() + self.side(x).relu()
        return self.last(self.middle(y).relu())


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
        self.last = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def layers(activation: nn.Module, between: nn.Module | None = None) -> nn.Sequential:
    middle = [] if between is None else [between]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *middle, activation, nn.Conv2d(8, 4, 1))


def made(make: Callable[[], nn.Module], zero: Mapping[str, Sequence[int]]) -> nn.Module:
    """A model with random norms, in which channels of some modules are zero."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for name, indices in zero.items():
            for parameter in model.get_submodule(name).parameters():
                parameter[list(indices)] = 0
    return model


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = copy.deepcopy(model).eval()(IMAGES)
    return list(found.values()) if isinstance(found, dict) else [found]


def assert_same_outputs(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "zero", "removed"),
    [
        (Residual, {"conv1": [1, 4], "norm1": [1, 4]}, {"conv1": 2}),
        (
            Residual,
            {"stem": [2, 5], "norm": [2, 5], "conv2": [2, 5, 6], "norm2": [2, 5, 6]},
            {"stem": 2, "conv2": 2},
        ),
        # Each channel of the stream is zero in at least one of its two layers, and two in both.
        (
            Residual,
            {"stem": [0, 1, 2, 3, 4], "norm": [0, 1, 2, 3, 4], "conv2": [3, 4, 5, 6, 7],
             "norm2": [3, 4, 5, 6, 7], "conv1": [1, 4], "norm1": [1, 4]},
            {"stem": 2, "conv1": 2, "conv2": 2},
        ),
        # No channel of the stream is zero in both.
        (
            Residual,
            {"stem": [0, 1, 2, 3], "norm": [0, 1, 2, 3], "conv2": [4, 5, 6, 7],
             "norm2": [4, 5, 6, 7], "conv1": [1, 4], "norm1": [1, 4]},
            {"conv1": 2},
        ),
        # One inner layer is zero, and keeps a channel. Others lose theirs nevertheless.
        (Chain, {"first": [1, 2, 3], "second": [0, 1, 2, 3, 4]}, {"first": 3, "second": 4}),
        (lambda: Residual(inner=1), {"stem": [1, 2, 3, 4], "norm": [1, 2, 3, 4],
                                     "conv2": [0, 4, 5], "norm2": [0, 4, 5]},
         {"stem": 1, "conv2": 1}),
        (Narrow, {"side": [0], "middle": [1, 2, 5]}, {"middle": 3}),
        (Depthwise, {"a": [0, 3], "b": [1], "depthwise": [0, 3, 5]}, {"a": 2, "b": 1,
                                                                        "depthwise": 3}),
        (lambda: layers(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)), {"0": [0, 3, 4, 6]}, {"0": 4}),
        (lambda: layers(nn.PReLU(8)), {"0": [7]}, {"0": 1}),
        (lambda: layers(nn.GELU(), nn.BatchNorm2d(8, affine=False)), {}, {}),
    ],
    ids=["inner", "residual", "covered", "apart", "zero layer", "one inner channel", "narrow",
         "depthwise", "groups", "prelu", "nothing"],
)  # fmt: skip
def test_outputs_stay_and_exactly_the_zero_channels_go(
    make: Any, zero: Any, removed: dict[str, int]
) -> None:
    model = made(make, zero)
    wanted, before = outputs(model), sum(p.numel() for p in model.parameters())
    widths = {name: model.get_submodule(name).weight.shape[0] for name in removed}
    found = shrink(model, IMAGES)
    assert found.model is model
    assert model.training
    assert found.removed == removed
    for name, count in removed.items():
        assert model.get_submodule(name).weight.shape[0] == widths[name] - count
    assert (sum(p.numel() for p in model.parameters()) < before) == bool(removed)
    assert_same_outputs(outputs(model), wanted)


def test_a_layer_keeps_one_channel() -> None:
    found = shrink(made(Chain, {"second": range(5)}), IMAGES)
    assert found.removed == {"second": 4}
    assert found.kept == {"second": "each layer keeps at least one channel"}


def test_a_depthwise_convolution_goes_with_its_input() -> None:
    model = made(Depthwise, {"a": [0]})
    with torch.no_grad():
        model.depthwise.bias[0] = 0
    wanted = outputs(model)
    assert shrink(model, IMAGES).removed == {"a": 1, "depthwise": 1}
    assert_same_outputs(outputs(model), wanted)


@pytest.mark.parametrize(
    ("make", "zero", "reason"),
    [
        (Residual, {"stem": [1], "norm": [1]}, "channels that are not zero"),
        (Residual, {"head": [2]}, "outputs of the network"),
        (Depthwise, {"depthwise": [1]}, "channels that are not zero"),
        (lambda: layers(nn.ReLU(), nn.GroupNorm(2, 8)), {"0": [1]}, "channels that are not zero"),
        (lambda: layers(nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), {"0": [1]}, "Retained counts"),
    ],
    ids=["one branch", "outputs", "input of a depthwise", "group norm", "groups"],
)
def test_channels_that_cannot_go_stay_with_a_reason(make: Any, zero: Any, reason: str) -> None:
    model = made(make, zero)
    before = copy.deepcopy(model.state_dict())
    found = shrink(model, IMAGES)
    assert found.removed == {}
    assert set(found.kept) == {next(iter(zero))}
    assert reason in next(iter(found.kept.values()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make", [Residual, lambda: layers(nn.ReLU(), nn.BatchNorm2d(8, affine=False))]
)
def test_constants_raise_until_they_are_silent(make: Any) -> None:
    name, norm = ("conv1", "norm1") if make is Residual else ("0", "1")
    model = made(make, {})
    with torch.no_grad():
        model.get_submodule(name).weight[[1, 4]] = 0
    dropped = copy.deepcopy(model)
    with torch.no_grad():
        layer, scaled = dropped.get_submodule(name), dropped.get_submodule(norm)
        for value in (layer.bias, *((scaled.weight, scaled.bias)), scaled.running_mean):
            if value is not None:
                value[[1, 4]] = 0
    wanted = outputs(dropped)
    with pytest.raises(ValueError, match=rf"2 of {norm}\. Call silence_channels first"):
        shrink(model, IMAGES)
    silent = silence_channels(model, IMAGES)
    assert silent == ({norm: 2} if make is Residual else {name: 2, norm: 2})
    assert_same_outputs(outputs(model), wanted)
    assert model.get_submodule(name).weight.shape[0] > 2
    assert silence_channels(model, IMAGES) == {}
    assert shrink(model, IMAGES).removed == {name: 2}
    assert_same_outputs(outputs(model), wanted)


def test_a_bias_before_a_norm_that_is_zero_has_no_effect() -> None:
    zero = {"stem": [1], "norm": [1], "conv2": [1], "norm2": [1]}
    model = made(Residual, zero)
    with torch.no_grad():
        model.stem.bias[1] = 1
    wanted = outputs(model)
    assert shrink(model, IMAGES).removed == {"stem": 1, "conv2": 1}
    assert_same_outputs(outputs(model), wanted)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_running_mean_counts_as_a_constant(mean: float) -> None:
    model = made(Residual, {"conv1": [1]})
    with torch.no_grad():
        model.norm1.bias[1] = 0
        model.norm1.running_mean[1] = mean
    if not mean:
        assert shrink(model, IMAGES).removed == {"conv1": 1}
        return
    with pytest.raises(ValueError, match="constant channels: 1 of norm1"):
        shrink(model, IMAGES)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
def test_an_activation_that_does_not_keep_zero_is_refused(activation: nn.Module) -> None:
    model = made(lambda: layers(activation), {"0": [1]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model must compute the same .* as sigmoid does"):
        shrink(model, IMAGES)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# The optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_buffers_of_the_optimizer_keep_the_entries_that_stay(kind: Any) -> None:
    model = made(Residual, {"conv1": [1, 4], "norm1": [1, 4]})
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for p in (model.conv1.weight, model.norm1.weight, model.norm1.bias):
            p[[1, 4]] = 0
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    assert shrink(model, IMAGES, optimizer).removed == {"conv1": 2}
    left = [0, 2, 3, 5, 6, 7, 8, 9]
    rows = {"conv1.weight": 0, "norm1.weight": 0, "norm1.bias": 0, "conv2.weight": 1}
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert set(optimizer.state) == set(model.parameters())
    for name, p in model.named_parameters():
        for key, value in before[name].items():
            wanted = value.index_select(rows[name], torch.tensor(left)) if (
                name in rows and value.ndim
            ) else value  # fmt: skip
            assert torch.equal(optimizer.state[p][key], wanted), (name, key)
    optimizer.zero_grad()
    model(IMAGES).square().sum().backward()
    optimizer.step()


def test_adasap_continues_on_the_smaller_network() -> None:
    schedule = safe_core.schedules.exponential_sparsity(0.5, steps=2, start=1, every=1)
    method = safe_core.adasap(safe_core.Channel(schedule, scope="tensor"), rho_max=0.5)
    model = made(Residual, {})

    def train(optimizer: SparseOptimizer, steps: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(IMAGES), torch.arange(4))
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    def inner(name: str, p: Tensor) -> bool:
        return name == "conv1.weight"

    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model, where=inner)
    train(optimizer, method.perturbation.start)
    optimizer.finalize()
    with pytest.raises(TypeError, match=r"optimizer must be the base .* optimizer\.base"):
        shrink(model, IMAGES, optimizer)
    silence_channels(model, IMAGES)
    assert shrink(model, IMAGES, base).removed == {"conv1": 5}
    last = safe_core.keep_zeros(rho=2.0, adaptive=True)
    optimizer = SparseOptimizer(base, last, model=model, where=inner)
    assert base.state[model.conv1.weight]["momentum_buffer"].shape == (5, 8, 3, 3)
    with pytest.warns(safe_core.DenseWeightWarning, match=r"no zeros in conv1\.weight"):
        train(optimizer, 2)


# Arguments


def test_arguments_come_as_a_tensor_a_tuple_or_by_name() -> None:
    for inputs in (IMAGES, (IMAGES,), {"x": IMAGES}):
        model = made(Residual, {"conv1": [1], "norm1": [1]})
        model.norm.eval()
        assert shrink(model, inputs).removed == {"conv1": 1}
        assert model.training
        assert not model.norm.training


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, IMAGES), "model must be a torch.nn.Module"),
        ((nn.Linear(2, 2), 3), "example_inputs must be a tensor"),
        ((nn.Linear(2, 2), IMAGES, 3), "optimizer must be a torch.optim.Optimizer"),
        ((made(Branching, {"conv": [0]}), IMAGES), "torch-kirigami can cut: FX capture"),
        ((nn.Linear(2, 2), ({"x": IMAGES * torch.nan},)), r"must hold no NaN, .* \(4, 3, 8, 8\)"),
    ],
)
def test_a_bad_argument_is_named(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        shrink(*arguments)


def test_a_buffer_of_another_shape_is_refused() -> None:
    model = made(Residual, {"conv1": [1], "norm1": [1]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.conv1.weight]["rows"] = torch.ones(10)
    with pytest.raises(ValueError, match=r"got rows of shape \(10,\) for conv1.weight"):
        shrink(model, IMAGES, optimizer)
    assert model.conv1.out_channels == 10


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = made(Residual, {"conv1": [1], "norm1": [1]})
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model, got none"):
        shrink(model, IMAGES, optimizer)
    dense = made(Residual, {})
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model, got none"):
        shrink(dense, IMAGES, optimizer)
    optimizer.add_param_group({"params": [model.conv1.weight]})
    assert shrink(model, IMAGES, optimizer).removed == {"conv1": 1}
    assert optimizer.param_groups[1]["params"][0] is model.conv1.weight


@pytest.mark.parametrize("function", [shrink, silence_channels])
def test_wrong_inputs_are_named(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"example_inputs must be .* got shape \(4, 2, 8, 8\) flo"):
        function(layers(nn.ReLU()).double(), IMAGES[:, :2])


def test_weights_that_are_nan_are_named() -> None:
    model = made(lambda: layers(nn.ReLU()), {"0": [1]})
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model must give numbers for example_inputs, got outputs"):
        shrink(model, IMAGES)


def test_a_result_is_a_short_text() -> None:
    model = made(lambda: layers(nn.ReLU()), {"0": [1, 2], "2": [0]})
    found = shrink(model, IMAGES)
    assert found.parameters == (68, 68 - 2 * (3 + 1 + 4))
    assert str(found).splitlines() == [
        "52 of 68 parameters are left",
        "removed channels: 2 of '0'",
        "kept channels that are zero of '2': they are outputs of the network",
    ]
    assert "no channel was removed" in str(shrink(model, IMAGES))
