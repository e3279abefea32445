"""The files of a sharded table: one NumPy file for each part, and a file that names the parts.

A save counts when that file names its parts: it is replaced when all parts are on the disk, so a
job killed meanwhile leaves the save before it.
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

_SAVED = "sharded_centers.json"


class Save:
    """One save of a table in a folder, which is made where there is none."""

    def __init__(self, folder: str | os.PathLike, num_parts: int):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        is_first = not (self._folder / _SAVED).exists()
        self._serial = 1 if is_first else _saved(self._folder)["serial"] + 1
        self._num_parts = num_parts

    def write_part(self, index: int, variable: tf.Variable) -> None:
        """Writes a part."""
        files.save(variable, self._folder / _part(self._serial, index, self._num_parts))

    def complete(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        """Makes the save count, when all parts are written, and removes the one before."""
        state = {"serial": self._serial, "parts": self._num_parts}
        state |= {"shape": shape.as_list(), "dtype": dtype.name}
        _write_whole(self._folder / _SAVED, json.dumps(state))
        current = {_part(self._serial, k, self._num_parts) for k in range(self._num_parts)}
        for path in self._folder.glob("centers-*.npy"):
            if path.name not in current:
                path.unlink()


def parts(
    folder: str | os.PathLike, shape: tf.TensorShape, dtype: tf.DType
) -> Iterator[np.ndarray]:
    """The parts of the last complete save, in order, as memory-mapped arrays.

    Raises:
      FileNotFoundError: there is no complete save in the folder.
      ValueError: it is of a table of another shape or type, or a file is not whole.
    """
    folder = Path(folder)
    state = _saved(folder)
    if [state["shape"], state["dtype"]] != [shape.as_list(), dtype.name]:
        raise ValueError(
            f"folder: expected a table {dtype.name} {shape}, got {state['dtype']} "
            f"{tuple(state['shape'])} in {os.fspath(folder)!r}"
        )
    for k in range(state["parts"]):
        yield _rows(folder / _part(state["serial"], k, state["parts"]), dtype, shape[1])


def _saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _SAVED).read_text())


def _part(serial: int, index: int, num_parts: int) -> str:
    return f"centers-{serial:09d}-{index:05d}-of-{num_parts:05d}.npy"


def _write_whole(path: Path, text: str) -> None:
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
