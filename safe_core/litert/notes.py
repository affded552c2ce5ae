"""Lines of a report that say which zeros do not pay, and why."""

from __future__ import annotations

from collections.abc import Sequence

from safe_core._readable import readable_bytes, readable_number

from .report import LayerFormat
from .sparsity import BLOCKS, CSR, FILLED, LARGEST_DENSITY

__all__ = ["notes"]

_MANY = 0.5  # fewer zeros save nothing in any format
_NAMED = 4
_BLOCKED = 0.9  # zeros are in blocks if at least this part of them is in blocks of zeros alone


def notes(
    layers: Sequence[LayerFormat],
    weights: str,
    seconds: dict[str, float],
    sparse: str,
    *,
    compute: str = "fastest",
) -> tuple[str, ...]:
    """Return the lines for the layers of a file.

    Parameters
    ----------
    layers : sequence of LayerFormat
    weights : str
        ``"float32"`` or ``"int8"``.
    seconds : dict of str to float
        Times as in a report.
    sparse : str
        The name of the kernels that skip zeros, in ``seconds``.
    compute : str
        What the file was asked to do, ``"fastest"``, ``"sparse"`` or ``"dense"``.

    Examples
    --------
    >>> layer = LayerFormat("fc1", (8, 16), 0.9, "packed", 100, 512)
    >>> (line,) = notes([layer], "float32", {"this file": 1.0}, "")
    >>> line.partition(", ")[0], line.rpartition(". ")[2]
    ("'fc1' (90% zeros) is computed dense", 'Train with Block((1, 4), ...) for both.')
    """
    block = BLOCKS[weights]
    found = []
    wasted = [x for x in layers if x.sparsity >= _MANY and not x.skips_zeros]
    linear = [x for x in wasted if _is_linear(x)]
    windows = [x for x in wasted if not _is_linear(x)]
    if sparse in seconds:
        ratio = seconds[sparse] / seconds["this file"]
        found.append(
            f"Kernels that skip zeros take {readable_number(ratio, 2)} times as long on this "
            "machine, so the file "
            'computes dense; pass compute="sparse" for another machine.'
        )
    elif compute == "dense" and linear:
        found.append(
            f'{_named(linear)} computed dense, since compute="dense" asks for it: zeros make the '
            f"file smaller ({_sizes(linear)}), not faster."
        )
    else:
        found += _causes(linear, block, compute)
    if windows:
        found.append(
            f"{_named(windows)} computed dense, since the runtime has no kernel that skips zeros "
            f"of convolutions: zeros make the file smaller ({_sizes(windows)}), not faster."
        )
    csr = [x for x in layers if x.format == CSR]
    if csr:
        found.append(
            f"{_named(csr)} computed from single weights, which is slower than from blocks of "
            f"1x{block}. Train with Block((1, {block}), ...)."
        )
    if compute == "sparse" and all(x.sparsity < _MANY and not x.skips_zeros for x in layers):
        found.append("No layer has enough zeros to skip; was optimizer.finalize() called?")
    return tuple(found)


def _causes(layers: Sequence[LayerFormat], block: int, compute: str) -> list[str]:
    """Return why linear layers are computed dense, one line for layers with the same reason."""
    by_cause: dict[tuple[str, str], list[LayerFormat]] = {}
    for layer in layers:
        by_cause.setdefault(_cause(layer, block, compute), []).append(layer)
    return [
        f"{_named(found)} computed dense, since {cause}: zeros make the file smaller "
        f"({_sizes(found)}), not faster.{advice}"
        for (cause, advice), found in by_cause.items()
    ]


def _cause(layer: LayerFormat, block: int, compute: str) -> tuple[str, str]:
    """Return why no kernel skips the zeros of a linear layer, and a sentence of advice or ""."""
    needed = 1 - LARGEST_DENSITY if compute == "sparse" else layer.needed_zeros
    if layer.shape[1] % block:
        return f"{block} does not divide the number of inputs, {layer.shape[1]}", ""
    # As `kernel_format`, which skips blocks only if those that are left are mostly filled.
    filled = 1 - layer.sparsity >= FILLED * (1 - layer.zero_blocks)
    in_blocks = filled and layer.zero_blocks >= _BLOCKED * layer.sparsity
    if in_blocks and layer.zero_blocks < needed:
        return (
            f"skipping blocks of 1x{block} is seldom faster with fewer than {needed:.0%} zeros",
            ' Raise the sparsity, or pass compute="sparse" to skip them all the same.',
        )
    also = "" if layer.sparsity >= needed else f" and at least {needed:.0%} zeros"
    return (
        f"the zeros are not in blocks of 1x{block}",
        f" Train with Block((1, {block}), ...){also} for both.",
    )


def _is_linear(layer: LayerFormat) -> bool:
    return len(layer.shape) == 2


def _named(layers: Sequence[LayerFormat]) -> str:
    names = [f"'{x.name}' ({x.sparsity:.0%} zeros)" for x in layers[:_NAMED]]
    more = len(layers) - len(names)
    text = ", ".join(names) + (f" and {more} more" if more else "")
    return f"{text} {'is' if len(layers) == 1 else 'are'}"


def _sizes(layers: Sequence[LayerFormat]) -> str:
    size, dense = sum(x.size for x in layers), sum(x.dense_size for x in layers)
    return f"{readable_bytes(size)} instead of {readable_bytes(dense)}"
