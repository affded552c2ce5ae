"""Find the files of a data set in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Release", "find"]

_SHOWN = 12


class Release(NamedTuple):
    """One published form of a data set.

    Attributes
    ----------
    folder : str
        The folder in its archive.
    files : tuple of tuples of str
        The possible names of each file.
    url : str
        Download page.

    Examples
    --------
    >>> Release("cifar-100-python", (("train",), ("test",)), "https://example.org").folder
    'cifar-100-python'
    """

    folder: str
    files: tuple[tuple[str, ...], ...]
    url: str


def find(
    dataset: str, folder: str | Path, releases: Sequence[Release]
) -> tuple[Release, list[Path]]:
    """Return the first release that is complete in ``folder`` or in its own subfolder.

    Parameters
    ----------
    dataset : str
        Name for messages.
    folder : str or Path
    releases : sequence of Release

    Returns
    -------
    Release, list of Path
        Its files, in order.

    Raises
    ------
    FileNotFoundError
        If none is complete. The message lists the expected and the existing files, and the
        download pages.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "test").touch()
    >>> release = Release("cifar-100-python", (("test",),), "https://example.org")
    >>> [path.name for path in find("CIFAR-100", folder, [release])[1]]
    ['test']
    """
    folder = Path(folder)
    for release in releases:
        for place in (folder, folder / release.folder):
            found = [_first(place, names) for names in release.files]
            paths = [path for path in found if path is not None]
            if len(paths) == len(found):
                return release, paths
    wanted = "; or ".join(
        f"{', '.join(names[0] for names in release.files)} (or in {release.folder}/, from "
        f"{release.url})"
        for release in releases
    )
    raise FileNotFoundError(
        f"folder must hold the extracted files of {dataset}: {wanted}; got {folder} with "
        f"{_contents(folder, [release.folder for release in releases])}"
    )


def _first(place: Path, names: Sequence[str]) -> Path | None:
    return next((place / name for name in names if (place / name).is_file()), None)


def _contents(folder: Path, inner: Sequence[str]) -> str:
    """Describe the contents of a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    places = [folder, *(folder / name for name in dict.fromkeys(inner))]
    names = [
        str(path.relative_to(folder))
        for place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
    ]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN] or ["nothing"]) + (f" and {more} more" if more > 0 else "")
