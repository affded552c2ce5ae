"""Sum the times and the file sizes of layers in a form of export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from safe_core.compressed.forms import places_size

from .export_forms import Sparsity
from .layer_timing import MARGIN

__all__ = ["SummedTimes", "stored_bytes", "summed", "zeroed_bytes"]


class SummedTimes:
    """Sum the times of layers in a form, in which those stay dense that are not faster."""

    def __init__(self, whole: float) -> None:
        self.whole = whole
        self.dense = 0.0
        self.forms: dict[tuple[str, Sparsity], float] = {}

    def add(self, count: int, times: Mapping[tuple[str, Sparsity], float]) -> None:
        """Add calls of a layer, whose dense time is that of ``("dense", 0.0)``."""
        dense = times["dense", 0.0]
        self.dense += count * dense
        for key, taken in times.items():
            if key[0] != "dense":
                gain = dense - taken if taken <= MARGIN * dense else 0.0
                self.forms[key] = self.forms.get(key, 0.0) + count * gain

    def seconds(self) -> Iterator[tuple[tuple[str, Sparsity], float]]:
        """Yield the time of the whole model in each form."""
        # Layers alone can take longer than within the model, which must not make it negative.
        scale = min(1.0, self.whole / self.dense) if self.dense else 1.0
        for key, gain in self.forms.items():
            yield key, self.whole - scale * gain


def summed(forms: str) -> str:
    """Return the note on forms whose times are sums over layers.

    Examples
    --------
    >>> summed("BCSR is an estimate")
    'BCSR is an estimate: the dense time minus what is saved by those linear layers that get a \
tenth faster. Layers of equal shapes were measured once.'
    """
    return (
        f"{forms}: the dense time minus what is saved by those linear layers that get a tenth "
        "faster. Layers of equal shapes were measured once."
    )


def stored_bytes(entries: int, kept: int, width: int, *, in_2_of_4: bool = False) -> int:
    """Return the bytes that `save_compressed` takes for a tensor.

    Parameters
    ----------
    entries, kept : int
        Numbers of entries, and of those that are not zero.
    width : int
        Bytes of an entry.
    in_2_of_4 : bool
        Whether at most two of every four entries are not zero.

    Examples
    --------
    >>> stored_bytes(800, 80, 4), stored_bytes(800, 790, 4)
    (420, 3200)
    """
    sizes = [entries * width, kept * width + places_size("bitmask", entries)]
    if in_2_of_4:
        sizes.append(entries // 2 * width + places_size("2:4", entries))
    return min(sizes)


def zeroed_bytes(
    dense: int,
    weights: Iterable[tuple[int, int]],
    sparsity: float,
    *,
    in_2_of_4: bool = False,
) -> int:
    """Return the bytes of a compressed file with new zeros in some weights.

    Parameters
    ----------
    dense : int
        Bytes of the file without zeros.
    weights : iterable of (int, int)
        The number of entries and the bytes of an entry, for each weight with zeros.
    sparsity : float
    in_2_of_4 : bool

    Examples
    --------
    >>> zeroed_bytes(4000, [(800, 4)], 0.9)
    1220
    """
    for entries, width in weights:
        kept = entries - math.floor(sparsity * entries)
        dense += stored_bytes(entries, kept, width, in_2_of_4=in_2_of_4) - entries * width
    return dense
