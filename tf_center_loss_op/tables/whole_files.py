"""Files that appear under their name only when they are complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# A scratch file has a name of its own length, because the name of the file may be as long as the
# file system allows.
_PREFIX, _SUFFIX = ".tf_center_loss_op-", ".tmp"
_MAX_LINKS = 40  # as many as Linux follows


def checked_path(name: str, path: Any) -> str:
    """The path as a str, from a str, bytes or os.PathLike.

    Raises:
      TypeError: it is none of these.
    """
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(
            f"{name}: expected a path (str, bytes or os.PathLike), got {type(path).__name__}"
        ) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error.

    The new file has the mode and the owner of the one that it replaces; a new one has the mode that
    `open` would give it. Symbolic links are followed. A device or a pipe is written to directly.

    Args:
      path: of a file in a folder that exists.

    Yields:
      A binary file.

    Raises:
      FileNotFoundError: there is no such folder.
      OSError: the file cannot be written. The old file is unchanged.
    """
    path = os.fspath(path)
    old = _status(path)
    if old is not None and not stat.S_ISREG(old.st_mode):
        with open(path, "wb") as file:
            yield file
        return
    target = _without_links(path)
    parent, name = os.path.split(target)
    if not (name and os.path.isdir(parent or os.curdir)):
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path!r}")
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    folder = os.open(parent or os.curdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _remove_abandoned(folder)
        with _scratch(folder, 0o666 if old is None else 0o600) as (scratch, file):
            yield file
            file.flush()
            if old is not None:
                # Only root may give a file away, and not in every container.
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            os.fsync(file.fileno())
            os.replace(scratch, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def is_scratch(name: str) -> bool:
    """Whether it is the name of a scratch file."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def sync_to_disk(path: Path) -> None:
    """Waits until a file or folder that has been written is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_links(path: str) -> str:
    """The path that a symbolic link leads to, which need not exist."""
    for _ in range(_MAX_LINKS):
        if not os.path.islink(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _scratch(folder: int, mode: int) -> Iterator[tuple[str, BinaryIO]]:
    """The name of a new file in the folder, and the file; removed if it has not been renamed.

    The process that writes it holds a lock on it, so that another one can tell it from one that was
    abandoned. The lock ends with the process.
    """
    while True:
        name = f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        # The kernel subtracts the umask from the mode: to read the umask, one would have to set it.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with open(os.open(name, flags, mode, dir_fd=folder), "w+b") as file:
            # Some network file systems have no locks; files abandoned there stay.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # Removed by another process before it was locked.
            try:
                yield name, file
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                raise
            return


def _remove_abandoned(folder: int) -> None:
    """Removes the scratch files of processes that were killed."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_scratch(entry.name)]
    for name in names:
        with contextlib.suppress(OSError):
            _remove_if_abandoned(folder, name)


def _remove_if_abandoned(folder: int, name: str) -> None:
    # Neither follows a link nor waits for the other end of a pipe.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(descriptor)
