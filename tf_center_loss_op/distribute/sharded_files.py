"""The files of a sharded table: one NumPy file for each shard, and a state file that names them.

The state file is replaced when all shards of a save are on the disk. Until then the previous save
is the valid one, also if the job is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op.tables import files

_STATE_FILE = "sharded_centers.json"


class Save:
    """One save of a table in a folder, which is created if it does not exist."""

    def __init__(self, folder: str | os.PathLike, num_shards: int):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        is_first = not (self._folder / _STATE_FILE).exists()
        self._serial = 1 if is_first else _state(self._folder)["serial"] + 1
        self._num_shards = num_shards

    def write_shard(self, index: int, variable: tf.Variable) -> None:
        """Writes the shard of the replica with this index."""
        files.save(variable, self._folder / _name(self._serial, index, self._num_shards))

    def complete(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        """Makes this the valid save, once all shards are written, and removes the previous one."""
        state = {"serial": self._serial, "parts": self._num_shards}
        state |= {"shape": shape.as_list(), "dtype": dtype.name}
        _replace(self._folder / _STATE_FILE, json.dumps(state))
        current = {_name(self._serial, k, self._num_shards) for k in range(self._num_shards)}
        for path in self._folder.glob("centers-*.npy"):
            if path.name not in current:
                path.unlink()


def shards(
    folder: str | os.PathLike, shape: tf.TensorShape, dtype: tf.DType
) -> Iterator[np.ndarray]:
    """The shards of the last complete save, in order, as memory-mapped arrays.

    Raises:
      FileNotFoundError: there is no complete save in the folder.
      ValueError: the save is of a table of another shape or type, or a file is incomplete.
    """
    folder = Path(folder)
    state = _state(folder)
    if [state["shape"], state["dtype"]] != [shape.as_list(), dtype.name]:
        raise ValueError(
            f"folder: expected a table {dtype.name} {shape}, got {state['dtype']} "
            f"{tuple(state['shape'])} in {os.fspath(folder)!r}"
        )
    for k in range(state["parts"]):
        yield _rows(folder / _name(state["serial"], k, state["parts"]), dtype, shape[1])


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _STATE_FILE).read_text())


def _name(serial: int, index: int, num_shards: int) -> str:
    return f"centers-{serial:09d}-{index:05d}-of-{num_shards:05d}.npy"


def _replace(path: Path, text: str) -> None:
    """Replaces a file by one with this text; a killed process leaves the old or the new one."""
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _rows(path: Path, dtype: tf.DType, dim: int) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"folder: expected a complete file {os.fspath(path)!r}: {error}"
        ) from error
    if rows.dtype != dtype.as_numpy_dtype or rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(
            f"folder: expected {dtype.name} [rows, {dim}], got {rows.dtype} {rows.shape} in "
            f"{os.fspath(path)!r}"
        )
    return rows
