"""The files of a backup: where they are, how they are written, and whether they are complete.

A backup is a folder ``backup-<number>``. It holds `MARKER`, one NumPy file for each variable, one
for each copy of a variable whose copies on the replicas differ, and `STATE`. While it is written,
its name is ``backup-<random>.partial``. Only folders with such a name and the marker are this
module's own, and only its own files are removed from them.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op.tables import blocks, files, whole_files

# The file of a backup that says of which step and of which variables it is.
STATE = "state.json"
# The file that says who made the folder, from the first moment to the last.
MARKER = "AtomicBackup.txt"
FORMAT = "tf_center_loss_op.training.AtomicBackup 1"

_COMPLETE = re.compile("backup-([0-9]+)")
_PARTIAL = re.compile(r"backup-[0-9a-f]{16}\.partial")
_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?\.npy")


def complete_backups(backup_dir: Path) -> list[Path]:
    """The folder of each complete backup, oldest first."""
    own = [folder for folder in _folders(backup_dir, _COMPLETE) if _is_own(folder)]
    return sorted((folder for folder in own if (folder / STATE).exists()), key=_number)


def new_partial(backup_dir: Path) -> Path:
    """An empty folder for a backup that is being written, after the removal of incomplete ones."""
    backup_dir.mkdir(parents=True, exist_ok=True)
    remove_incomplete(backup_dir)
    partial = backup_dir / f"backup-{secrets.token_hex(8)}.partial"
    partial.mkdir()
    (partial / MARKER).write_text(FORMAT)
    return partial


def publish(partial: Path, state: dict[str, Any]) -> None:
    """Writes the state, and gives the backup its name when all of it is on the disk."""
    backup_dir = partial.parent
    (partial / STATE).write_text(json.dumps({"format": FORMAT} | state))
    for path in (*partial.iterdir(), partial):
        whole_files.sync_to_disk(path)
    # A new name: a rename onto an older backup would have to remove that one first.
    last = max(map(_number, _folders(backup_dir, _COMPLETE)), default=0)
    partial.rename(backup_dir / f"backup-{last + 1}")
    whole_files.sync_to_disk(backup_dir)


def remove(folder: Path) -> None:
    """Removes a backup, but no file in it that this module did not write."""
    # The state goes first, so that a backup that is half removed is not complete, and the marker
    # last, so that it is still recognised.
    (folder / STATE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _NUMBERS.fullmatch(path.name) or whole_files.is_scratch(path.name):
            path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    _remove_if_empty(folder)


def remove_incomplete(backup_dir: Path) -> None:
    """Removes what a process leaves that is killed while it writes or removes a backup."""
    complete = complete_backups(backup_dir)
    for pattern in (_COMPLETE, _PARTIAL):
        for folder in _folders(backup_dir, pattern):
            if folder not in complete and _is_own(folder):
                remove(folder)
    # Killed before the marker was written, or after it was removed.
    for folder in _folders(backup_dir, _PARTIAL):
        _remove_if_empty(folder)


def remove_all(backup_dir: Path) -> None:
    """Removes all backups, and their folder if nothing else is in it."""
    for folder in complete_backups(backup_dir):
        remove(folder)
    remove_incomplete(backup_dir)
    _remove_if_empty(backup_dir)


def _folders(backup_dir: Path, pattern: re.Pattern) -> list[Path]:
    found = backup_dir.iterdir() if backup_dir.is_dir() else ()
    return [path for path in found if pattern.fullmatch(path.name) and path.is_dir()]


def _number(folder: Path) -> int:
    return int(_COMPLETE.fullmatch(folder.name)[1])


def _is_own(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and (folder / MARKER).read_text() == FORMAT
    except (OSError, ValueError):
        return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def checked_state(folder: Path) -> dict[str, Any]:
    """The state of a backup whose files are all complete.

    Raises:
      OSError: a file is missing.
      ValueError: a file is cut off or of another shape, or the state is not one that `publish`
        wrote.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except RecursionError as error:
        raise ValueError(f"{STATE}: expected a state of a backup: {error}") from error
    _check_structure(state)
    expected = [*state["variables"], *state["metrics"]]
    for k, ((dtype, shape), copies) in enumerate(zip(expected, state["copies"], strict=True)):
        for path in _paths(folder, k, copies):
            with open(path, "rb") as file:
                header = files.read_header(file, path.name)
            if list(header.shape) != shape:
                raise ValueError(f"{path.name}: expected shape {tuple(shape)}, got {header.shape}")
            wanted = np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
            # NumPy's files store bfloat16 as plain bytes.
            if header.dtype != wanted and header.dtype != np.dtype((np.void, wanted.itemsize)):
                raise ValueError(f"{path.name}: expected {dtype}, got {header.dtype}")
    return state


def _check_structure(state: Any) -> None:
    """Raises ValueError unless a value has the structure of a state."""
    if not isinstance(state, dict):
        raise ValueError(f"{STATE}: expected an object, got {type(state).__name__}")

    def require(key: str, valid: bool, expected: str) -> None:
        if not valid:
            got = repr(state.get(key))
            got = got if len(got) < 100 else f"{got[:100]}..."
            raise ValueError(f"{STATE}: expected {key!r} to be {expected}, got {got}")

    require("format", state.get("format") == FORMAT, repr(FORMAT))
    for key in ("epoch", "batch"):
        require(key, _is_count(state.get(key)), "an int >= 0")
    for key in ("variables", "metrics"):
        value = state.get(key)
        valid = isinstance(value, list) and all(map(_is_description, value))
        require(key, valid, "a list of pairs [dtype, shape]")
    copies, length = state.get("copies"), len(state["variables"]) + len(state["metrics"])
    valid = isinstance(copies, list) and len(copies) == length and all(map(_is_count, copies))
    require("copies", valid, f"a list of {length} ints >= 0")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_description(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
        return False
    try:
        known = isinstance(value[0], str) and tf.as_dtype(value[0]).as_numpy_dtype is not object
    except TypeError:
        return False
    return known and all(map(_is_count, value[1]))


def _paths(folder: Path, k: int, copies: int) -> Iterator[Path]:
    yield _path(folder, k)
    for replica in range(copies):
        yield _path(folder, k, replica)


def description(variables: Sequence[Any]) -> list[list]:
    """Dtype and shape of each variable, as the state holds them."""
    return [[tf.as_dtype(variable.dtype).name, list(variable.shape)] for variable in variables]


def write(folder: Path, k: int, variable: Any, copies: Sequence[tf.Variable]) -> int:
    """Writes the variable with the index k.

    Args:
      folder: of the backup.
      k: the index of the variable in the backup.
      variable: a ``keras.Variable`` or ``tf.Variable``.
      copies: the copy of the variable on each replica.

    Returns:
      How many copies have a file of their own: 0, where all are equal, or all. Copies differ where
      each replica writes its own, as the sums of a metric and the statistics of its batches.
    """
    if _is_large_table(variable):
        # Every replica's copy of a table is equal.
        files.save(variable, _path(folder, k))
        return 0
    whole = keras.ops.convert_to_numpy(variable)
    arrays = [copy.numpy() for copy in copies] if len(copies) > 1 else []
    np.save(_path(folder, k), whole)
    if all(array.tobytes() == whole.tobytes() for array in arrays):
        return 0
    for replica, array in enumerate(arrays):
        np.save(_path(folder, k, replica), array)
    return len(arrays)


def read(
    folder: Path, k: int, variable: Any, copies: Sequence[tf.Variable], written_copies: int
) -> None:
    """Reads what `write` wrote; on another number of replicas all copies get the same value.

    Args:
      folder: of the backup.
      k: the index of the variable in the backup.
      variable: as in `write`.
      copies: as in `write`.
      written_copies: what `write` returned.
    """
    if _is_large_table(variable):
        files.load(variable, _path(folder, k))
        return
    variable.assign(_array(_path(folder, k), variable))
    if len(copies) == written_copies:
        for replica, copy in enumerate(copies):
            copy.assign(_array(_path(folder, k, replica), variable))


def _path(folder: Path, k: int, replica: int | None = None) -> Path:
    return folder / (f"{k}.npy" if replica is None else f"{k}-{replica}.npy")


def _array(path: Path, variable: Any) -> np.ndarray:
    # NumPy's files store bfloat16 as plain bytes.
    return np.load(path).view(tf.as_dtype(variable.dtype).as_numpy_dtype)


def _is_large_table(variable: Any) -> bool:
    """True if the variable is a table that is large enough to stream in blocks."""
    size = np.prod(variable.shape) * tf.as_dtype(variable.dtype).size
    return len(variable.shape) == 2 and size > blocks.BLOCK_BYTES
