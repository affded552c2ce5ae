"""Trainers evaluate and keep the sparse network, and resume from x bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from schedulefree import SGDScheduleFree
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import safe_core
from safe_core.adapters.torch import SparseCallbackMixin, SparseOptimizer, SparseTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

METHOD = safe_core.safe(
    0.75, rho=0.1, penalty=0.1, dual_update_interval=2, importance=safe_core.SquaredGradient()
)
ZEROS = (8 * 16 + 16 * 4) * 3 // 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(48, 8, generator=generator), torch.randn(48, 4, generator=generator)
    )


def optimizer_of(model: nn.Module) -> SparseOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SparseOptimizer(base, METHOD, model=model)


def zeros_of(weights: dict[str, Tensor]) -> int:
    return sum(int((w == 0).sum()) for w in weights.values() if w.ndim == 2)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


# Lightning


class SparseCallback(SparseCallbackMixin, lightning.Callback):
    pass


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        assert zeros_of(self.network.state_dict()) == 0, "training must go on from x"
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen.append(zeros_of(self.network.state_dict()))
        self.log("loss", self.loss(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.validation_step(batch, index)

    def configure_optimizers(self) -> SparseOptimizer:
        return optimizer_of(self.network)


class Watch(lightning.Callback):
    """Remembers x after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def lightning_trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **quiet,
        **options,
    )


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(dataset(), 8), DataLoader(dataset(), 24)


def saver(folder: Path, **options: Any) -> Any:
    options = {"monitor": "loss", "save_top_k": -1, "filename": "{epoch}", **options}
    return lightning.pytorch.callbacks.ModelCheckpoint(folder, **options)


def test_lightning_validates_and_keeps_the_sparse_network(tmp_path: Path) -> None:
    module, watch, best = Module(), Watch(), saver(tmp_path, save_last=True)
    # In this order, so that the order of the list does not matter.
    trainer = lightning_trainer(tmp_path, 3, best, watch, SparseCallback())
    trainer.fit(module, *loaders())
    assert module.seen == [ZEROS] * 8, "two of them before training"
    for epoch, x in enumerate(watch.states):
        path = tmp_path / f"epoch={epoch}.ckpt"
        kept = Module.load_from_checkpoint(path).state_dict()
        assert zeros_of(kept) == ZEROS
        for name, value in kept.items():
            assert torch.equal(value, torch.where(value == 0, value, x[name])), name
    assert zeros_of(module.state_dict()) == ZEROS, "projected after training"
    module.seen.clear()
    trainer.test(module, loaders()[1], ckpt_path="best", verbose=False)
    assert module.seen == [ZEROS] * 2


def test_lightning_trains_the_same_with_the_callback(tmp_path: Path) -> None:
    final = []
    for callbacks in ([], [SparseCallback()]):
        watch = Watch()
        trainer = lightning_trainer(tmp_path, 3, *callbacks, watch, enable_checkpointing=False)
        trainer.fit(Module(), *loaders())
        final.append(watch.states[-1])
    assert_same(*final)


@pytest.mark.parametrize("name", ["epoch=0", "last"])
def test_lightning_resumes_from_x_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = Watch()
    trainer = lightning_trainer(tmp_path, 4, whole, SparseCallback(), enable_checkpointing=False)
    trainer.fit(Module(), *loaders())
    first = lightning_trainer(tmp_path, 2, saver(tmp_path, save_last=True), SparseCallback())
    first.fit(Module(), *loaders())
    resumed, module = Watch(), Module()
    trainer = lightning_trainer(tmp_path, 4, resumed, SparseCallback(), enable_checkpointing=False)
    trainer.fit(module, *loaders(), ckpt_path=tmp_path / f"{name}.ckpt")
    assert_same(resumed.states[-1], whole.states[-1])


def test_lightning_files_of_weights_alone_hold_the_sparse_network(tmp_path: Path) -> None:
    kept = saver(tmp_path, save_weights_only=True)
    lightning_trainer(tmp_path, 1, SparseCallback(), kept).fit(Module(), *loaders())
    found = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert zeros_of(found["state_dict"]) == ZEROS
    assert "optimizer_states" not in found
    assert not [key for key in found if "unprojected" in key]


class Trimmed(Module):
    """Saves only a part of its weights, as modules with a large frozen part do."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["network.0.weight"]


def test_lightning_modules_may_change_what_they_save(tmp_path: Path) -> None:
    module = Trimmed()
    lightning_trainer(tmp_path, 1, SparseCallback(), saver(tmp_path)).fit(module, *loaders())
    found = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert "network.0.weight" not in found["state_dict"]
    assert zeros_of(found["state_dict"]) == int((module.network[3].weight == 0).sum()) > 0
    assert "on_save_checkpoint" not in vars(module), "the module must be left as it was"


class Failing(Module):
    def validation_step(self, batch: Any, index: int) -> None:
        if self.trainer.current_epoch == 1:
            raise RuntimeError("lost data")


def test_lightning_restores_x_after_an_error_in_validation(tmp_path: Path) -> None:
    module = Failing()
    with pytest.raises(RuntimeError, match="lost data"):
        lightning_trainer(tmp_path, 2, SparseCallback(), enable_checkpointing=False).fit(
            module, *loaders()
        )
    assert zeros_of(module.state_dict()) == 0


class Plain(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_without_a_sparse_optimizer_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must return a SparseOptimizer, got SGD"):
        lightning_trainer(tmp_path, 1, SparseCallback(), enable_checkpointing=False).fit(
            Plain(), *loaders()
        )


@pytest.mark.parametrize("first", [True, False])
def test_lightning_callbacks_that_exchange_the_weights_are_named(
    tmp_path: Path, first: bool
) -> None:
    averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.9)
    callbacks = [SparseCallback(), averaging]
    with pytest.raises(ValueError, match="another callback, such as WeightAveraging"):
        lightning_trainer(
            tmp_path, 2, *callbacks[:: 1 if first else -1], enable_checkpointing=False
        ).fit(Module(), *loaders())


class ScheduleFree(Module):
    def configure_optimizers(self) -> SparseOptimizer:
        base = SGDScheduleFree(self.parameters(), lr=0.1)
        return SparseOptimizer(base, METHOD, model=self.network)


def test_lightning_handles_the_modes_of_schedule_free_bases(tmp_path: Path) -> None:
    whole, module = Watch(), ScheduleFree()
    callbacks = [saver(tmp_path), whole, SparseCallback()]
    lightning_trainer(tmp_path, 3, *callbacks).fit(module, *loaders())
    assert module.seen == [ZEROS] * 8
    assert zeros_of(module.state_dict()) == ZEROS
    assert zeros_of(ScheduleFree.load_from_checkpoint(tmp_path / "epoch=1.ckpt").state_dict()) == (
        ZEROS
    )
    resumed = Watch()
    trainer = lightning_trainer(tmp_path, 3, resumed, SparseCallback(), enable_checkpointing=False)
    trainer.fit(ScheduleFree(), *loaders(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(resumed.states[-1], whole.states[-1])


# Hugging Face


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: list[int] = []

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if not self.training:
            self.seen.append(zeros_of(self.network.state_dict()))
        outputs = self.network(inputs)
        return {"loss": nn.functional.mse_loss(outputs, targets), "outputs": outputs}


class SparseTrainer(SparseTrainerMixin, transformers.Trainer):
    pass


class StateAtTheEnd(transformers.TrainerCallback):
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        self.state = {k: v.clone() for k, v in model.state_dict().items()}


def hugging_face_trainer(
    folder: Path, epochs: int, base_of: Any = None, **options: Any
) -> SparseTrainer:
    model = Regression()
    optimizer = optimizer_of(model)
    if base_of is not None:
        optimizer = SparseOptimizer(base_of(model.parameters()), METHOD, model=model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        eval_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        label_names=["targets"],
        **{"save_strategy": "epoch", **options},
    )
    rows = [{"inputs": x, "targets": y} for x, y in dataset()]
    return SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:16],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )


def test_the_hugging_face_trainer_handles_schedule_free_bases(tmp_path: Path) -> None:
    trainer = hugging_face_trainer(
        tmp_path,
        2,
        base_of=lambda params: SGDScheduleFree(params, lr=0.1),
        load_best_model_at_end=True,
        eval_on_start=True,
    )
    trainer.train()
    assert trainer.model.seen == [ZEROS] * 6
    assert zeros_of(trainer.model.state_dict()) == ZEROS
    kept = saved_in(Path(trainer.state.best_model_checkpoint))
    assert_same({k: kept[k] for k in trainer.model.state_dict()}, trainer.model.state_dict())


def saved_in(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_hugging_face_trainer_evaluates_and_saves_the_sparse_network(tmp_path: Path) -> None:
    trainer = hugging_face_trainer(tmp_path, 2, eval_on_start=True)
    trainer.train()
    assert trainer.model.seen == [ZEROS] * 6
    for step in (6, 12):
        kept = saved_in(tmp_path / f"checkpoint-{step}")
        assert zeros_of(kept) == ZEROS
        dense = torch.load(
            tmp_path / f"checkpoint-{step}" / "unprojected_weights.pt", weights_only=True
        )
        assert sorted(dense) == ["network.0.weight", "network.3.weight"]
        assert zeros_of(dense) == 0
    assert_same(
        {k: v for k, v in saved_in(tmp_path / "checkpoint-12").items() if v.ndim == 2},
        {k: v for k, v in trainer.model.state_dict().items() if v.ndim == 2},
    )


def test_the_best_model_is_sparse(tmp_path: Path) -> None:
    trainer = hugging_face_trainer(tmp_path, 3, load_best_model_at_end=True)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert zeros_of(trainer.model.state_dict()) == ZEROS
    kept = saved_in(best)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(kept[name], value)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_the_hugging_face_trainer_resumes_from_x_bit_for_bit(tmp_path: Path) -> None:
    ends = [StateAtTheEnd(), StateAtTheEnd()]
    whole = hugging_face_trainer(tmp_path, 2)
    whole.add_callback(ends[0])
    whole.train()
    resumed = hugging_face_trainer(tmp_path, 2, save_strategy="no")
    resumed.add_callback(ends[1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12
    assert zeros_of(ends[0].state) == 0
    assert_same(ends[1].state, ends[0].state)


def test_a_folder_of_weights_alone_holds_no_more_than_the_sparse_network(tmp_path: Path) -> None:
    hugging_face_trainer(tmp_path, 1, save_only_model=True).train()
    assert zeros_of(saved_in(tmp_path / "checkpoint-6")) == ZEROS
    assert not (tmp_path / "checkpoint-6" / "unprojected_weights.pt").exists()
