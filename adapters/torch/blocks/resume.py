"""A folder in which pruning leaves every finished block, to go on from there after a fault."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["WorkFolder", "fingerprint", "identity", "sample_of"]

_MANIFEST = "manifest.json"
_SAMPLED = 1024


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A digest of tensors: dtypes, shapes and every bit.

    Examples
    --------
    >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, 1)])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_of(tensors: Iterable[Tensor]) -> str:
    """A digest of some hundred entries of every tensor, to tell one checkpoint from another.

    Examples
    --------
    >>> sample_of([torch.zeros(10**5)]) == sample_of([torch.ones(10**5)])
    False
    """
    return fingerprint(t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLED)] for t in tensors)


def identity(value: Any) -> str:
    """All that a solver is made of: the same in every process, another for another solver.

    Dataclasses say every field, functions their names and what they close over, arrays a digest.

    Raises
    ------
    ValueError
        If a function has no name, or an instance of a class keeps what it does not say.

    Examples
    --------
    >>> identity(functools.partial(round, ndigits=2))
    'partial(builtins.round, ndigits=2)'
    >>> class Keeper:
    ...     def __init__(self, share):
    ...         self.share = share
    >>> identity(Keeper(0.5))
    Traceback (most recent call last):
    ValueError: solver must be of functions with names and of dataclasses for work_dir, to tell \
whether a run goes on with the same one, got an instance of Keeper
    """
    if isinstance(value, functools.partial):
        return _called("partial", (value.func, *value.args), value.keywords)
    if isinstance(value, types.MethodType):
        return f"{identity(value.__self__)}.{value.__name__}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _function(value)
    if is_dataclass(value):
        said = {f.name: getattr(value, f.name) for f in fields(value)}
        return _called(_path(type(value)), (), said | getattr(value, "__dict__", {}))
    if isinstance(value, Mapping):
        return _called(type(value).__name__, tuple(value.items()), {})
    if isinstance(value, (list, tuple)):
        return _called(type(value).__name__, value, {})
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"array({fingerprint([torch.as_tensor(value)])})"
    if isinstance(value, (set, frozenset)):  # in another order in every process
        return f"{type(value).__name__}({', '.join(sorted(map(identity, value)))})"
    kept = getattr(value, "__dict__", None)
    if kept == {}:
        return f"{_path(type(value))}()"
    says = type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
    if isinstance(value, Enum) or (says and kept is None):
        return repr(value)
    raise _untold(f"an instance of {type(value).__name__}")


def _called(name: str, args: Iterable[Any], named: Mapping[str, Any]) -> str:
    parts = [identity(x) for x in args]
    parts += [f"{key}={identity(x)}" for key, x in sorted(named.items())]
    return f"{name}({', '.join(parts)})"


def _function(value: Any) -> str:
    if "<lambda>" in value.__qualname__:
        raise _untold(value.__qualname__)
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    closed = [x for x in cells if x is not value] + [*(getattr(value, "__defaults__", None) or ())]
    named = getattr(value, "__kwdefaults__", None) or {}
    return _called(_path(value), closed, named) if closed or named else _path(value)


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _untold(what: str) -> ValueError:
    return ValueError(
        "solver must be of functions with names and of dataclasses for work_dir, to tell whether "
        f"a run goes on with the same one, got {what}"
    )


class WorkFolder:
    """Finished blocks and a manifest of them, each written at once or not at all.

    A file is written under another name, flushed to the disk and renamed. The manifest names
    a block once its file is there.

    Parameters
    ----------
    path : path
        Made where it is not there.
    settings : mapping of str to str
        What must be the same to go on.
    notes : sequence of str
        Kept from the beginning: a run that goes on reads what the first one wrote.

    Attributes
    ----------
    finished : list of dict
        What `save` was given, block by block.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings, or what is no manifest, or if another
        run is at work in it.

    Examples
    --------
    >>> import contextlib, tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with contextlib.closing(WorkFolder(path, {"seed": "0"})) as folder:
    ...         folder.save({"w": torch.ones(1)}, {"loss": 0.5})
    ...     with contextlib.closing(WorkFolder(path, {"seed": "0"})) as again:
    ...         again.finished, again.load(0)["w"]
    ([{'loss': 0.5}], tensor([1.]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, str],
        notes: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.notes = list(notes)
        self.finished: list[dict[str, Any]] = []
        self._digests: list[str] = []  # of the files
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            if (self.path / _MANIFEST).exists():
                self._read()
            else:
                self._write_manifest([], [])
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text())
            found, self.finished = dict(manifest["settings"]), list(manifest["blocks"])
            self.notes, self._digests = list(manifest["notes"]), list(manifest["digests"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"work_dir must hold a manifest of this library, got {self.path / _MANIFEST} with "
                f"{error!r}"
            ) from error
        for key in sorted(set(found) | set(self.settings)):
            if found.get(key) != self.settings.get(key):
                raise ValueError(
                    f"work_dir must be of a run with the same settings: {self.path} was begun with "
                    f"{key}={found.get(key)}, got {key}={self.settings.get(key)}; name another "
                    "folder to begin anew"
                )

    def close(self) -> None:
        """Leave the folder to other runs, as the end of the process does."""
        self._lock.close()

    def _file(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, on the CPU.

        Raises
        ------
        ValueError
            If its file is not there, or is not what was written.
        """
        from safetensors.torch import load

        path = self._file(index)
        data = path.read_bytes() if path.exists() else None
        if data is None or _digest(data) != self._digests[index]:
            raise ValueError(
                f"work_dir must hold block {index} as it was written, got "
                f"{'no' if data is None else 'another'} {path.name} in {self.path}: name another "
                "folder to begin anew"
            )
        return load(data)

    def save(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Keep the next block.

        Raises
        ------
        OSError
            If it cannot be written, as on a full disk. The blocks before stay.
        """
        from safetensors.torch import save

        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        index = len(self.finished)
        try:
            data = save(plain)
            _write(self._file(index), data)
            self._write_manifest([*self.finished, dict(entry)], [*self._digests, _digest(data)])
        except OSError as error:
            raise OSError(
                error.errno,
                f"work_dir must have room for block {index}, got {error.strerror or error}; the "
                f"blocks before it stay in {self.path}",
            ) from error

    def _write_manifest(self, finished: list[dict[str, Any]], digests: list[str]) -> None:
        manifest = {
            "settings": self.settings,
            "notes": self.notes,
            "blocks": finished,
            "digests": digests,
        }
        _write(self.path / _MANIFEST, json.dumps(manifest, indent=1).encode())
        self.finished, self._digests = finished, digests


def _locked(path: Path) -> IO[bytes]:
    """A file that no other run can open as well, until it is closed or the process is gone."""
    file = open(path / "lock", "wb")  # noqa: SIM115 (open as long as the run)
    try:
        import fcntl
    except ImportError:  # not on every system
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"work_dir must be of one run at a time, got {path}, where another is at work"
        ) from None
    except OSError:
        pass  # file systems without locks
    return file


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
