"""Every optimizer of torch, with every setting that torch's own tests try, as a base."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

import safe_core
from safe_core.adapters.torch import SparseOptimizer

BASES = [info for info in optim_db if not info.step_requires_closure]
BASES = [info for info in BASES if not info.only_supports_sparse_grads]
SETTINGS = [
    pytest.param(info, given.kwargs, id=f"{info.optim_cls.__name__}-{i}")
    for info in BASES
    for i, given in enumerate(info.optim_inputs_func(device="cpu"))
]


class Run:
    """A small network, trained by a base alone or with a method around it."""

    def __init__(self, info: OptimizerInfo, settings: dict[str, Any], method: Any = None) -> None:
        torch.manual_seed(0)
        matrices = info.optim_cls is torch.optim.Muon  # which takes nothing else
        self.model = nn.Sequential(
            nn.Linear(6, 8, bias=not matrices), nn.Tanh(), nn.Linear(8, 4, bias=not matrices)
        )
        self.optimizer = info.optim_cls(self.model.parameters(), **copy.deepcopy(settings))
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


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("info", "settings"), SETTINGS)
def test_a_method_that_asks_nothing_leaves_a_base_as_it_is(
    info: OptimizerInfo, settings: dict[str, Any]
) -> None:
    wrapped = Run(info, settings, safe_core.admm(0.5, penalty=0.0, dual_update_interval=2))
    assert_same_bits(wrapped.train(4), Run(info, settings).train(4))


@short_run
@pytest.mark.parametrize(("info", "settings"), SETTINGS)
def test_every_base_ends_sparse_and_resumes(info: OptimizerInfo, settings: dict[str, Any]) -> None:
    method = safe_core.safe(0.5, rho=0.05, penalty=0.1, dual_update_interval=2)
    run, resumed = Run(info, settings, method), Run(info, settings, method)
    run.train(3)
    file = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    assert_same_bits(resumed.train(3), run.train(3))
    run.optimizer.finalize()
    weights = run.optimizer.sparse_parameters().values()
    assert sum(int((w == 0).sum()) for w in weights) == sum(w.numel() for w in weights) // 2


def test_no_optimizer_of_torch_is_left_out() -> None:
    names = {info.optim_cls.__name__ for info in optim_db} - {"LBFGS", "SparseAdam"}
    assert names == {info.optim_cls.__name__ for info in BASES}
    public = {
        name
        for name, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    }
    assert names == public - {"Optimizer", "LBFGS", "SparseAdam"}
