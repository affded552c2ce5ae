"""Perplexity of a language model on a text, as papers on pruning measure it."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core.adapters.torch.blocks.calibration import check_tokens
from safe_core.adapters.torch.blocks.structure import evaluation_mode

__all__ = [
    "Perplexity",
    "TextFile",
    "check_length",
    "perplexity",
    "read_text_file",
    "text_tokens",
]


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Attributes
    ----------
    perplexity : float
        ``exp(loss)``.
    loss : float
        Mean negative log likelihood of a token, in nats.
    predictions : int
        How many tokens were predicted.
    windows : int
    unused : int
        Tokens at the end that make no whole window.
    """

    perplexity: float
    loss: float
    predictions: int
    windows: int
    unused: int


class _Window(NamedTuple):
    start: int
    scored: int  # how many of its last tokens count


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    length: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Measure ``exp(-mean log p(token | tokens before it in its window))``.

    By default the text is cut into windows of ``length`` that do not overlap, and what is left
    at the end is not used. The first token of a window has nothing before it, so that a window
    makes ``length - 1`` predictions, and the mean is over exactly those. (Published programs
    multiply the mean of a window by ``length`` and divide by ``windows * length``, which
    is the same number.) With a smaller ``stride`` windows begin that far apart, and each scores
    only the tokens that none before it has; the last is moved back to end with the text. Then
    every token but the first is predicted once, from at least ``length - stride`` before it.

    Parameters
    ----------
    model : torch.nn.Module
        Takes int64 token ids (batch, length), and returns logits (batch, length, vocabulary) or
        an object with ``logits``.
    tokens : int64 tensor, shape (n,)
    length : int
        Tokens in a window, at least 2.
    stride : int, optional
        From 1 to ``length``, which is the default.
    batch_size : int
        Windows at a time.
    device : torch.device or str, optional
        Where tokens go; that of the model's first parameter by default.
    progress : callable, optional
        Called with the number of windows done and the number of all.

    Returns
    -------
    Perplexity

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range, there are fewer tokens than ``length``, one is
        not of the model's vocabulary, or the model gives NaN or infinity.

    References
    ----------
    Frantar et al. 2023, "GPTQ"; Sun et al. 2024, "A Simple and Effective Pruning Approach for
    Large Language Models", whose numbers are of 2048 tokens without overlap.

    Examples
    --------
    >>> class Uniform(nn.Module):
    ...     def forward(self, ids):
    ...         return torch.zeros(*ids.shape, 10)
    >>> found = perplexity(Uniform(), torch.arange(10), length=4)
    >>> round(found.perplexity, 4), found.windows, found.predictions, found.unused
    (10.0, 2, 6, 2)
    >>> perplexity(Uniform(), torch.arange(10), length=4, stride=2).predictions
    9
    """
    _checks.integer("length", length, low=2)
    _checks.integer("batch_size", batch_size, low=1)
    stride = length if stride is None else _checks.integer("stride", stride, low=1)
    if stride > length:
        raise ValueError(f"stride must be at most length={length}, got {stride}")
    if not torch.is_tensor(tokens) or tokens.is_floating_point() or tokens.ndim != 1:
        got: Any = type(tokens)
        if torch.is_tensor(tokens):
            got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise TypeError(f"tokens must be an integer tensor of one axis, got {got}")
    if len(tokens) < length:
        raise ValueError(
            f"tokens must be at least length={length} for one window, got {len(tokens)}: give a "
            "longer text or a smaller length"
        )
    check_tokens(model, [{"input_ids": tokens}])
    windows = _windows(len(tokens), length, stride)
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, done = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for some in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
            ids = torch.stack([tokens[w.start : w.start + length] for w in some]).to(device)
            output = model(ids)
            logits = output if torch.is_tensor(output) else output.logits
            rows = zip(logits, ids, some, strict=True)
            losses = [_loss(row, target, window.scored) for row, target, window in rows]
            total += float(torch.stack(losses).sum())  # the one wait for the device
            done += len(some)
            if progress is not None:
                progress(done, len(windows))
    predictions = sum(w.scored for w in windows)
    loss = total / predictions
    if not math.isfinite(loss):
        raise ValueError(f"model must give finite log likelihoods, got a mean of {-loss}")
    unused = len(tokens) % length if stride == length else 0
    value = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(value, loss, predictions, len(windows), unused)


def _windows(n: int, length: int, stride: int) -> list[_Window]:
    if stride == length:
        return [_Window(k * length, length - 1) for k in range(n // length)]
    windows, end = [_Window(0, length - 1)], length
    while end < n:
        new = min(stride, n - end)
        end += new
        windows.append(_Window(end - length, new))
    return windows


def _loss(logits: Tensor, ids: Tensor, scored: int) -> Tensor:
    """The sum of negative log likelihoods of the last ``scored`` tokens of a window."""
    predicted = logits[-scored - 1 : -1].float()
    losses = nn.functional.cross_entropy(predicted, ids[-scored:], reduction="none")
    return losses.double().sum()


def check_length(model: nn.Module, length: int) -> None:
    """Raise where windows would be longer than what the model was made for.

    Raises
    ------
    ValueError
        If ``length`` is more than the ``max_position_embeddings`` of the model's config.

    Examples
    --------
    >>> check_length(nn.Linear(2, 2), 4096)  # has no limit that is known
    """
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ValueError(
            f"length must be at most the model's {limit} positions, got {length}: give --length or "
            f"length={limit}"
        )


def text_tokens(tokenizer: Any, files: Sequence[Path]) -> Tensor:
    """Return the tokens of text files, joined by an empty line, as one vector.

    Special tokens are added as the tokenizer does by default, which puts one at the beginning
    where the model was trained so.

    Raises
    ------
    ValueError
        If a file is not UTF-8, or is empty.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "text.txt"
    >>> _ = file.write_text("abc")
    >>> text_tokens(lambda text, **options: {"input_ids": [ord(c) for c in text]}, [file])
    tensor([97, 98, 99])
    """
    text = "\n\n".join(read_text_file(file).text for file in files)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


class TextFile(NamedTuple):
    """A file of text as it was when it was read.

    Attributes
    ----------
    name : str
    nbytes : int
    sha256 : str
    text : str
        With line ends of every kind as ``"\\n"``.
    """

    name: str
    nbytes: int
    sha256: str
    text: str


def read_text_file(file: Path) -> TextFile:
    """Return a file of text, which must be there, be UTF-8 and hold something.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "text.txt"
    >>> _ = file.write_bytes(b"one\\r\\ntwo")
    >>> found = read_text_file(file)
    >>> found.nbytes, found.text
    (8, 'one\\ntwo')
    >>> read_text_file(Path("nowhere.txt"))
    Traceback (most recent call last):
    ValueError: text file must exist, got nowhere.txt
    """
    if not file.is_file():
        raise ValueError(f"text file must exist, got {file}")
    content = file.read_bytes()
    try:
        text = io.StringIO(content.decode("utf-8"), newline=None).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"text file must be UTF-8, got another encoding in {file}") from error
    if not text.strip():
        raise ValueError(f"text file must hold text, got none in {file}")
    return TextFile(file.name, len(content), hashlib.sha256(content).hexdigest(), text)
