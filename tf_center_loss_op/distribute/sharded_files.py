"""The files of a sharded table: one NumPy file for each shard, and a file that names the shards.

A save counts when that file names its shards: it is replaced once all shards are on the disk, so a
job killed meanwhile leaves the save before it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op.tables import files, whole_files

_SAVED = "sharded_centers.json"
_PART = re.compile(r"centers-[0-9]{9,}-[0-9]{5,}-of-[0-9]{5,}\.npy")


class Save:
    """One save of a table in a folder, which is made where there is none."""

    def __init__(self, folder: str | bytes | os.PathLike, num_shards: int):
        self._folder = Path(whole_files.checked_path("folder", folder))
        self._folder.mkdir(parents=True, exist_ok=True)
        is_first = not (self._folder / _SAVED).exists()
        self._serial = 1 if is_first else _saved(self._folder)["serial"] + 1
        self._num_shards = num_shards

    def write_shard(self, index: int, variable: tf.Variable) -> None:
        """Writes the shard of the replica with this index."""
        files.save(variable, self._folder / _name(self._serial, index, self._num_shards))

    def complete(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        """Makes the save count, once all shards are written, and removes the previous one."""
        state = {"serial": self._serial, "parts": self._num_shards}
        state |= {"shape": shape.as_list(), "dtype": dtype.name}
        with whole_files.replacing(self._folder / _SAVED) as file:
            file.write(json.dumps(state).encode())
        current = {_name(self._serial, k, self._num_shards) for k in range(self._num_shards)}
        for path in list(self._folder.iterdir()):
            if _PART.fullmatch(path.name) and path.name not in current:
                path.unlink()


def saved(
    folder: str | bytes | os.PathLike, shape: tf.TensorShape, dtype: tf.DType, fewer_rows: bool
) -> tuple[int, Iterator[np.ndarray]]:
    """The last complete save: its number of rows, and its shards in order as memory-mapped arrays.

    Args:
      folder: of the save.
      shape: of the table that it is read into.
      dtype: of that table.
      fewer_rows: whether the save may be of a table of fewer rows.

    Raises:
      FileNotFoundError: there is no complete save in the folder.
      ValueError: it is of a table of another shape or type, or a file is not whole.
    """
    folder = Path(whole_files.checked_path("folder", folder))
    state = _saved(folder)
    rows, dim = state["shape"]
    fits = rows <= shape[0] if fewer_rows else rows == shape[0]
    if not fits or [dim, state["dtype"]] != [shape[1], dtype.name]:
        words = f"table {dtype.name} {shape}" + (" or one of fewer rows" if fewer_rows else "")
        raise ValueError(
            f"folder: expected a {words}, got {state['dtype']} {(rows, dim)} in "
            f"{os.fspath(folder)!r}"
        )
    paths = (folder / _name(state["serial"], k, state["parts"]) for k in range(state["parts"]))
    return rows, (_rows(path, dtype, dim) for path in paths)


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / _SAVED
    content = path.read_bytes()
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):
        state = None
    if not _is_state(state):
        raise ValueError(
            f"folder: expected what ShardedCenters.save writes, got another content in "
            f"{os.fspath(path)!r}"
        )
    return state


def _is_state(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    shape = value.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and isinstance(value.get("dtype"), str)):
        return False
    counts = [value.get("serial"), value.get("parts"), *shape]
    return all(type(count) is int and count >= 1 for count in counts)


def _name(serial: int, index: int, num_shards: int) -> str:
    return f"centers-{serial:09d}-{index:05d}-of-{num_shards:05d}.npy"


def _rows(path: Path, dtype: tf.DType, dim: int) -> np.ndarray:
    with open(path, "rb") as file:
        header = files.read_header(file, "folder")
    shape, order = header.shape, "C" if header.c_order else "F"
    if header.dtype != dtype.as_numpy_dtype or len(shape) != 2 or shape[1] != dim or not shape[0]:
        raise ValueError(
            f"folder: expected {dtype.name} [rows, {dim}], got {header.dtype} {shape} in "
            f"{os.fspath(path)!r}"
        )
    return np.memmap(path, header.dtype, "r", header.offset, shape, order)
