"""Writes and reads a table of centers in the HDF5 files of Keras, block by block."""

from __future__ import annotations

import h5py
import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis
from tf_center_loss_op._core.variables import resource_table
from tf_center_loss_op.tables.blocks import blocks, write_rows


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
      ValueError: the file does not hold an array of the shape and dtype of the centers. The table
        is unchanged.
    """
    table, rows = resource_table(centers), group[key]
    name = f"{group.file.filename!r}, {group.name}/{key}"
    linked = not isinstance(group.get(key, getlink=True), h5py.HardLink)
    if linked or not isinstance(rows, h5py.Dataset) or rows.external or rows.is_virtual:
        raise ValueError(
            f"centers: expected an array in the file itself, got a group or a link in {name}"
        )
    if rows.id.get_storage_size() == 0:
        raise ValueError(
            f"centers: expected an array in the file, got a file that is cut off: {name}"
        )
    if rows.shape != tuple(table.shape) or rows.dtype != table.dtype.as_numpy_dtype:
        raise ValueError(
            f"centers: expected {table.dtype.name} {tuple(table.shape)} in the file, as the "
            f"layer's are, got {rows.dtype} {rows.shape} in {name}"
        )
    for begin, end in blocks(table.shape, table.dtype.size):
        write_rows(table, begin, end, rows[begin:end])
