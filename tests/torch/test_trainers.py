"""Lightning, Hugging Face and Accelerate train what a plain loop trains."""

from __future__ import annotations

from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
from torch import nn
from trained_regression import Regression, batches, dataset, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.trainers import SparseTrainerMixin, perturbed, unwrap

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

METHODS = {
    "published": safe_core.safe(0.75, rho=0.1, penalty=0.1, dual_update_interval=2),
    "untuned": safe_core.safe(0.75, steps=6),
}
METHOD = METHODS["published"]


@pytest.fixture(params=METHODS, autouse=True)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by each of the methods."""
    monkeypatch.setitem(globals(), "METHOD", METHODS[request.param])


def optimizer_of(model: nn.Module) -> SparseOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SparseOptimizer(base, METHOD, model=model)


def trained_plainly(parts: int = 1, *, in_16_bits: bool = False) -> list[torch.Tensor]:
    """Six batches, or so many of them together in a step, and the projection."""
    model = network()
    optimizer = optimizer_of(model)
    data = list(batches())
    for i in range(0, len(data), parts):

        def closure(group: Any = data[i : i + parts]) -> torch.Tensor:
            optimizer.zero_grad()
            for x, y in group:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_16_bits):
                    loss = nn.functional.mse_loss(model(x), y) / len(group)
                loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.finalize()
    return [p.detach().clone() for p in model.parameters()]


def assert_trained(model: nn.Module, wanted: list[torch.Tensor], **tolerance: float) -> None:
    for p, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), want, **tolerance)
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2)
    assert zeros == (8 * 16 + 16 * 4) * 3 // 4


# Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, index: int) -> Any:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> SparseOptimizer:
        return optimizer_of(self.network)

    def on_train_end(self) -> None:
        unwrap(self.optimizers()).finalize()


def fit(module: lightning.LightningModule, **options: Any) -> None:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options).fit(module, batches())


def test_lightning_trains_automatically() -> None:
    module = Module()
    fit(module)
    assert_trained(module.network, trained_plainly(), rtol=0, atol=0)


def test_lightning_trains_in_bfloat16() -> None:
    module = Module()
    fit(module, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert_trained(module.network, trained_plainly(in_16_bits=True), rtol=0, atol=0)
    assert not torch.equal(module.network[0].weight, trained_plainly()[0])


def test_lightning_that_accumulates_is_told_so() -> None:
    with pytest.raises(
        ValueError, match=r"closure must clear the gradients .* manual optimization"
    ):
        fit(Module(), accumulate_grad_batches=2)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.waiting: list[Any] = []

    def training_step(self, batch: Any, index: int) -> None:
        self.waiting.append(batch)
        if len(self.waiting) < 2:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in self.waiting:
            self.manual_backward(super().training_step(part, index) / 2)
        with perturbed(optimizer):
            for part in self.waiting:
                self.manual_backward(super().training_step(part, index) / 2)
        optimizer.step()
        self.waiting = []


def test_lightning_accumulates_by_manual_optimization() -> None:
    module = Manual()
    fit(module)
    assert_trained(module.network, trained_plainly(2))


# Hugging Face


class SparseTrainer(SparseTrainerMixin, transformers.Trainer):
    pass


class Ordered(SparseTrainer):
    """Keeps the order of the data, as the plain loop does."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.every_second
@pytest.mark.parametrize("parts", [1, 2])
def test_the_hugging_face_trainer_replays_accumulated_batches(tmp_path: Any, parts: int) -> None:
    model = Regression()
    optimizer = optimizer_of(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=parts,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Ordered(
        model=model,
        args=arguments,
        train_dataset=[{"inputs": x, "targets": y} for x, y in dataset()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.train()
    assert optimizer.steps == 6 // parts
    assert_trained(model, trained_plainly(parts))


def test_a_trainer_with_another_optimizer_is_told_so() -> None:
    with pytest.raises(TypeError, match=r"must be or wrap a SparseOptimizer, got .*SGD"):
        unwrap(torch.optim.SGD(network().parameters(), lr=0.1))


# Accelerate


def test_accelerate_reaches_the_perturbed_phase() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), batches())
    assert not isinstance(optimizer, SparseOptimizer)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(prepared(x), y))
        with perturbed(optimizer):
            accelerator.backward(nn.functional.mse_loss(prepared(x), y))
        optimizer.step()
    unwrap(optimizer).finalize()
    assert_trained(model, trained_plainly())
