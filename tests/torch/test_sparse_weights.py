"""`SparseOptimizer.sparse_weights` shows the network that `finalize` would make, and x returns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import Tensor, nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def optimizer_of(model: nn.Module, method: Any = None, **options: Any) -> SparseOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = method or safe_core.safe(0.75, rho=0.1, penalty=0.1, dual_update_interval=2)
    return SparseOptimizer(base, method, model=model, **options)


def closure_of(model: nn.Module, optimizer: SparseOptimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: SparseOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer))


def copies(tensors: Iterator[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def assert_same_bits(got: Iterator[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b)


def finalized(model: nn.Module, optimizer: SparseOptimizer) -> list[Tensor]:
    """Return what `finalize` makes of a copy."""
    twin, own = copy.deepcopy((model, optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", safe_core.FinalizeWarning)  # sparse_weights gives none
        own.finalize()
    return copies(twin.parameters())


METHODS = {
    "safe": None,
    "importance": safe_core.safe(
        0.75, rho=0.1, penalty=0.1, dual_update_interval=2, importance=safe_core.SquaredGradient()
    ),
    "groups of two": safe_core.admm("1:2", penalty=0.1, dual_update_interval=2),
    "a rising sparsity": safe_core.gmp(safe_core.schedules.cubic(0.75, steps=9)),
    "sparse at the end": safe_core.magnitude(0.75),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("steps", [0, 5])
def test_the_block_shows_what_finalize_would_make(method: Any, steps: int) -> None:
    model = network()
    optimizer = optimizer_of(model, method)
    train(model, optimizer, steps)
    x, wanted = copies(model.parameters()), finalized(model, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(x, wanted, strict=True))
    with optimizer.sparse_weights():
        assert_same_bits(model.parameters(), wanted)
        optimizer.check_sparsity()
    assert_same_bits(model.parameters(), x)


def test_training_goes_on_as_if_the_block_had_not_been() -> None:
    models = network(), network()
    looking, plain = (optimizer_of(model) for model in models)
    for _ in range(5):
        for model, optimizer in zip(models, (looking, plain), strict=True):
            train(model, optimizer, 1)
        with looking.sparse_weights(), torch.inference_mode():
            models[0].eval()
            models[0](X)
        models[0].train()
    assert_same_bits(models[0].parameters(), copies(models[1].parameters()))
    assert_same_bits(models[0].buffers(), copies(models[1].buffers()))
    assert_same_bits(iter(looking.split().anchor), plain.split().anchor)


def test_looking_before_the_first_step_does_not_fix_where_z_starts() -> None:
    model, other = network(), network()
    optimizer = optimizer_of(model)
    with optimizer.sparse_weights():
        first = optimizer.split()
    assert_same_bits(iter(first.anchor), optimizer.split().anchor)
    with torch.no_grad():
        for p in [*model.parameters(), *other.parameters()]:
            p.mul_(2).add_(0.01)
    wanted = optimizer_of(other).split()
    train(model, optimizer, 0)
    assert_same_bits(iter(optimizer.split().anchor), wanted.anchor)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_x_returns_after_an_error(error: type[BaseException]) -> None:
    model = network()
    optimizer = optimizer_of(model)
    x = copies(model.parameters())

    with pytest.raises(error), optimizer.sparse_weights():
        raise error
    assert_same_bits(model.parameters(), x)
    train(model, optimizer, 1)


def test_signs_of_zeros_and_storages_return() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0] = -0.0
    optimizer = optimizer_of(model)
    view, place, x = (
        model[0].weight.view(-1),
        model[0].weight.data_ptr(),
        copies(model.parameters()),
    )
    with optimizer.sparse_weights():
        assert model[0].weight.data_ptr() == place
        assert torch.equal(view, model[0].weight.view(-1))
    assert_same_bits(model.parameters(), x)


@short_run
def test_a_block_in_inference_mode_leaves_tensors_that_train() -> None:
    """Lightning checks the validation in inference mode before the first step."""
    model = network()
    optimizer = optimizer_of(model)
    with torch.inference_mode(), optimizer.sparse_weights():
        model(X)
    train(model, optimizer, 4)
    with torch.inference_mode(), optimizer.sparse_weights():
        model(X)
    train(model, optimizer, 4)
    optimizer.finalize()


@short_run
def test_a_frozen_support_is_the_mask() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    optimizer.finalize(freeze=True)
    train(model, optimizer, 2)
    x = copies(model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)  # an edit fills zeros
    with optimizer.sparse_weights():
        assert torch.equal(model[0].weight == 0, x[0] == 0)


def test_tied_weights_are_projected_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    optimizer = optimizer_of(model)
    x = copies(model.parameters())
    with optimizer.sparse_weights():
        assert model[0].weight is model[2].weight
        assert sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2) == 45
    assert_same_bits(model.parameters(), x)


def test_parameters_that_are_frozen_now_are_shown_as_finalize_makes_them() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    model.requires_grad_(False)
    wanted, x = finalized(model, optimizer), copies(model.parameters())
    with optimizer.sparse_weights():
        assert_same_bits(model.parameters(), wanted)
    assert_same_bits(model.parameters(), x)


def test_a_compiled_module_sees_the_sparse_weights() -> None:
    model = network()
    optimizer = optimizer_of(model)
    compiled = torch.compile(model, backend="eager")
    model.eval()
    dense = compiled(X)
    with optimizer.sparse_weights():
        assert torch.equal(compiled(X), model(X))
        assert not torch.equal(compiled(X), dense)
    assert torch.equal(compiled(X), dense)


def test_autocast_does_not_keep_the_casts_of_another_point() -> None:
    model = network()
    optimizer = optimizer_of(model)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        dense = model(X)
        with optimizer.sparse_weights():
            assert not torch.equal(model(X), dense)
        assert torch.equal(model(X), dense)


def test_a_state_dict_inside_is_that_of_the_sparse_network_if_cloned() -> None:
    model = network()
    optimizer = optimizer_of(model)
    wanted = finalized(model, optimizer)
    with optimizer.sparse_weights():
        kept = {key: value.clone() for key, value in model.state_dict().items()}
    twin = network()
    twin.load_state_dict(kept)
    assert_same_bits(twin.parameters(), wanted)


CALLS: dict[str, Callable[[nn.Module, SparseOptimizer], Any]] = {
    "step": lambda model, optimizer: optimizer.step(closure_of(model, optimizer)),
    "finalize": lambda model, optimizer: optimizer.finalize(),
    "state_dict": lambda model, optimizer: optimizer.state_dict(),
    "load_state_dict": lambda model, optimizer: optimizer.load_state_dict({}),
    "report": lambda model, optimizer: optimizer.report(),
    "a copy": lambda model, optimizer: copy.deepcopy(optimizer),
    "perturbed": lambda model, optimizer: optimizer.perturbed().__enter__(),
    "sparse_weights": lambda model, optimizer: optimizer.sparse_weights().__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_reads_or_moves_x_is_refused_inside(name: str) -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    nn.functional.cross_entropy(model(X), Y).backward()
    x = copies(model.parameters())
    with optimizer.sparse_weights(), pytest.raises(ValueError, match=r"sparse_weights\(\)"):
        CALLS[name](model, optimizer)
    assert_same_bits(model.parameters(), x)


def test_the_block_is_refused_within_the_others() -> None:
    model = network()
    method = safe_core.safe(0.75, rho=0.1, penalty=0.1, projected_gradient=True)
    optimizer = optimizer_of(model, method)
    nn.functional.cross_entropy(model(X), Y).backward()
    for block in (optimizer.perturbed, optimizer.projected):
        with block():
            with pytest.raises(ValueError, match=r"sparse_weights\(\) must come after the"):
                optimizer.sparse_weights().__enter__()
            nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_between_the_passes_of_a_step_the_block_changes_nothing() -> None:
    models = network(), network()
    for model, looks in zip(models, (True, False), strict=True):
        optimizer = optimizer_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            with optimizer.perturbed():
                nn.functional.cross_entropy(model(X), Y).backward()
            if looks:
                with optimizer.sparse_weights():
                    pass
            optimizer.step()
    assert_same_bits(models[0].parameters(), copies(models[1].parameters()))


def test_weights_that_were_loaded_inside_are_an_error_and_not_lost_in_silence() -> None:
    model = network()
    optimizer = optimizer_of(model)
    x = copies(model.parameters())
    with (
        pytest.raises(ValueError, match=r"must not change within sparse_weights.* 0\.weight, 3\."),
        optimizer.sparse_weights(),
    ):
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert_same_bits((p for p in model.parameters() if p.ndim == 2), [p for p in x if p.ndim == 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = network()
    optimizer = optimizer_of(model)
    with torch.no_grad():
        model[3].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in 3\.weight"):
        optimizer.sparse_weights().__enter__()
