"""Tokens are compared with the vocabulary of models that have one, and with that of no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safe_core.adapters.torch.blocks.calibration import check_tokens


class Model(torch.nn.Module):
    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings

    def get_input_embeddings(self) -> Any:
        if isinstance(self.embeddings, type):
            raise self.embeddings("none here")
        return self.embeddings


@pytest.mark.parametrize(
    "embeddings",
    [None, NotImplementedError, AttributeError, torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(2, 2)],
)
def test_models_without_a_vocabulary_pass(embeddings: Any) -> None:
    check_tokens(Model(embeddings), [{"input_ids": torch.tensor([[10**6]])}])


def test_models_with_one_are_checked() -> None:
    with pytest.raises(ValueError, match="below 4, got 4 in sample 0"):
        check_tokens(Model(torch.nn.Embedding(4, 2)), [{None: torch.tensor([[3, 4]])}])
    check_tokens(torch.nn.Linear(2, 2), [{None: torch.tensor([[3, 4]])}])
