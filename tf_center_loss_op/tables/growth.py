"""Adds rows to a table when new classes join."""

from __future__ import annotations

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op._core.variables import TableLike, resource_table
from tf_center_loss_op.tables import initializers, memory
from tf_center_loss_op.tables.blocks import blocks, write_rows


def grow(
    centers: tf.Variable | keras.Variable,
    num_classes: int,
    *,
    initializer: str | keras.initializers.Initializer = "zeros",
    name: str = "centers",
) -> tf.Variable:
    """A table of more classes, whose first rows are those of a given table.

    Equals:

        new_rows = initializer([num_classes - C, D])
        tf.Variable(tf.concat([centers, new_rows], axis=0), trainable=centers.trainable, name=name)

    but holds no copy beside the two tables: the rows are copied block by block. New rows of zeros
    take up memory as their classes are seen. A variable cannot change its shape, so programs that
    hold the old one (compiled functions, layers) go on with the old one.

    For `ShardedCenters`, save the smaller table and load it into a larger one:
    ``larger.load(folder, grow=True)``.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``. It is not changed.
      num_classes: an int >= C.
      initializer: a Keras initializer or its name, for the new rows. With a seeded `RandomNormal`
        they are the rows that a new table of num_classes would have.
      name: the name of the new variable.

    Returns:
      A ``tf.Variable`` ``[num_classes, D]`` in the dtype of the centers.

    Raises:
      TypeError: centers is no such variable, or num_classes is no int.
      ValueError: num_classes is smaller than C, or the initializer is not known.
      MemoryError: the memory does not hold the new table.

    Determinism: the first C rows have the bits of the centers.

    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(10, 2, initializer="ones")
    >>> larger = tcl.tables.grow(centers, 12)
    >>> tcl.tables.rows([9, 11], larger).numpy().tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    if isinstance(centers, TableLike):
        raise TypeError(
            f"centers: expected a tf.Variable or a keras.Variable, got {type(centers).__name__}: "
            "save it, and load it into a larger one with load(folder, grow=True)"
        )
    table = resource_table(centers)
    old, dim = table.shape
    num_classes = arguments.positive("num_classes", num_classes)
    if num_classes < old:
        raise ValueError(
            f"num_classes: expected an int >= {old}, as centers has, got {num_classes}"
        )
    initializer = keras.initializers.get(initializer)
    shape, dtype = (num_classes, dim), table.dtype
    lazy = isinstance(initializer, keras.initializers.Zeros)
    if not (lazy or tf.config.list_physical_devices("GPU")):
        memory.check_room(shape, dtype, memory.AVAILABLE)
    with memory.out_of_memory(shape, dtype):
        larger = tf.Variable(
            lambda: memory.zeros(shape, dtype), trainable=table.trainable, name=name
        )
        for begin, end in blocks(table.shape, dtype.size):
            write_rows(larger, begin, end, tf.gather(table, tf.range(begin, end)))
        if not lazy:
            _fill(larger, old, initializer)
    return larger


def _fill(table: tf.Variable, first: int, initializer: keras.initializers.Initializer) -> None:
    """Writes initial numbers to the rows from `first` on."""
    rows, dim = table.shape
    if rows == first:
        return
    if not initializers.makes_any_rows(initializer):
        write_rows(table, first, rows, initializer((rows - first, dim), table.dtype.name))
        return
    make = initializers.initial_rows(initializer, table.shape, table.dtype)
    for begin, end in blocks((rows - first, dim), table.dtype.size):
        write_rows(table, first + begin, first + end, make(first + begin, first + end))
