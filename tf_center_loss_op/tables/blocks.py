"""Blocks of consecutive rows, the unit in which a large table is filled, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import private_apis
from tf_center_loss_op.tables import memory

# The memory that filling, saving or loading a table needs beside the table.
BLOCK_BYTES = 2**26


def rows_per_block(dim: int, itemsize: int) -> int:
    """How many rows of ``dim`` numbers fit into a block, at least one."""
    return max(1, BLOCK_BYTES // (int(dim) * itemsize))


def blocks(shape: tuple[int, ...] | tf.TensorShape, itemsize: int) -> list[tuple[int, int]]:
    """The row ranges [begin, end) of the blocks of a table [C, D], in order."""
    step = rows_per_block(shape[1], itemsize)
    return [(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step)]


def write_rows(table: tf.Variable, begin: int, end: int, rows: np.ndarray | tf.Tensor) -> None:
    """Writes the rows [begin, end) of a table in place."""
    table.scatter_update(tf.IndexedSlices(rows, tf.range(begin, end)))


def filled(
    shape: tuple[int, ...], dtype: tf.DType, block: Callable[[int, int], tf.Tensor]
) -> tf.Tensor:
    """A tensor [C, D] whose rows [begin, end) are ``block(begin, end)``.

    Raises:
      MemoryError: the available memory does not hold the tensor.
    """
    if not tf.config.list_physical_devices("GPU"):
        memory.check_room(shape, dtype, memory.AVAILABLE)
    # In the scope of a strategy, tf.Variable would make one table for each replica.
    with memory.out_of_memory(shape, dtype):
        table = private_apis.ResourceVariable(lambda: memory.zeros(shape, dtype), trainable=False)
        for begin, end in blocks(shape, dtype.size):
            write_rows(table, begin, end, block(begin, end))
    # A read of the variable then returns its buffer and not a copy.
    tf.raw_ops.DisableCopyOnRead(resource=table.handle)
    return table.read_value()
