"""ELSA reads and masks the states of a base that keeps them in 8 bits.

Small stand-ins have the two known structures. The libraries themselves run in the session
``eight_bit`` of nox, which installs them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import safe_core
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.low_bit import mask_states, read_state

METHOD = safe_core.elsa(
    0.6, penalty=0.3, dual_update_interval=3, state_dtype="bfloat16", packed_support=True
)


class Rounded(Tensor):
    """A tensor of multiples of a scale, of which only `copy_` and `dequantize` work."""

    codes: Tensor
    scale: float

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> Rounded:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["codes"], self.scale

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, scale: float, *_: Any) -> Rounded:
        return cls(inner["codes"], scale)

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target, *rest = args
        if func is torch.ops.aten.copy_.default and isinstance(target, Rounded):
            (source,) = tree_map(lambda x: x.dequantize() if isinstance(x, Rounded) else x, rest)
            target.codes.copy_((source / target.scale).round().to(target.codes.dtype))
            return target
        if func is torch.ops.aten.detach.default:
            return cls(target.codes, target.scale)
        raise NotImplementedError(func)


def test_a_subclass_is_read_and_masked_by_its_own_operations() -> None:
    held = {"step": 3, "exp_avg_sq": Rounded(torch.tensor([4, 5, 6], dtype=torch.uint8), 0.5)}
    assert read_state(held, "exp_avg_sq").tolist() == [2, 2.5, 3]
    mask_states(held, torch.tensor([True, False, True]))
    assert held["exp_avg_sq"].codes.tolist() == [4, 0, 6]


def test_codes_are_read_by_block_and_masked_by_the_code_of_zero() -> None:
    codebook = torch.tensor([-1.0, 0.0, 0.25, 1.0])
    codes = torch.randint(0, 4, (3, 100), generator=torch.Generator().manual_seed(0)).byte()
    scales = torch.tensor([2.0, 3.0])  # blocks of 256 and of 44
    held = {"step": 3, "state2": codes, "qmap2": codebook, "absmax2": scales}
    factors = torch.where(torch.arange(300) < 256, 2.0, 3.0)
    wanted = (codebook[codes.flatten().long()] * factors).reshape(3, 100)
    assert torch.equal(read_state(held, "state2"), wanted)
    mask = torch.arange(300).reshape(3, 100) % 2 == 0
    mask_states(held, mask)
    assert torch.equal(read_state(held, "state2"), torch.where(mask, wanted, 0))


def test_codes_without_a_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match=r"base must keep second moments .* torch.uint8 in 'sta"):
        read_state({"state2": torch.zeros(2, dtype=torch.uint8)}, "state2")


class RoundedAdam(torch.optim.Adam):
    """Adam that rounds its second moments between steps."""

    def step(self, closure: Any = None) -> Any:
        for held in self.state.values():
            held["exp_avg_sq"] = held["exp_avg_sq"].dequantize()
        found = super().step(closure)
        for held in self.state.values():
            v = held["exp_avg_sq"]
            scale = float(v.max()) / 2**20
            held["exp_avg_sq"] = Rounded((v / scale).round().to(torch.int32), scale)
        return found


def parts(make: Any, **options: Any) -> tuple[nn.Module, SparseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    base = make(model.parameters(), lr=3e-3, betas=(0.9, 0.95), **options)
    return model, SparseOptimizer(base, METHOD, model=model)


def train(model: nn.Module, optimizer: SparseOptimizer, steps: range) -> None:
    for t in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def check_against_adam(model: nn.Module, optimizer: SparseOptimizer, first: int) -> None:
    """Train on from step ``first``; keep about the weights that float32 keeps, then freeze."""
    exact = parts(torch.optim.Adam)
    train(*exact, range(60))
    train(model, optimizer, range(first, 60))
    pairs = zip(optimizer.split().support, exact[1].split().support, strict=True)
    assert all((a == b).float().mean() > 0.85 for a, b in pairs)
    optimizer.finalize(freeze=True)
    train(model, optimizer, range(60, 63))
    optimizer.check_sparsity()


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
def test_elsa_prunes_with_a_base_that_rounds_its_second_moments() -> None:
    model, optimizer = parts(RoundedAdam)
    train(model, optimizer, range(6))
    weight = model[0].weight
    moments = optimizer.base.state[weight]["exp_avg_sq"]
    assert isinstance(moments, Rounded)
    assert torch.equal(optimizer.state[weight]["importance"], moments.dequantize())
    check_against_adam(model, optimizer, 6)


# The libraries


def nbytes(x: Any) -> int:
    """Return the bytes of a state without its codebook of 256 numbers and its step."""
    if hasattr(x, "codes"):
        return x.codes.nbytes + x.scale.nbytes
    return x.nbytes if torch.is_tensor(x) and x.shape not in ((), (256,)) else 0


LIBRARIES = [
    ("torchao", "AdamW8bit", {"weight_decay": 0.0}),
    ("bitsandbytes", "AdamW8bit", {"weight_decay": 0.0, "min_8bit_size": 1024}),
]


@pytest.fixture
def eager() -> Iterator[None]:
    """Run the compiled step of torchao as it is, which is the same on so few weights."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.long  # `nox -s eight_bit` installs the libraries
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("library", "name", "options"), LIBRARIES)
def test_elsa_prunes_and_resumes_with_a_library(
    library: str, name: str, options: dict[str, Any]
) -> None:
    with warnings.catch_warnings(action="ignore"):
        optim = pytest.importorskip(f"{library}.optim", reason="nox -s eight_bit installs it")
    make = getattr(optim, name)
    model, optimizer = parts(make, **options)
    train(model, optimizer, range(7))
    held = optimizer.base.state[model[0].weight]
    sizes = {x.dtype for x in held.values() if torch.is_tensor(x) and x.shape == (96, 64)}
    assert torch.uint8 in sizes or hasattr(held["exp_avg_sq"], "codes")
    # A byte for each moment, and a float32 scale for each block of 256; codebooks are shared.
    assert sum(map(nbytes, held.values())) == 96 * 64 * (2 + 2 * 4 / 256)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    again, second = parts(make, **options)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    for each in ((model, optimizer), (again, second)):
        train(*each, range(7, 12))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    check_against_adam(model, optimizer, 12)
