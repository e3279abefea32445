"""The files of a backup: where they are, how they are written, and whether they are complete.

A backup is a folder with a decimal name. It holds one NumPy file for each variable, one for each
copy of a variable whose copies on the replicas differ, and `STATE`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op.tables import blocks, files

# The file of a backup that says of which step and of which variables it is.
STATE = "state.json"


def complete_backups(backup_dir: Path) -> list[Path]:
    """The folder of each complete backup, oldest first."""
    folders = [path.parent for path in backup_dir.glob("*/" + STATE)]
    folders = [folder for folder in folders if folder.name.isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name))


def new_partial(backup_dir: Path) -> Path:
    """An empty folder for a backup that is being written, after the removal of incomplete ones."""
    backup_dir.mkdir(parents=True, exist_ok=True)
    complete = complete_backups(backup_dir)
    for folder in backup_dir.iterdir():
        # A process that is killed while it writes or removes a backup leaves such a folder.
        if folder not in complete and (folder.suffix == ".partial" or folder.name.isdecimal()):
            shutil.rmtree(folder)
    partial = backup_dir / "new.partial"
    partial.mkdir()
    return partial


def publish(partial: Path, state: dict[str, Any]) -> None:
    """Writes the state, and gives the backup its name when all of it is on the disk."""
    backup_dir = partial.parent
    older = complete_backups(backup_dir)
    (partial / STATE).write_text(json.dumps(state))
    for path in (*partial.iterdir(), partial):
        files.sync_to_disk(path)
    # A new name: a rename onto an older backup would have to remove that one first.
    partial.rename(backup_dir / str(int(older[-1].name) + 1 if older else 1))
    files.sync_to_disk(backup_dir)


def remove(folder: Path) -> None:
    """Removes a backup."""
    # The state goes first, so that a backup that is half removed is not complete.
    (folder / STATE).unlink()
    shutil.rmtree(folder)


def checked_state(folder: Path) -> dict[str, Any]:
    """The state of a backup whose files are all complete.

    Raises:
      OSError, ValueError, EOFError: a file is missing, cut off or of another shape.
    """
    state = json.loads((folder / STATE).read_text())
    expected = [*state["variables"], *state["metrics"]]
    for k, ((_, shape), copies) in enumerate(zip(expected, state["copies"], strict=True)):
        paths = [_path(folder, k), *(_path(folder, k, replica) for replica in range(copies))]
        for path in paths:
            # Mapping compares the size of the file with its header and reads nothing else. An
            # empty array cannot be mapped.
            array = np.load(path, mmap_mode="r" if np.prod(shape) else None)
            if list(array.shape) != shape:
                raise ValueError(f"{path.name}: expected shape {tuple(shape)}, got {array.shape}")
    return state


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
