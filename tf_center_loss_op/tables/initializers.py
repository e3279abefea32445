"""Initializers that make a table of centers block by block."""

from __future__ import annotations

import random
from collections.abc import Callable

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op.tables import blocks, memory


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class RandomNormal(keras.initializers.Initializer):
    """Normal random numbers with mean 0, made block by block in the table's own memory.

    Equals in distribution, but without the two or three tables that it holds while it runs:

        keras.initializers.RandomNormal(0.0, stddev, seed)

    Args:
      stddev: the standard deviation, a number >= 0.
      seed: an int of 64 bits (of Python or NumPy), which gives the same numbers in every call; or
        None, which gives other numbers in every call, in a sequence that
        `keras.utils.set_random_seed` restarts.

    Raises:
      TypeError, ValueError: an argument is not one of these.

    Determinism: the same seed, shape and dtype give the same bits.

    >>> import tf_center_loss_op as tcl
    >>> layer = tcl.CenterLoss(1000, centers_initializer=tcl.tables.RandomNormal(0.1, seed=0))
    """

    def __init__(self, stddev: float = 1.0, seed: int | None = None):
        self.stddev = arguments.number("stddev", stddev)
        self.seed = None if seed is None else arguments.integer("seed", seed)

    def __call__(self, shape: tuple[int, ...], dtype: str | tf.DType | None = None) -> tf.Tensor:
        """The numbers of a table [C, D]."""
        dtype = tf.as_dtype(dtype or keras.config.floatx())
        return blocks.filled(tuple(shape), dtype, self.blocks(shape, dtype))

    def blocks(
        self, shape: tuple[int, ...], dtype: str | tf.DType
    ) -> Callable[[int, int], tf.Tensor]:
        """A function that gives the rows [begin, end) of each of the table's blocks."""
        # Keras draws its own seeds from the same generator.
        seed = random.getrandbits(31) if self.seed is None else self.seed

        def block(begin: int, end: int) -> tf.Tensor:
            numbers = [end - begin, *shape[1:]]
            return self.stddev * tf.random.stateless_normal(numbers, [seed, begin], dtype=dtype)

        return block

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {"stddev": self.stddev, "seed": self.seed}


def makes_any_rows(initializer: keras.initializers.Initializer) -> bool:
    """Whether `initial_rows` takes the initializer."""
    constants = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    return isinstance(initializer, (*constants, RandomNormal))


def initial_rows(
    initializer: keras.initializers.Initializer, shape: tf.TensorShape, dtype: tf.DType
) -> Callable[[int, int], tf.Tensor]:
    """A function that gives any rows [begin, end) of a table of this shape.

    Raises:
      ValueError: the initializer makes whole tables only.
    """
    if not makes_any_rows(initializer):
        kind = type(initializer)
        raise ValueError(
            "initializer: expected zeros, ones, a constant or tf_center_loss_op.tables."
            "RandomNormal, which can make any range of rows, got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if not isinstance(initializer, RandomNormal):
        make = memory.in_place(initializer)
        return lambda begin, end: make((end - begin, shape[1]), dtype.name)
    block_of = initializer.blocks(tuple(shape), dtype)
    ranges = blocks.blocks(shape, dtype.size)

    def rows(begin: int, end: int) -> tf.Tensor:
        # The numbers of a block depend on its first row, so whole blocks are made and cut.
        overlaps = [(b, e) for b, e in ranges if b < end and begin < e]
        return tf.concat([block_of(b, e)[max(begin - b, 0) : end - b] for b, e in overlaps], axis=0)

    return lambda begin, end: blocks.filled(
        (end - begin, shape[1]), dtype, lambda b, e: rows(begin + b, begin + e)
    )
