"""Saves a table of centers to a NumPy file, and loads it, block by block."""

from __future__ import annotations

import math
import os
from typing import BinaryIO, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op._core.variables import resource_table
from tf_center_loss_op.tables import whole_files
from tf_center_loss_op.tables.blocks import blocks, write_rows


def save(centers: tf.Variable | keras.Variable, path: str | bytes | os.PathLike) -> None:
    """Writes the table to a NumPy file (``.npy``), block by block.

    Equals ``numpy.save(path, centers.numpy())``, which would copy the whole table.

    The file appears under its name only when it is complete and on the disk: a process that is
    killed before that leaves the old file as it was, and the next `save` into the folder removes
    the scratch file. The mode of a file that is replaced stays, and a symbolic link is followed.
    ``numpy.load(path, mmap_mode="r")`` reads it.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: the path of the file, in a folder that exists.

    Raises:
      TypeError: centers is no such variable, or path is no path.
      ValueError: centers is of another rank.
      OSError: the file cannot be written.

    >>> import os, tempfile
    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(1000, 64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tcl.tables.save(centers, os.path.join(folder, "centers.npy"))
    ...     tcl.tables.load(centers, os.path.join(folder, "centers.npy"))
    """
    table, path = resource_table(centers), whole_files.checked_path("path", path)
    dtype = np.dtype(table.dtype.as_numpy_dtype)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(table.shape),
    }
    with whole_files.replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for begin, end in blocks(table.shape, dtype.itemsize):
            file.write(memoryview(tf.gather(table, tf.range(begin, end)).numpy()).cast("B"))


def load(centers: tf.Variable | keras.Variable, path: str | bytes | os.PathLike) -> None:
    """Reads a NumPy file (``.npy``) into the table, in place and block by block.

    Equals ``centers.assign(numpy.load(path))``, which would hold further copies of the table.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: the path of a ``.npy`` file, as `save` writes it, that holds an array of the shape and
        dtype of the centers.

    Raises:
      TypeError: centers is no such variable, or path is no path.
      OSError: the file is not there, or cannot be read.
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
    table, path = resource_table(centers), whole_files.checked_path("path", path)
    with open(path, "rb") as file:
        header = read_header(file, "path")
        expected = f"{table.dtype.name} {tuple(table.shape)} as the centers are"
        if header.shape != tuple(table.shape) or header.dtype != table.dtype.as_numpy_dtype:
            raise ValueError(
                f"path: expected {expected}, got {header.dtype} {header.shape} in {path!r}"
            )
        if not header.c_order:
            raise ValueError(
                f"path: expected an array in C order, got one in Fortran order in {path!r}"
            )
        # Read into a buffer, because the pages of a mapped file count as memory of the process.
        file.seek(header.offset)
        for begin, end in blocks(header.shape, header.dtype.itemsize):
            block = np.fromfile(file, header.dtype, (end - begin) * header.shape[1])
            write_rows(table, begin, end, block.reshape(end - begin, header.shape[1]))


class Header(NamedTuple):
    """What a ``.npy`` file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    c_order: bool
    offset: int  # of the first number in the file


def read_header(file: BinaryIO, argument: str) -> Header:
    """Reads the header of a ``.npy`` file whose numbers are all there.

    Args:
      file: opened at its begin.
      argument: the name of the argument that the error is about.

    Raises:
      ValueError: it is no such file.
    """
    wanted = f"{argument}: expected a complete .npy file of numbers, got {os.fspath(file.name)!r}"
    magic = file.read(np.lib.format.MAGIC_LEN)
    if magic.startswith(b"PK"):
        raise ValueError(f"{argument}: expected a .npy file of one array, got {file.name!r}")
    readers = {
        b"\x93NUMPY\x01\x00": np.lib.format.read_array_header_1_0,
        b"\x93NUMPY\x02\x00": np.lib.format.read_array_header_2_0,
    }
    if magic not in readers:
        raise ValueError(f"{wanted}: it does not begin as one")
    try:
        shape, fortran_order, dtype = readers[magic](file)
    # NumPy parses the header as Python and lets every error of the parser through.
    except Exception as error:
        raise ValueError(f"{wanted}: {type(error).__name__}: {error}") from error
    if dtype.hasobject or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{wanted}: its header describes {dtype} {shape}")
    header = Header(
        shape, dtype, not fortran_order or max(shape, default=1) == math.prod(shape), file.tell()
    )
    needed, size = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
    if size - header.offset < needed:
        raise ValueError(
            f"{wanted}: it has {size - header.offset} of {needed} bytes of {dtype} {shape}"
        )
    return header
