"""Linear layers whose weights are stored without their zeros, for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SparseLinear", "quiet_beta", "sparse_forms"]

_BLOCKS = (4, 8, 16, 32)
_FULLEST = 0.5  # the largest fraction of blocks that hold non-zeros


class SparseLinear(nn.Module):
    """A linear layer with a weight in CSR, BSR or 2:4, which computes as the dense one does.

    Its ``state_dict`` holds the dense weight. It cannot be trained, and loads no state.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # named as that of torch.nn.Linear
        """Return ``input @ weight.T + bias``."""
        if self.weight.layout == torch.strided:  # 2:4
            return functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        if len(rows) == 1:
            y = torch.mv(self.weight, rows[0])[None]
        else:
            # Models take views of outputs, which must be contiguous for that.
            y = (self.weight @ rows.T).T.contiguous()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*input.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        errors.append(
            f"{prefix.rstrip('.')} must be loaded as a dense layer, got a sparse one: load the "
            "model that was given to sparse_modules, and call it again"
        )

    def extra_repr(self) -> str:
        """Return what the representation of the module shows."""
        kind = str(self.weight.layout).removeprefix("torch.sparse_").removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


def sparse_forms(layer: nn.Linear) -> Iterator[tuple[str, Callable[[], SparseLinear]]]:
    """Yield the forms that fit the zeros of a layer, and functions that make them.

    Such a function can raise a RuntimeError, where PyTorch does not support the form.
    """
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if weight.device.type == "cuda":
        if _is_2_of_4(weight):
            yield "2:4", lambda: SparseLinear(torch.sparse.to_sparse_semi_structured(weight), bias)
        return
    yield "CSR", lambda: SparseLinear(_with_short_indices(weight.to_sparse_csr()), bias)
    for size in _BLOCKS:
        if _filled(weight, size) <= _FULLEST:
            yield (
                f"BSR {size}x{size}",
                lambda size=size: SparseLinear(  # type: ignore[misc]
                    _with_short_indices(weight.to_sparse_bsr((size, size))), bias
                ),
            )


def _filled(weight: Tensor, size: int) -> float:
    """Return the fraction of square blocks that hold non-zeros; 1 if they do not fit."""
    rows, columns = weight.shape
    if rows % size or columns % size:
        return 1.0
    blocks = (weight != 0).reshape(rows // size, size, columns // size, size)
    return float(blocks.any(3).any(1).float().mean())


def _is_2_of_4(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def _with_short_indices(matrix: Tensor) -> Tensor:
    """Return a matrix with indices of 32 bits, which kernels read faster."""
    make = torch.sparse_csr_tensor if matrix.layout == torch.sparse_csr else torch.sparse_bsr_tensor
    indices = matrix.crow_indices().int(), matrix.col_indices().int()
    return make(*indices, matrix.values(), size=matrix.shape, check_invariants=False)


@contextmanager
def quiet_beta() -> Iterator[None]:
    """Ignore that torch calls its sparse tensors a beta feature and a prototype."""
    with warnings.catch_warnings():
        for text in ("Sparse CSR tensor support", "Sparse BSR tensor support",
                     "The PyTorch API of SparseSemiStructuredTensor"):  # fmt: skip
            warnings.filterwarnings("ignore", text, UserWarning)
        yield
