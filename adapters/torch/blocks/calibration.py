"""Calibration samples: windows of text, or any inputs of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_core import _checks

__all__ = ["calibration_batches", "drawn_windows", "joined_tokens", "overlap", "split_samples"]


def calibration_batches(
    tokenizer: Any,
    texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> Tensor:
    """Return random windows of text as inputs of a language model, all of one length.

    The texts are tokenized, joined, and cut at random, distinct positions. Windows may overlap.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Or any function of a text that returns a mapping with ``"input_ids"``.
    texts : str, path, or iterable of them
        A path, of type `pathlib.Path`, is read as UTF-8; a str is text.
    samples, length : int
        Number of windows, and tokens in each. The paper uses 128 windows of 2048 tokens.
    seed : int

    Returns
    -------
    int64 tensor, shape (samples, length)

    Raises
    ------
    TypeError, ValueError
        If the texts are too short for so many distinct windows, are of another kind, or are the
        name of an existing file as a str.

    Warns
    -----
    UserWarning
        If the texts hold fewer tokens than the windows, which then repeat them.

    References
    ----------
    Lee et al. 2025, appendix B.4; Frantar and Alistarh 2023, "SparseGPT".

    Examples
    --------
    >>> letters = lambda text, **options: {"input_ids": [ord(c) - 97 for c in text]}
    >>> calibration_batches(letters, ["abcdef", "ghijkl"], samples=2, length=4)
    tensor([[ 8,  9, 10, 11],
            [ 0,  1,  2,  3]])
    """
    _checks.integer("samples", samples, low=1)
    _checks.integer("length", length, low=1)
    tokens = joined_tokens(tokenizer, texts)
    windows = drawn_windows(tokens, samples, length, seed)
    if note := overlap(len(tokens), samples, length):
        warnings.warn(note, stacklevel=2)
    return windows


def joined_tokens(tokenizer: Any, texts: Any) -> Tensor:
    """Return the tokens of texts for `calibration_batches`, one after the other.

    Examples
    --------
    >>> joined_tokens(lambda text, **options: {"input_ids": [ord(c) for c in text]}, ["ab", "c"])
    tensor([97, 98, 99])
    """
    given = [texts] if isinstance(texts, (str, os.PathLike)) else texts
    tokens = [token for text in given for token in _tokens(tokenizer, text)]
    return torch.tensor(tokens, dtype=torch.int64)


def drawn_windows(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Return windows of tokens at random, distinct positions, see `calibration_batches`.

    Examples
    --------
    >>> drawn_windows(torch.arange(3), samples=2, length=2, seed=0).shape
    torch.Size([2, 2])
    """
    starts = len(tokens) - length + 1
    if starts < samples:
        raise ValueError(
            f"texts must hold at least {length + samples - 1} tokens for {samples} different "
            f"windows of {length} tokens, got {len(tokens)}: give longer texts, or a smaller "
            f"{'samples= or ' if starts > 0 else ''}length="
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(starts, generator=generator)[:samples]
    return torch.stack([tokens[int(start) : int(start) + length] for start in chosen])


def overlap(tokens: int, samples: int, length: int) -> str:
    """Return what to know about windows that hold more tokens than their texts, or an empty text.

    Examples
    --------
    >>> overlap(tokens=20, samples=2, length=10)
    ''
    >>> overlap(tokens=8, samples=4, length=4)
    'texts hold 8 tokens, and 4 windows of 4 tokens use each token 2.0 times on average: give 16 \
tokens or more, or fewer samples'
    """
    wanted = samples * length
    if tokens >= wanted:
        return ""
    uses = wanted / tokens
    return (
        f"texts hold {tokens:,} tokens, and {samples:,} windows of {length:,} tokens use each "
        f"token {uses:.1f} times on average: give {wanted:,} tokens or more, or fewer samples"
    )


def _tokens(tokenizer: Any, text: Any) -> list[int]:
    if isinstance(text, os.PathLike):
        text = Path(text).read_text(encoding="utf-8-sig")
    elif not isinstance(text, str):
        raise TypeError(f"texts must be str or paths, got {type(text)!r}")
    elif os.path.isfile(text):
        raise ValueError(
            "texts must be text itself, or paths of type pathlib.Path, got the name of a file as "
            f"a str: Path({text!r}) is read"
        )
    # Special tokens would end up in the middle of windows.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def split_samples(batches: Any) -> list[dict[str | None, Any]]:
    """Split inputs into keyword arguments per sample; the key None is the first argument.

    Parameters
    ----------
    batches : tensor, mapping, or iterable of them
        A tensor has one sample in each row. Tensors of a mapping with as many rows as its first
        tensor are split too; other values go to every sample.

    Raises
    ------
    TypeError, ValueError
        If there is no sample.

    Examples
    --------
    >>> split_samples([{"input_ids": torch.ones(2, 1, dtype=torch.int64), "flag": True}])[1]
    {'input_ids': tensor([[1]]), 'flag': True}
    """
    whole = torch.is_tensor(batches) or isinstance(batches, Mapping)
    given = [batches] if whole else batches
    if not isinstance(given, Iterable):
        raise TypeError(f"batches must be tensors or mappings of tensors, got {type(batches)!r}")
    samples = [sample for batch in given for sample in _rows(batch)]
    if not samples:
        raise ValueError("batches must hold at least one sample, got none")
    return samples


def _rows(batch: Any) -> Iterator[dict[str | None, Any]]:
    named: dict[str | None, Any] = dict(batch) if isinstance(batch, Mapping) else {None: batch}
    tensors = [v for v in named.values() if torch.is_tensor(v) and v.ndim]
    if not tensors:
        raise TypeError(f"batches must be tensors or mappings of tensors, got {type(batch)!r}")
    rows = len(tensors[0])
    _refuse_ambiguous(named, tensors[0])
    for i in range(rows):
        yield {
            key: v[i : i + 1] if torch.is_tensor(v) and v.ndim and len(v) == rows else v
            for key, v in named.items()
        }


def _refuse_ambiguous(named: Mapping[str | None, Any], first: Tensor) -> None:
    """Raise if a tensor may either have one row for each sample or be shared by all samples.

    A float tensor whose axes are all as long as the batch, such as a bias between positions,
    would be cut into rows without an error.
    """
    rows = len(first)
    if rows == 1 or first.ndim < 2 or first.shape[1] != rows:
        return
    for key, v in named.items():
        square = torch.is_tensor(v) and v.ndim >= 2 and set(v.shape) == {rows}
        if square and v is not first and v.is_floating_point():
            raise ValueError(
                f"batches must show which tensors all samples share, got {key!r} of shape "
                f"{tuple(v.shape)} in a batch of {rows} samples of length {rows}: pass batches "
                "of another size"
            )


def _vocabulary(model: nn.Module) -> nn.Embedding | None:
    """Return the embeddings of the tokens that a model takes, or None if it takes no tokens."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except Exception:  # models of images and sound have the method, but raise in it
        return None
    return found if isinstance(found, nn.Embedding) else None


def _token_ids(sample: Mapping[str | None, Any]) -> Tensor | None:
    """Return the token ids of the arguments of a model that takes them, if they are a tensor."""
    # The outputs of tokenizers raise a TypeError for the key None.
    tokens = sample["input_ids"] if "input_ids" in sample else dict(sample).get(None)
    return tokens if torch.is_tensor(tokens) and not tokens.is_floating_point() else None


def check_token_axes(model: nn.Module, batches: Any) -> None:
    """Raise if token ids lack the axis of samples, for models that take token ids.

    Batches of a generator are not looked at.

    Examples
    --------
    >>> class Model(nn.Module):
    ...     def get_input_embeddings(self):
    ...         return nn.Embedding(4, 2)
    >>> check_token_axes(Model(), [torch.tensor([0, 3, 1])])
    Traceback (most recent call last):
    ValueError: batches must hold token ids of shape (samples, tokens), got shape (3,): add the \
axis of samples, by ids[None]
    """
    if _vocabulary(model) is None:
        return
    whole = torch.is_tensor(batches) or isinstance(batches, Mapping)
    given = [batches] if whole else batches
    for batch in given if isinstance(given, Sequence) else ():
        tokens = _token_ids(batch if isinstance(batch, Mapping) else {None: batch})
        if tokens is not None and tokens.ndim == 1:
            raise ValueError(
                "batches must hold token ids of shape (samples, tokens), got shape "
                f"{tuple(tokens.shape)}: add the axis of samples, by ids[None]"
            )


def check_tokens(model: nn.Module, samples: Iterable[Mapping[str | None, Any]]) -> None:
    """Raise if a token is not in the model's vocabulary, for models that have one."""
    embeddings = _vocabulary(model)
    if embeddings is None:
        return
    bounds, numbers = [], []
    for i, sample in enumerate(samples):
        tokens = _token_ids(sample)
        if tokens is not None and tokens.numel():
            bounds.append(torch.stack(tokens.aminmax()))
            numbers.append(i)
    found = torch.stack(bounds).tolist() if bounds else []  # one wait for the device
    for i, (low, high) in zip(numbers, found, strict=True):
        if low < 0 or high >= embeddings.num_embeddings:
            raise ValueError(
                "batches must hold tokens of the model's vocabulary, below "
                f"{embeddings.num_embeddings}, got {low if low < 0 else high} in sample {i}: the "
                "tokenizer is that of another model"
            )
