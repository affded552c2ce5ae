"""Tensors of PyTorch come back from compressed files bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safe_core.adapters.torch import load_compressed, save_compressed
from safe_core.adapters.torch.compressed import _DTYPES


@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=str)
def test_every_dtype_and_stride_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bits = torch.randint(1, 256, (6, 10 * dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        bits.clamp_(max=1)
    w = bits.view(dtype).clone()
    w.view(torch.uint8)[torch.rand(6) < 0.7] = 0
    state = {"w": w, "turned": w.T, "scalar": w[0, 0], "empty": w[:0]}
    save_compressed(state, tmp_path / "m.safetensors")
    found = load_compressed(str(tmp_path / "m.safetensors"))
    for name, x in state.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], x))
        assert torch.equal(a, b), name


def test_negative_zero_and_nan_payloads_are_kept(tmp_path: Path) -> None:
    w = torch.zeros(64)
    w.view(torch.int32)[:3] = torch.tensor([-(2**31), 0x7FC00001, -1], dtype=torch.int32)
    saved = save_compressed({"w": w}, tmp_path / "m.safetensors")
    assert saved.forms == {"w": "bitmask"}
    found = load_compressed(tmp_path / "m.safetensors")["w"]
    assert torch.equal(found.view(torch.int32), w.view(torch.int32))


def test_a_state_dict_loads_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    model[1].weight = model[0].weight
    saved = save_compressed(model.state_dict(), tmp_path / "m.safetensors", max_shard_size=1)
    assert saved.forms["1.weight"] == "same as 0.weight"
    found = load_compressed(tmp_path)
    assert found["1.weight"].data_ptr() == found["0.weight"].data_ptr()
    other = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    other.load_state_dict(found)
    assert torch.equal(other[1].weight, model[1].weight)
    assert load_compressed(tmp_path, device="meta")["1.bias"].is_meta


def test_a_module_is_saved_as_its_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save_compressed(model, tmp_path / "m.safetensors")
    found = load_compressed(tmp_path / "m.safetensors")
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], model.weight)


def test_other_files_are_named_with_what_loads_them(tmp_path: Path) -> None:
    state, path = torch.nn.Linear(3, 2).state_dict(), tmp_path / "m.pt"
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"m\.pt is a PyTorch checkpoint; .*torch\.load"):
            load_compressed(path)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"which is not compressed; load it with load_file of sa"):
        load_compressed(path)
    with pytest.raises(FileNotFoundError, match="path must be an existing file or folder, got"):
        load_compressed(tmp_path / "nowhere.safetensors")
    np.savez(tmp_path / "m.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"m\.npz must be a complete safetensors file"):
        load_compressed(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (3, "state_dict must be a mapping of names to tensors, or a torch.nn.Module, got <cl"),
        ({3: torch.ones(2)}, "state_dict must have names as keys, got 3"),
        ({"w": 3.0}, "state_dict must hold dense tensors, got <class 'float'> for w"),
        ({"w": torch.eye(2).to_sparse()}, "state_dict must hold dense tensors"),
        ({"w": torch.ones(2, device="meta")}, "state_dict must hold dense tensors"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "one of safetensors files, got torch.com"),
    ],
)
def test_other_values_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        save_compressed(state, tmp_path / "m.safetensors")
