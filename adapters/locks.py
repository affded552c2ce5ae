"""Lock files, so that two processes do not write to one folder."""

from __future__ import annotations

from typing import IO, Any

__all__ = ["try_lock"]


def try_lock(file: IO[Any] | int, *, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed, without waiting.

    The system frees the lock when the process ends, even if it is killed.

    Parameters
    ----------
    file : file or file descriptor
        A descriptor may be that of a folder.
    shared : bool
        Whether other processes may hold shared locks of the file at the same time.

    Returns
    -------
    bool or None
        False if another process holds a lock that excludes this one. None where files cannot be
        locked, as on some systems and network drives.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     try_lock(file) is not False
    True
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
