"""Writes and reads a table of centers in the HDF5 files of Keras, block by block."""

from __future__ import annotations

import math

import h5py
import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis
from tf_center_loss_op._core.variables import resource_table
from tf_center_loss_op.tables.blocks import blocks, write_rows

# HDF5 decompresses a whole chunk for each read of a block, so a chunk must not be larger than one.
_MOST_CHUNK_BYTES = 2**26


def h5_group(store: object) -> h5py.Group | None:
    """The HDF5 group behind a store of Keras's `save_weights` and `model.save`.

    None for other stores: those of NumPy files, and those that split the weights over several
    files, where Keras decides which variable goes into which file.
    """
    group = private_apis.h5_entry_group(store)
    # Keras represents an empty group that it has not made yet by a dict.
    one_file = isinstance(group, h5py.Group) and not hasattr(store, "sharding_config")
    return group if one_file else None


def write_h5(group: h5py.Group, key: str, centers: tf.Variable | keras.Variable) -> None:
    """Equals ``group[key] = centers.numpy()``, block by block."""
    table = resource_table(centers)
    dtype = table.dtype.as_numpy_dtype
    rows = group.create_dataset(key, shape=tuple(table.shape), dtype=dtype)
    for begin, end in blocks(table.shape, table.dtype.size):
        rows[begin:end] = tf.gather(table, tf.range(begin, end)).numpy()


def read_h5(group: h5py.Group, key: str, centers: tf.Variable | keras.Variable) -> None:
    """Equals ``centers.assign(group[key])``, block by block.

    Raises:
      ValueError: the file does not hold a whole array of the shape and dtype of the centers, or
        holds it in chunks that are larger than a block. The table is unchanged.
    """
    table, rows = resource_table(centers), whole_dataset(group, key)
    name = _name(group, key)
    if rows.shape != tuple(table.shape) or rows.dtype != table.dtype.as_numpy_dtype:
        raise ValueError(
            f"centers: expected {table.dtype.name} {tuple(table.shape)} in the file, as the "
            f"layer's are, got {rows.dtype} {rows.shape} in {name}"
        )
    for begin, end in blocks(table.shape, table.dtype.size):
        write_rows(table, begin, end, rows[begin:end])


def whole_dataset(group: h5py.Group, key: str) -> h5py.Dataset:
    """A dataset of which every number is in the file, in chunks that can be read one at a time.

    Raises:
      ValueError: it is none. HDF5 would return zeros for numbers that are missing.
    """
    rows, name = group[key], _name(group, key)
    linked = not isinstance(group.get(key, getlink=True), h5py.HardLink)
    if linked or not isinstance(rows, h5py.Dataset) or rows.external or rows.is_virtual:
        raise ValueError(
            f"centers: expected an array in the file itself, got a group or a link in {name}"
        )
    if not rows.size:
        raise ValueError(f"centers: expected an array in the file, got none in {name}")
    if not rows.chunks:
        if rows.id.get_storage_size() < rows.nbytes:
            raise ValueError(
                f"centers: expected an array in the file, got a file that is cut off: {name}"
            )
        return rows
    in_file = rows.id.get_num_chunks()
    count = math.prod(
        -(-size // chunk) for size, chunk in zip(rows.shape, rows.chunks, strict=True)
    )
    if in_file < count:
        raise ValueError(
            f"centers: expected all {count} chunks of an array in the file, got {in_file}: {name}"
        )
    bytes_of_chunk = math.prod(rows.chunks) * rows.dtype.itemsize
    # Chunks at the ends may reach beyond the array, by less than its size in each dimension.
    if bytes_of_chunk > _MOST_CHUNK_BYTES or (
        count * bytes_of_chunk > _MOST_CHUNK_BYTES + 2**rows.ndim * rows.nbytes
    ):
        raise ValueError(
            f"centers: expected chunks of at most {_MOST_CHUNK_BYTES} bytes, of about the array's "
            f"{rows.nbytes} in all, got {count} of {bytes_of_chunk} in {name}"
        )
    plain = rows.id.get_create_plist().get_nfilters() == 0
    if plain and rows.id.get_storage_size() < count * bytes_of_chunk:
        raise ValueError(
            f"centers: expected {count} whole chunks in the file, got some that are cut off: {name}"
        )
    return rows


def _name(group: h5py.Group, key: str) -> str:
    return f"{group.file.filename!r}, {group.name}/{key}"
