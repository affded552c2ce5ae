"""Write a new folder completely or not at all, beside the place where it will appear."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safe_core._readable import readable_bytes
from safe_core.adapters.locks import try_lock

__all__ = ["Draft", "check_new_folder", "save_somewhere", "written_at_once"]

_PIECE = 2**30  # some file systems hold no larger files


def check_new_folder(folder: Path, source: Path) -> None:
    """Check that a folder is new or empty, and outside of the model.

    Raises
    ------
    ValueError
        If the folder is the model's or inside it, is not empty, or is a file, a link or a mount
        point, which a rename cannot replace.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "model.safetensors").touch()
    >>> check_new_folder(folder.with_name("pruned"), folder)
    """
    whole, model = folder.resolve(), source.resolve()
    if whole == model or model in whole.parents:
        raise ValueError(
            f"out must be outside of the model folder, such as {source.absolute()}-sparse, got "
            f"{folder}"
        )
    if folder.is_symlink():
        raise ValueError(
            f"out must be a new or empty folder, got the symbolic link {folder}: name a folder "
            f"beside what it points to, such as {whole}-sparse"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {folder}")
    if os.path.ismount(folder):
        raise ValueError(
            f"out must be a new or empty folder, got the mount point {folder}: name a folder in "
            f"it, such as {folder / 'sparse'}"
        )


@dataclass
class Draft:
    """A folder under construction.

    Attributes
    ----------
    path : pathlib.Path
    keep : bool
        Whether to keep the folder if a later step fails, because its contents are valuable.
    """

    path: Path
    keep: bool = False

    def reserve(self, nbytes: int) -> None:
        """Take the space on the disk that the files will need, so that no other can fill it.

        Raises
        ------
        OSError
            If there is too little.
        """
        try:
            for i in range(0, nbytes, _PIECE):
                with open(self.path / f"reserved-{i // _PIECE}", "wb") as file:
                    if hasattr(os, "posix_fallocate"):  # not on every system
                        os.posix_fallocate(file.fileno(), 0, min(_PIECE, nbytes - i))
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            self.release()
            raise OSError(
                error.errno,
                f"out needs {readable_bytes(nbytes)} of free disk space, got "
                f"{readable_bytes(free)} in {self.path.parent} ({error.strerror})",
            ) from error

    def release(self) -> None:
        """Give the reserved space back, just before the files are written."""
        for file in self.path.glob("reserved-*"):
            file.unlink()


@contextmanager
def written_at_once(folder: Path) -> Iterator[Draft]:
    """Yield a draft to write to, and rename it to ``folder`` at the end.

    After an error the draft is removed. If `Draft.keep` is set, it stays under a name of its
    own, and a note on the error tells it. What a killed run left is removed at the start. A
    draft is locked as long as its run lives.

    Raises
    ------
    ValueError
        If another run writes the same folder.
    OSError
        If the folder cannot be created, or ``folder`` is not empty at the end.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "new"
    >>> with written_at_once(folder) as draft:
    ...     _ = (draft.path / "a").write_text("")
    ...     folder.exists()
    False
    >>> [file.name for file in folder.iterdir()]
    ['a']
    """
    whole = folder.absolute()
    draft = Draft(whole.with_name(f".{whole.name}.partial"))
    lock = _begun(draft.path, folder)
    try:
        yield draft
        _make_modes_alike(draft.path)
        if whole.exists():
            whole.rmdir()
        draft.path.rename(whole)
    except BaseException as error:
        if draft.keep:
            kept = whole.with_name(f"{whole.name}.kept-{secrets.token_hex(4)}")
            draft.path.rename(kept)
            error.add_note(f"The finished model is kept in {kept}")
        else:
            shutil.rmtree(draft.path, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _make_modes_alike(folder: Path) -> None:
    """Give all files of a folder the mode of new files: libraries make some for the owner only."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            with contextlib.suppress(OSError):  # some file systems have no modes
                file.chmod(mode)


def _begun(path: Path, folder: Path) -> int | None:
    """Create and lock the folder of a draft, in the place of one that a killed run left."""
    for _ in range(2):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            lock = _locked(path)
            if lock is None:
                raise ValueError(
                    f"out must be written by one run at a time, but another writes {folder}; if "
                    f"none does, remove {path}"
                ) from None
            shutil.rmtree(path)
            os.close(lock)
        except OSError as error:
            raise OSError(
                f"out must be a folder that can be created, got {folder}: {error.strerror}"
            ) from error
        else:
            return _locked(path)
    raise ValueError(f"out must be written by one run at a time, but another writes {folder}")


def _locked(path: Path) -> int | None:
    """Return an open descriptor of a folder, locked until it is closed; None if it cannot be."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # some systems open no folders
        return None
    if not try_lock(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def save_somewhere(
    save: Callable[[Path], object], draft: Draft, name: str, work_dir: Path | None
) -> None:
    """Save finished work in the draft, or in a temporary folder if it would be lost.

    Parameters
    ----------
    save : callable
        Writes files to the folder that it is given.
    draft : Draft
        Kept once ``save`` has succeeded.
    name : str
        Of the new folder, for messages.
    work_dir : path, optional
        A folder that holds the work too.

    Raises
    ------
    OSError
        If it cannot be saved in the draft; the message says where the work is, and what to do.
    """
    draft.release()
    try:
        save(draft.path)
    except Exception as error:  # those of safetensors are no OSError
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        shutil.rmtree(draft.path, ignore_errors=True)  # a part of a model only takes space
        if work_dir is not None:
            rest = (
                f"The finished blocks are kept in {work_dir}: make room, then give the same "
                "command again, or name another --out"
            )
        elif (kept := _elsewhere(save, name)) is not None:
            rest = f"The finished model is kept in {kept}: make room, then move it"
        else:
            rest = "Make room, or name another --out; --work-dir keeps finished blocks"
        raise OSError(
            f"out must have room for the model, but {draft.path.parent / name} could not be "
            f"written: {reason}\n{rest}"
        ) from error
    draft.keep = True


def _elsewhere(save: Callable[[Path], object], name: str) -> Path | None:
    """Save in a new temporary folder and return it, or None if that fails too."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}.kept-"))
    except OSError:
        return None
    try:
        save(folder)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder
