"""Every optimizer of torch, with every setting that torch's own tests try, as a base."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer

BASES = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
)
# Leave out the base class, the optimizer that needs a closure, and the one for sparse gradients.
BASES = [name for name in BASES if name not in ("Optimizer", "LBFGS", "SparseAdam")]


def settings_of(name: str) -> list[dict[str, Any]]:
    """Return the settings that the tests of torch try."""
    # Importing them takes seconds, which only the process that runs these tests should pay.
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = (info for info in optim_db if info.optim_cls.__name__ == name)
    found = [given.kwargs for given in info.optim_inputs_func(device="cpu")]
    assert found
    return found


class Run:
    """A small network, trained by a base alone or with a method around it."""

    def __init__(self, name: str, settings: dict[str, Any], method: Any = None) -> None:
        torch.manual_seed(0)
        matrices = name == "Muon"  # which takes nothing else
        self.model = nn.Sequential(
            nn.Linear(6, 8, bias=not matrices), nn.Tanh(), nn.Linear(8, 4, bias=not matrices)
        )
        self.optimizer = getattr(torch.optim, name)(
            self.model.parameters(), **copy.deepcopy(settings)
        )
        if method is not None:
            self.optimizer = SparseOptimizer(self.optimizer, method, model=self.model)
        self.data = torch.randn(16, 6), torch.randn(16, 4)

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.data[0]), self.data[1])
        loss.backward()
        return loss

    def train(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return [p.detach().clone() for p in self.model.parameters()]


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor], settings: Any) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), settings


@pytest.mark.parametrize("name", BASES)
def test_a_method_that_asks_nothing_leaves_a_base_as_it_is(name: str) -> None:
    for settings in settings_of(name):
        wrapped = Run(name, settings, safe_core.admm(0.5, penalty=0.0, dual_update_interval=2))
        assert_same_bits(wrapped.train(4), Run(name, settings).train(4), settings)


@short_run
@pytest.mark.parametrize("name", BASES)
def test_every_base_ends_sparse_and_resumes(name: str) -> None:
    method = safe_core.safe(0.5, rho=0.05, penalty=0.1, dual_update_interval=2)
    for settings in settings_of(name):
        run, resumed = Run(name, settings, method), Run(name, settings, method)
        run.train(3)
        file = io.BytesIO()
        torch.save([run.model.state_dict(), run.optimizer.state_dict()], file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=True)
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(optimizer)
        assert_same_bits(resumed.train(3), run.train(3), settings)
        run.optimizer.finalize()
        weights = run.optimizer.sparse_parameters().values()
        zeros = sum(int((w == 0).sum()) for w in weights)
        assert zeros == sum(w.numel() for w in weights) // 2, settings
