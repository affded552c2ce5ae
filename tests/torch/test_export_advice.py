"""`advise` measures every form once, says why others are missing, and leaves the model alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safe_core
from safe_core._installed import install_command
from safe_core.adapters import export_measurements
from safe_core.adapters.torch import (
    SparseOptimizer,
    advise,
    save_compressed,
    save_litert,
    sparse_model,
)
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
    monkeypatch.setattr(sparse_model, "interleaved", once)
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
        raise ModuleNotFoundError(f"{user} needs ai_edge_litert: {install_command(extra)}")

    monkeypatch.setattr(export_measurements, "require", missing)


def test_every_form_is_measured_and_the_model_stays(quick: list[list[str]]) -> None:
    model, before, threads = network(), network().state_dict(), torch.get_num_threads()
    random, parts = torch.get_rng_state(), list[tuple[int, int]]()
    found = advise(
        model,
        X,
        batch_sizes=[1, 8],
        sparsities=[0.5, 0.9],
        repeats=1,
        progress=lambda *part: parts.append(part),
    )
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
    assert "Layers of equal shapes were measured once." in notes
    assert (
        "BSR 16x16: 1 of 3 layers stay dense, because their shape is not a multiple of 16: 4.weight"
        in notes
    )
    assert torch.cuda.is_available() or "2:4: " not in notes  # which was not measured
    assert "channels removed: leave out 4 with where=" in notes
    assert "save_litert of the smaller network may be faster" in notes
    # BSR leaves the last layer dense, CSR does not.
    saved = 4 * 0.9 * 4 * 32 - 4 * 32 / 8
    sizes = [found.form(name).sizes[0.9] for name in ("csr", "bsr")]
    assert sizes[1] - sizes[0] == pytest.approx(saved, abs=4)
    # Two layers of 32 x 32 are measured as one, for each batch size; the last one is another.
    layers = [keys for keys in quick if "dense 0.0" in keys]
    square = ["dense 0.0", "csr 0.5", "bsr 0.5", "csr 0.9", "bsr 0.9"]
    assert layers == [square, ["dense 0.0", "csr 0.5", "csr 0.9"]] * 2
    assert model.training
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert parts == [(done, 7) for done in range(1, 8)]
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
        assert "own" in found.form(name).seconds[1]  # the inputs hold one sample
    assert "own zeros" in found.advice[1]
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
    assert note.endswith("number of inputs is not a multiple of 16: 2")
    assert found.form("bsr").reason == "the model has no layer that it fits"
    assert not any("Layers of equal shapes" in x for x in found.notes)  # none was measured


def test_convolutions_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(64, 16))
    found = advise(model, torch.ones(2, 4, 10), sparsities=[0.9], forms=["1x4", "csr"], repeats=1)
    notes = "\n".join(found.notes)
    assert "1 of 2 layers stay dense, because they are not linear or their number" in notes
    assert "or an attention module reads them directly: 0.weight" in notes
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
    assert "those of the model in float32, instead of bfloat16" in "\n".join(found.notes)
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


@pytest.mark.usefixtures("without_litert")
def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    model[2].weight = model[0].weight
    sizes = advise(model, X, sparsities=[0.9], forms=["csr"], repeats=1).form("csr").sizes
    single = advise(model[0], X, sparsities=[0.9], forms=["csr"], repeats=1).form("csr").sizes
    assert sizes == single


@pytest.mark.usefixtures("without_litert")
@pytest.mark.parametrize("forms", [["bsr"], ["csr"]])
def test_the_advised_pattern_trains_the_model(forms: list[str]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    found = advise(model, X, sparsities=[0.9], forms=forms, repeats=1)
    call = re.search(r"safe_core\.safe\(.*?, steps=\.\.\.\)", found.advice[None])
    assert call is not None, found.advice
    assert ("ragged" in call[0]) == (forms == ["bsr"])
    method = eval(call[0].replace("...", "2"))
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model=model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    with pytest.warns(safe_core.FinalizeWarning, match="the projection removes"):
        optimizer.finalize()
    assert 0 < int((model[0].weight == 0).sum()) < 32 * 32


class Kept(nn.Module):
    """Holds a tensor that cannot be copied, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.last = self.layer.weight.sum()

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.usefixtures("without_litert")
def test_modules_with_other_state_are_measured() -> None:
    found = advise(Kept(), X, sparsities=[0.9], forms=["csr", "channels"], repeats=1)
    assert found.form("dense").sizes[0.0] == 4 * (32 * 32 + 32)
    assert "deepcopy" in found.form("channels").reason
    assert found.form("csr").seconds[None] == {0.9: 1.0}
    with pytest.raises(ValueError, match="model must be one that can be copied, to run in float32"):
        advise(Kept().double(), X, sparsities=[0.9], forms=["csr"], repeats=1)


@pytest.mark.usefixtures("without_litert")
def test_few_zeros_of_its_own_have_a_size_alone(tmp_path: Path) -> None:
    model = pruned(0.4)
    found = advise(model, X, sparsities=[0.9], forms=["csr", "bsr"], repeats=1)
    size = save_compressed(model.state_dict(), tmp_path / "model.safetensors").stored_bytes
    for name in ("csr", "bsr"):
        assert list(found.form(name).seconds[None]) == [0.9]
        assert found.form(name).sizes["own"] == size
    assert "2 of 2 layers have fewer than half zeros, so they are not timed" in str(found.notes)
    assert "its own zeros were not timed; save_compressed makes the file" in found.advice[None]
    alone = advise(model, X, sparsities=[0.9], forms=["1x4"], repeats=1)
    assert "save_compressed makes the file" in alone.advice[None]


@pytest.mark.usefixtures("without_litert")
def test_blocks_that_are_too_full_are_noted() -> None:
    found = advise(network(), X, sparsities=[0.25, 0.9], forms=["bsr"], repeats=1)
    assert list(found.form("bsr").seconds[None]) == [0.9]
    assert found.form("bsr").reason == ""
    note = next(x for x in found.notes if "was not measured" in x)
    assert note.startswith(
        "BSR 16x16, PyTorch was not measured for 25% zeros in a layer of 32 inputs, 32 outputs: "
    )


def test_layers_are_timed_in_their_own_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    shapes = timing._Shapes(model, lambda m: m[1](m[0](X[:, :4]).double()))
    assert [call.dtype for call in shapes.calls] == [torch.float32, torch.float64]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device must be available, got 'cuda' and no CUDA GPU"):
        advise(network(), X, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "text"),
    [
        (("model", X), {}, TypeError, "model must be a torch.nn.Module, got <class 'str'>"),
        ((network(), "text"), {}, TypeError, "example_inputs must be a tensor, a tuple or a map"),
        ((nn.ReLU(), X), {}, ValueError, "model must have weights that can be pruned, got none"),
        ((network(), X), {"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ((network(), X), {"device": "nowhere"}, ValueError, "device must be one of PyTorch, got"),
        (
            (network(), X[:, :8]),
            {},
            ValueError,
            "model must take example_inputs, got RuntimeError: mat",
        ),
        ((network(), X), {"device": "meta"}, ValueError, "device must be on the CPU or CUDA, got"),
        (
            (network(), (X, 3)),
            {"batch_sizes": [1]},
            TypeError,
            "example_inputs must be arrays with samples on their first axes for batch_sizes=, got",
        ),
        (
            (network(), torch.ones(())),
            {"batch_sizes": [1]},
            ValueError,
            "example_inputs must be arrays with samples on their first axes for batch_sizes=, got",
        ),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, Any], settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        advise(*copy.deepcopy(arguments), **settings)
