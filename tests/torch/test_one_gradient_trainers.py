"""Methods that take one gradient a step run in trainers without a closure, as in a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from trained_regression import Regression, batches, dataset

import safe_core
from safe_core.adapters.torch import SparseOptimizer, add_low_rank, merge_low_rank, unwrap

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

ELSA = safe_core.elsa(0.75, penalty=0.1, dual_update_interval=2)


def optimizer_of(model: nn.Module, method: safe_core.Method = ELSA) -> SparseOptimizer:
    return SparseOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), method, model=model)


def sparse_model() -> Regression:
    model = Regression()
    with torch.no_grad():
        for layer in (model.network[0], model.network[2]):
            layer.weight[:, ::2] = 0
    return model


def trained_plainly(model: Regression, optimizer: Any) -> None:
    for x, y in batches():
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()


def trained_by_hugging_face(model: Regression, optimizer: Any, folder: Any) -> None:
    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    rows = [{"inputs": x, "targets": y} for x, y in dataset()]
    Ordered(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, constant)
    ).train()


def assert_same(model: nn.Module, wanted: nn.Module) -> None:
    for p, want in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, want)


@pytest.fixture
def wanted() -> Regression:
    """Train with ELSA in a plain loop, and return the model."""
    model = Regression()
    optimizer = optimizer_of(model)
    trained_plainly(model, optimizer)
    optimizer.finalize()
    return model


def test_elsa_in_accelerate(wanted: Regression) -> None:
    accelerator, model = accelerate.Accelerator(cpu=True), Regression()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), batches())
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(x, y)["loss"])
        optimizer.step()
    unwrap(optimizer).finalize()
    assert_same(model, wanted)


@pytest.mark.parametrize("parts", [1, 2])
def test_elsa_in_lightning(wanted: Regression, parts: int) -> None:
    """Accumulation of equal parts is training on the whole, which needs no closure here."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.regression = Regression()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.regression(*batch)["loss"]

        def configure_optimizers(self) -> SparseOptimizer:
            return optimizer_of(self.regression)

        def on_train_end(self) -> None:
            unwrap(self.optimizers()).finalize()

    module = Module()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=parts, **quiet
    )
    trainer.fit(module, DataLoader(dataset(), 8 // parts))
    for p, want in zip(module.regression.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(p == 0, want == 0)


def test_zeros_are_kept_in_the_hugging_face_trainer(tmp_path: Any) -> None:
    model, plain = sparse_model(), sparse_model()
    dense = copy.deepcopy(model)
    optimizer, own = (optimizer_of(each, safe_core.keep_zeros()) for each in (model, plain))
    trained_by_hugging_face(model, optimizer, tmp_path)
    optimizer.finalize()
    trained_plainly(plain, own)
    assert_same(model, plain)
    assert int((model.network[0].weight == 0).sum()) == 16 * 4
    assert not torch.equal(model.network[0].weight, dense.network[0].weight)


def test_a_low_rank_change_is_trained_by_the_hugging_face_trainer(tmp_path: Any) -> None:
    model, plain = sparse_model(), sparse_model()
    for each in (model, plain):
        torch.manual_seed(2)
        add_low_rank(each, rank=2)
    bases = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for each in (model, plain)
    ]
    trained_by_hugging_face(model, bases[0], tmp_path)
    trained_plainly(plain, bases[1])
    for each in (model, plain):
        merge_low_rank(each)
    assert_same(model, plain)
    assert int((model.network[0].weight == 0).sum()) == 16 * 4
    assert not torch.equal(model.network[0].weight, sparse_model().network[0].weight)
