"""Tokens are compared with the vocabulary of models that have one, and with that of no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from safe_core.adapters.torch.blocks.calibration import check_token_axes, check_tokens
from safe_core.adapters.transformers import prune_blocks


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


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_token_ids_without_an_axis_of_samples_are_refused(named: bool, whole: bool) -> None:
    ids = torch.arange(3)
    batch: Any = {"input_ids": ids} if named else ids
    model = Model(torch.nn.Embedding(4, 2))
    message = r"of shape \(samples, tokens\), got shape \(3,\): .* by ids\[None\]"
    with pytest.raises(ValueError, match=message):
        prune_blocks(model, batch if whole else [batch], "magnitude", 0.5)


def encoded(**inputs: Any) -> BatchEncoding:
    """Return what a fast tokenizer returns: it takes a key that is no text for a position."""
    return BatchEncoding(inputs, encoding=[None], n_sequences=1)


def test_the_output_of_a_tokenizer_is_a_batch() -> None:
    model = Model(torch.nn.Embedding(4, 2))
    check_token_axes(model, [encoded(input_ids=torch.tensor([[0, 1], [2, 0]]))])
    check_token_axes(model, encoded(pixels=torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"got shape \(2,\): add the axis of samples"):
        check_token_axes(model, encoded(input_ids=torch.ones(2).long()))
