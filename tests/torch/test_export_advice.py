"""`advise` measures every form once, says why others are missing, and leaves the model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safe_core
from safe_core.adapters import export_measurements
from safe_core.adapters.torch import advise, save_compressed, save_litert
from safe_core.adapters.torch import export_timing as timing

X = torch.linspace(-1, 1, 3 * 32).sin().reshape(3, 32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Measure nothing twice; return the forms that were timed together."""
    timed: list[list[str]] = []

    def once(
        candidates: Mapping[str, Callable[[], Any]], repeats: int, clock: Any = None
    ) -> dict[str, list[float]]:
        timed.append(list(candidates))
        for run in candidates.values():
            run()
        return {name: [1.0 if "0.9" in name else 2.0] * repeats for name in candidates}

    monkeypatch.setattr(timing, "interleaved", once)
    monkeypatch.setattr("safe_core.litert.trials._SECONDS", 0.0)
    return timed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)


def pruned(sparsity: Any) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.copy_(safe_core.project(model[i].weight, sparsity).values)
    return model


class Unknown(nn.Module):
    """Computes what LiteRT and torch-kirigami cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.layer(x)).real


@pytest.fixture
def without_litert(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(user: str, *packages: str, extra: str) -> None:
        raise ModuleNotFoundError(f'{user} needs ai_edge_litert: pip install "safe-core[{extra}]"')

    monkeypatch.setattr(export_measurements, "require", missing)


def test_every_form_is_measured_and_the_model_stays(quick: list[list[str]]) -> None:
    model, before, threads = network(), network().state_dict(), torch.get_num_threads()
    found = advise(model, X, batch_sizes=[1, 8], sparsities=[0.5, 0.9], repeats=1)
    for name in ("1x4", "1x16", "csr", "bsr", "channels"):
        form = found.form(name)
        assert {batch: list(times) for batch, times in form.seconds.items()} == {
            1: [0.5, 0.9],
            8: [0.5, 0.9],
        }, name
        assert form.reason == ""
        assert list(form.sizes) == [0.5, 0.9]
    for name in ("dense", "litert", "int8"):
        assert [list(times) for times in found.form(name).seconds.values()] == [[0.0], [0.0]]
    if not torch.cuda.is_available():
        assert found.form("2:4").reason == "there is no CUDA GPU"
    # The file holds each of the equal shapes.
    assert found.form("litert").sizes[0.0] > 4 * (2 * 32 * 32 + 4 * 32)
    # All three layers take half of their time at 90%, and two of them fit blocks.
    assert found.form("csr").seconds[1] == {0.5: 2.0, 0.9: 1.0}
    assert found.form("bsr").seconds[1] == {0.5: 2.0, 0.9: pytest.approx(2 - 2 / 3)}
    notes = "\n".join(found.notes)
    assert "layers of equal shapes were measured once" in notes
    # Two layers of 32 x 32 are measured as one, for each batch size; the last one is another.
    layers = [keys for keys in quick if "dense 0.0" in keys]
    square = ["dense 0.0", "csr 0.5", "bsr 0.5", "csr 0.9", "bsr 0.9"]
    assert layers == [square, ["dense 0.0", "csr 0.5", "csr 0.9"]] * 2
    assert model.training
    assert torch.get_num_threads() == threads
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_own_zeros_have_the_sizes_that_exports_write(tmp_path: Path) -> None:
    model = pruned(safe_core.Block((1, 16), 0.75))
    found = advise(model, X[:1], sparsities=[0.9], repeats=1)
    assert found.own == pytest.approx(0.75 * 2048 / 2176)
    saved = save_compressed(model.state_dict(), tmp_path / "model.safetensors")
    assert found.form("csr").sizes["own"] == saved.stored_bytes
    assert found.form("dense").sizes[0.0] == saved.dense_bytes
    for name, weights in (("1x4", "float32"), ("1x16", "int8")):
        path = tmp_path / "model.tflite"
        report = save_litert(model, X[:1], path, weights, compute="sparse", tolerance=1.0)
        assert found.form(name).sizes["own"] == report.size
        assert "own" in found.form(name).seconds[None]
    assert "own zeros" in found.advice[None]
    assert "own 70.6%" in str(found).splitlines()[1]


def test_zeros_that_no_kernel_skips_have_no_time() -> None:
    found = advise(pruned(0.6), X, sparsities=[0.9], forms=["1x16"], repeats=1)
    assert list(found.form("1x16").seconds[None]) == [0.9]
    assert list(found.form("1x16").sizes) == [0.9, "own"]
    assert "its own zeros are not in such blocks" in "\n".join(found.notes)
    assert found.form("csr").reason == "forms= leaves it out"


def test_layers_that_blocks_do_not_fit_are_named() -> None:
    model = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4))
    found = advise(model, X, sparsities=[0.9], forms=["1x4", "1x16", "bsr"], repeats=1)
    note = next(x for x in found.notes if "stay dense" in x)
    assert note.startswith("blocks 1x16 int8, LiteRT: 1 of 2 layers stay dense")
    assert note.endswith("no multiple of 16: 2")
    assert found.form("bsr").reason == "the model has no layer that it fits"
    assert not any("layers of equal shapes" in x for x in found.notes)  # none was measured


def test_convolutions_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(64, 16))
    found = advise(model, torch.ones(2, 4, 10), sparsities=[0.9], forms=["1x4", "csr"], repeats=1)
    notes = "\n".join(found.notes)
    assert "1 of 2 layers stay dense, which are not linear, or whose inputs" in notes
    assert "not of a torch.nn.Linear, or that attention reads itself: 0.weight" in notes
    assert list(found.form("csr").seconds[None]) == [0.9]


def test_what_cannot_be_built_has_its_reason() -> None:
    found = advise(Unknown(), X, sparsities=[0.9], repeats=1)
    for name in ("litert", "int8", "1x4", "1x16"):
        assert "must be able to express every operation, got aten._fft" in found.form(name).reason
        assert not found.form(name).seconds
    assert found.form("channels").reason.startswith("no channels can be removed: ")
    assert "dense int8 was not measured" in found.advice[None]
    assert found.beats_int8_from("csr") is None


@pytest.mark.usefixtures("without_litert")
def test_missing_packages_are_reasons() -> None:
    found = advise(network(), {"input": X}, sparsities=[0.9], forms=["csr", "1x4"], repeats=1)
    assert found.form("1x4").reason.startswith("LiteRT needs ai_edge_litert: pip install")
    assert found.form("csr").seconds[None] == {0.9: 1.0}


@pytest.mark.usefixtures("without_litert")
def test_a_model_in_16_bits_is_measured_in_float32() -> None:
    model = network().bfloat16()
    found = advise(model, X.bfloat16(), sparsities=[0.9], forms=["csr"], repeats=1)
    assert found.form("dense").sizes[0.0] == 2 * advise_size(model)
    assert model[0].weight.dtype == torch.bfloat16


def advise_size(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in model.state_dict().values())


@pytest.mark.usefixtures("without_litert")
def test_inputs_are_repeated_or_cut_to_a_batch_size() -> None:
    seen = set()

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.add(tuple(input[:, 0].tolist()))
            return super().forward(input)

    model = nn.Sequential(nn.Linear(1, 1), Watched(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(1), model[0].bias.zero_()
    advise(model, torch.tensor([[1.0], [2.0]]), batch_sizes=[1, 3], forms=["csr"], repeats=1)
    assert seen == {(1.0,), (1.0, 2.0, 1.0)}


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "text"),
    [
        (("model", X), {}, TypeError, "model must be a torch.nn.Module, got <class 'str'>"),
        ((network(), "text"), {}, TypeError, "example_inputs must be a tensor, a tuple or a map"),
        ((nn.ReLU(), X), {}, ValueError, "model must have weights that can be pruned, got none"),
        ((network(), X), {"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ((network(), X), {"device": "nowhere"}, ValueError, "device must be one of PyTorch, got"),
        ((network(), X), {"device": "meta"}, ValueError, "device must be on the CPU or CUDA, got"),
        (
            (network(), (X, 3)),
            {"batch_sizes": [1]},
            TypeError,
            "example_inputs must hold tensors only for batch_sizes=, got 3",
        ),
        (
            (network(), torch.ones(())),
            {"batch_sizes": [1]},
            ValueError,
            "example_inputs must have samples on their first axes for batch_sizes=, got shape",
        ),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, Any], settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        advise(*copy.deepcopy(arguments), **settings)
