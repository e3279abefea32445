"""Saves a table of centers to a NumPy file, and loads it, block by block."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op._core.variables import resource_table
from tf_center_loss_op.tables.blocks import blocks, write_rows


def save(centers: tf.Variable | keras.Variable, path: str | os.PathLike) -> None:
    """Writes the table to a NumPy file (``.npy``), block by block.

    Equals ``numpy.save(path, centers.numpy())``, which would copy the whole table.

    The file appears under its name only when it is complete and on the disk: a process that is
    killed before that leaves the old file as it was. ``numpy.load(path, mmap_mode="r")`` reads it.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: the path of the file, in a folder that exists.

    Raises:
      TypeError: centers is no such variable.
      ValueError: centers is of another rank.
      OSError: the file cannot be written.

    >>> import os, tempfile
    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(1000, 64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tcl.tables.save(centers, os.path.join(folder, "centers.npy"))
    ...     tcl.tables.load(centers, os.path.join(folder, "centers.npy"))
    """
    table, path = resource_table(centers), Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {str(path)!r}")
    descriptor, scratch = tempfile.mkstemp(".tmp", path.name, path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            dtype = np.dtype(table.dtype.as_numpy_dtype)
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": tuple(table.shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for begin, end in blocks(table.shape, dtype.itemsize):
                file.write(memoryview(tf.gather(table, tf.range(begin, end)).numpy()).cast("B"))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets only the owner read its files.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def load(centers: tf.Variable | keras.Variable, path: str | os.PathLike) -> None:
    """Reads a NumPy file (``.npy``) into the table, in place and block by block.

    Equals ``centers.assign(numpy.load(path))``, which would hold further copies of the table.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: the path of a ``.npy`` file, as `save` writes it, that holds an array of the shape and
        dtype of the centers.

    Raises:
      TypeError: centers is no such variable.
      FileNotFoundError: there is no such file.
      ValueError: centers is of another rank; or the file is no ``.npy`` file, is cut off, or holds
        an array of another shape or dtype. The table is unchanged.

    >>> import os, tempfile
    >>> import numpy as np
    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "centers.npy")
    ...     np.save(path, np.ones([3, 2], np.float32))
    ...     tcl.tables.load(centers, path)
    >>> tcl.tables.rows([2], centers).numpy().tolist()
    [[1.0, 1.0]]
    """
    table = resource_table(centers)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"path: expected a complete .npy file of numbers, got {os.fspath(path)!r}: {error}"
        ) from error
    if not isinstance(rows, np.ndarray):
        raise ValueError(f"path: expected a .npy file of one array, got {os.fspath(path)!r}")
    expected = f"{table.dtype.name} {tuple(table.shape)} as the centers are"
    if rows.shape != tuple(table.shape) or rows.dtype != table.dtype.as_numpy_dtype:
        raise ValueError(
            f"path: expected {expected}, got {rows.dtype} {rows.shape} in {os.fspath(path)!r}"
        )
    if not rows.flags.c_contiguous:
        raise ValueError(
            f"path: expected an array in C order, got one in Fortran order in {os.fspath(path)!r}"
        )
    # Read into a buffer, because the pages of a mapped file count as memory of the process.
    with open(path, "rb") as file:
        file.seek(rows.offset)
        for begin, end in blocks(rows.shape, rows.itemsize):
            block = np.fromfile(file, rows.dtype, (end - begin) * rows.shape[1])
            write_rows(table, begin, end, block.reshape(end - begin, rows.shape[1]))


def sync_to_disk(path: Path) -> None:
    """Waits until a file or folder that has been written is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
