"""Plot landscapes: lines of several networks in one plot, and contours side by side.

matplotlib is imported on first use. Functions return a `matplotlib.figure.Figure`; they open
no window and change no global setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safe_core import _checks
from safe_core._installed import require

from .landscape import Landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_contours", "plot_lines", "save"]

# The palette of Okabe and Ito 2008, which colour-blind readers can tell apart. Dashes
# distinguish the lines in a greyscale print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_COLUMN = 3.25  # width of a column on a two-column page, in inches
_SMALL = 8.0  # font size, in points


def plot_lines(
    landscapes: Mapping[str, Landscape],
    *,
    width: float = _COLUMN,
    log: bool = False,
    ylabel: str = "loss",
) -> Figure:
    """Plot the loss of several networks along their lines.

    Parameters
    ----------
    landscapes : mapping of str to Landscape
        Landscapes along one direction, by the name of the network.
    width : float
        Width of the figure, in inches.
    log : bool
        Whether the axis of the loss is logarithmic.
    ylabel : str
        Label of the axis of the loss.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> places = np.linspace(-1, 1, 5)
    >>> lines = {"sharp": Landscape(places, 9 * places**2), "flat": Landscape(places, places**2)}
    >>> plot_lines(lines).axes[0].get_legend_handles_labels()[1]
    ['sharp', 'flat']
    """
    figure, (axes,) = _panels(landscapes, 1, width, 0.72 * width)
    for i, (name, (places, values)) in enumerate(landscapes.items()):
        axes.plot(
            places,
            values,
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_DASHES[i % len(_DASHES)],
            linewidth=1.2,
            label=name,
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step along the direction", fontsize=_SMALL)
    axes.set_ylabel(ylabel, fontsize=_SMALL)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=_SMALL)
    return figure


def plot_contours(
    landscapes: Mapping[str, Landscape],
    *,
    width: float | None = None,
    levels: int = 12,
    log: bool = False,
    label: str = "loss",
) -> Figure:
    """Plot the loss of several networks on their planes, side by side with the same levels.

    Parameters
    ----------
    landscapes : mapping of str to Landscape
        Landscapes on planes, by the name of the network, which is the title of its panel.
    width : float, optional
        Width of the figure, in inches. The default is one column for one panel and a page
        for more.
    levels : int
        Number of contour levels, from the least to the greatest loss of all planes.
    log : bool
        Whether the logarithms of the levels are evenly spaced, instead of the levels.
    label : str
        Label of the colour bar.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> places = np.linspace(-1, 1, 5)
    >>> bowl = places[:, None] ** 2 + places**2
    >>> planes = {"ADMM": Landscape(places, 9 * bowl), "SAFE": Landscape(places, bowl)}
    >>> figure = plot_contours(planes)
    >>> [axes.get_title() for axes in figure.axes]
    ['ADMM', 'SAFE', '']
    """
    from matplotlib.ticker import MaxNLocator

    _checks.integer("levels", levels, low=2)
    count = max(1, len(landscapes))
    if width is None:
        width = _COLUMN if count == 1 else 2 * _COLUMN + 0.25
    figure, panels = _panels(landscapes, 2, width, 0.86 * width / count)
    edges, norm = _levels([values for _, values in landscapes.values()], levels, log)
    for axes, (name, (places, values)) in zip(panels, landscapes.items(), strict=True):
        # contourf draws rows along the vertical axis, but the first direction is horizontal.
        filled = axes.contourf(places, places, values.T, edges, norm=norm, cmap="viridis")
        filled.set_rasterized(False)  # keep vectors, which print at any size
        axes.contour(places, places, values.T, edges, colors="white", linewidths=0.4)
        axes.plot(0, 0, marker="+", color="white", markersize=6)
        axes.set_title(name, fontsize=_SMALL)
        axes.set_xlabel("first direction", fontsize=_SMALL)
        axes.set_aspect("equal")
    panels[0].set_ylabel("second direction", fontsize=_SMALL)
    # Ticks are round numbers, between which a reader can interpolate; the levels are not round.
    ticks = None if log else MaxNLocator(6)
    bar = figure.colorbar(filled, ax=panels, ticks=ticks, format="%.3g")
    bar.set_label(label, fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL - 1)
    return figure


def save(figure: Figure, path: Any) -> list[Path]:
    """Write a figure to ``path.pdf`` as vectors and to ``path.png`` as pixels.

    Fonts are embedded as TrueType, which publishers require and which keeps text searchable.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str or path
        Path without a suffix. The folder must exist.

    Returns
    -------
    list of Path
        Paths of the two files.

    Examples
    --------
    >>> import tempfile
    >>> line = Landscape(np.linspace(-1, 1, 3), np.asarray([1.0, 0.0, 1.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in save(plot_lines({"SAFE": line}), f"{folder}/line")]
    ['line.pdf', 'line.png']
    """
    import matplotlib

    files = [Path(f"{path}{suffix}") for suffix in (".pdf", ".png")]
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for file in files:
            figure.savefig(file, dpi=300, bbox_inches="tight")
    return files


def _panels(
    landscapes: Mapping[str, Landscape], ndim: int, width: float, height: float
) -> tuple[Figure, list[Any]]:
    """Return a figure with one panel for lines, or one per plane, after checking arguments."""
    if not isinstance(landscapes, Mapping) or not landscapes:
        raise TypeError(
            f"landscapes must be a mapping of at least one name to a Landscape, got {landscapes!r}"
        )
    for name, shown in landscapes.items():
        if shown.values.ndim != ndim:
            raise ValueError(
                f"landscapes must have {ndim} direction{'s'[: ndim - 1]} here, got "
                f"{shown.values.ndim} for {name!r}"
            )
    if _checks.real("width", width, low=0.0) == 0:
        raise ValueError(f"width must be positive, got {width!r}")
    require("a figure", "matplotlib", extra="demo")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    count = len(landscapes) if ndim == 2 else 1
    panels = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.tick_params(labelsize=_SMALL - 1)
    return figure, panels


def _levels(values: list[Any], count: int, log: bool) -> tuple[Any, Any]:
    """Return contour levels over all finite values, and the norm that maps them to colours."""
    from matplotlib.colors import LogNorm, Normalize

    finite = np.concatenate([v[np.isfinite(v)] for v in values])
    if not finite.size:
        raise ValueError("landscapes must hold a finite loss, got none")
    low, high = float(finite.min()), float(finite.max())
    if log and low <= 0:
        raise ValueError(f"landscapes must be positive for log=True, got a loss of {low:g}")
    if high == low:  # contourf needs increasing levels, also for a constant loss
        high = low + max(abs(low), 1.0) * 1e-6
    edges = np.geomspace(low, high, count) if log else np.linspace(low, high, count)
    edges[0], edges[-1] = low, high  # geomspace rounds, and would leave out the extremes
    return edges, LogNorm(low, high) if log else Normalize(low, high)
