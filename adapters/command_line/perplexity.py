"""Measure the perplexity of a language model on a text, as in papers on pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core.adapters.torch.blocks.calibration import check_tokens
from safe_core.adapters.torch.example_inputs import evaluation_mode

from .chats import chat_renderer
from .text_files import read_text_file

__all__ = ["Perplexity", "check_length", "perplexity", "text_tokens"]

# The names that configurations use for the number of positions of a text.
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)


class Perplexity(NamedTuple):
    """Hold the perplexity of a model on a text, and the counts behind it.

    Attributes
    ----------
    perplexity : float
        ``exp(loss)``.
    loss : float
        Mean negative log likelihood of a token, in nats.
    predictions : int
        Number of predicted tokens.
    windows : int
    unused : int
        Tokens at the end that do not fill a window.
    standard_error : float or None
        Standard error of the perplexity, ``perplexity * sqrt(n / (n - 1) * sum_w (s_w - k_w *
        loss)^2) / predictions`` for n windows with k_w predictions and a summed loss s_w each;
        None for a single window. It assumes independent windows. Those of one text are not, so
        the true error is larger.
    """

    perplexity: float
    loss: float
    predictions: int
    windows: int
    unused: int
    standard_error: float | None


class _Window(NamedTuple):
    start: int
    scored: int  # number of tokens at its end that count


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

    By default the text is cut into windows of ``length`` tokens without overlap, and the rest at
    the end is not used. The first token of a window has no context, so each window makes
    ``length - 1`` predictions, and the mean is over exactly these. (Published code multiplies the
    mean of a window by ``length`` and divides by ``windows * length``, with the same result.)

    With a smaller ``stride``, windows start that far apart, and each scores only the tokens that
    earlier windows do not contain. The last window is moved back to end with the text. Every
    token but the first is then predicted once, from at least ``length - stride`` tokens of
    context.

    Parameters
    ----------
    model : torch.nn.Module
        Maps int64 token ids (batch, length) to logits (batch, length, vocabulary), or to an
        object with ``logits``.
    tokens : int64 tensor
        Of shape (n,).
    length : int
        Tokens per window, at least 2.
    stride : int, optional
        Tokens between the starts of windows, from 1 to ``length``. The default is ``length``.
    batch_size : int
        Windows per batch.
    device : torch.device or str, optional
        Device for the tokens; by default that of the model's first parameter.
    progress : callable, optional
        Called with the number of finished windows and the total.

    Returns
    -------
    Perplexity

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, there are fewer tokens than ``length``, a token is not in
        the model's vocabulary, or the model returns NaN or infinity.

    References
    ----------
    Frantar et al. 2023, "GPTQ"; Sun et al. 2024, "A Simple and Effective Pruning Approach for
    Large Language Models". Both report windows of 2048 tokens without overlap.

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
        raise TypeError(f"tokens must be an integer tensor with one axis, got {got}")
    if len(tokens) < length:
        raise ValueError(
            f"tokens must fill at least one window of length={length}, got {len(tokens)}: use a "
            "longer text or a smaller length="
        )
    check_tokens(model, [{"input_ids": tokens}])
    windows = _windows(len(tokens), length, stride)
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: list[float] = []
    with evaluation_mode(model), torch.no_grad():
        for some in (windows[i : i + batch_size] for i in range(0, len(windows), batch_size)):
            ids = torch.stack([tokens[w.start : w.start + length] for w in some]).to(device)
            output = model(ids)
            logits = output if torch.is_tensor(output) else output.logits
            rows = zip(logits, ids, some, strict=True)
            losses = [_loss(row, target, window.scored) for row, target, window in rows]
            sums += torch.stack(losses).tolist()  # the only wait for the device
            if progress is not None:
                progress(len(sums), len(windows))
    predictions = sum(w.scored for w in windows)
    loss = math.fsum(sums) / predictions
    if not math.isfinite(loss):
        for name, p in model.named_parameters():
            if p.is_floating_point() and not bool(p.detach().float().isfinite().all()):
                raise ValueError(f"model must hold finite weights, got NaN or infinity in {name}")
        raise ValueError(f"model must return finite log likelihoods, got a mean of {-loss}")
    unused = len(tokens) % length if stride == length else 0
    value = math.exp(loss) if loss < 700 else math.inf
    error = None if len(windows) == 1 else value * _standard_error(sums, windows, loss, predictions)
    return Perplexity(value, loss, predictions, len(windows), unused, error)


def _standard_error(
    sums: Sequence[float], windows: Sequence[_Window], loss: float, predictions: int
) -> float:
    """Return the standard error of the mean loss, the ratio of two sums over windows."""
    spread = math.fsum((s - w.scored * loss) ** 2 for s, w in zip(sums, windows, strict=True))
    n = len(windows)
    return math.sqrt(n / (n - 1) * spread) / predictions


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
    """Return the summed negative log likelihood of the last ``scored`` tokens of a window."""
    predicted = logits[-scored - 1 : -1].float()
    losses = nn.functional.cross_entropy(predicted, ids[-scored:], reduction="none")
    return losses.double().sum()


def check_length(model: nn.Module, length: int) -> None:
    """Raise if windows are longer than the model supports.

    Raises
    ------
    ValueError
        If ``length`` exceeds the number of positions in the model's configuration, or in the
        part of it that describes the text.

    Examples
    --------
    >>> check_length(nn.Linear(2, 2), 4096)  # no known limit
    """
    config = getattr(model, "config", None)
    parts = [config, *(getattr(config, key, None) for key in ("text_config", "llm_config"))]
    text_config = getattr(config, "get_text_config", None)
    if callable(text_config):
        parts.append(text_config(decoder=True))
    found = [
        getattr(part, key, None)
        for part in parts
        for key in _LIMITS
        if getattr(part, "relative_attention_num_buckets", None) is None  # without a limit
    ]
    limits = [n for n in found if isinstance(n, int) and n > 0]
    if limits and length > min(limits):
        raise ValueError(
            f"length must be at most the model's {min(limits)} positions, got {length}"
        )


def text_tokens(
    tokenizer: Any,
    files: Sequence[Path],
    field: str | None = None,
    *,
    chat_template: bool = False,
) -> Tensor:
    """Return the tokens of text files, joined by empty lines, as one vector.

    The tokenizer adds its default special tokens, such as one at the beginning of the text.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Or any function of a text that returns a mapping with ``"input_ids"``.
    files : sequence of pathlib.Path
    field : str, optional
        The field of the text in the records of JSON and parquet files.
    chat_template : bool
        Whether the chat template of the tokenizer makes a text of each record. It adds the
        special tokens itself, and chats are joined by nothing.

    Raises
    ------
    ValueError
        If a file is empty or not UTF-8, or there is no chat template.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "text.txt"
    >>> _ = file.write_text("abc")
    >>> text_tokens(lambda text, **options: {"input_ids": [ord(c) for c in text]}, [file])
    tensor([97, 98, 99])
    """
    chat = chat_renderer(tokenizer) if chat_template else None
    texts = [read_text_file(file, field, chat).text for file in files]
    text = ("" if chat_template else "\n\n").join(texts)
    special = {"add_special_tokens": False} if chat_template else {}
    return torch.tensor(tokenizer(text, verbose=False, **special)["input_ids"], dtype=torch.int64)
