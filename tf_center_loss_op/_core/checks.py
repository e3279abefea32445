"""Checks, when the ops run, of values and of shapes that are not known while tracing.

Outside XLA a failed check raises an `InvalidArgumentError`. XLA drops such checks, but it knows
every shape when it compiles: there a wrong shape is an error of the compilation.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tf_center_loss_op._core import xla


def require(condition: tf.Tensor, message: Callable[[], tf.Tensor]) -> tf.Tensor:
    """True; an error with the text message() if the condition does not hold."""
    # A branch, so that the message is formatted only where it is needed.
    return tf.cond(condition, lambda: True, lambda: _fail(message()))


def _fail(message: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.constant(False)


def with_shape(name: str, tensor: tf.Tensor, expected: tf.Tensor, whose: str) -> tf.Tensor:
    """The tensor; an error if its shape differs from `expected`, an integer vector.

    Args:
      name: the name of the argument, for the error.
      tensor: its rank is known and is the length of `expected`.
      expected: the expected shape.
      whose: what has the expected shape, in words, for the error.
    """
    expected = tf.cast(expected, tf.int32)
    if xla.in_xla():
        # tf.stack of two different shapes is an error of the compilation, which shows its name.
        words = f"{name} must have the shape of {whose}".replace(" ", "_")
        return tf.stack([tensor, tf.zeros(expected, tensor.dtype)], name=words)[0]
    shape = tf.shape(tensor)
    same = require(
        tf.reduce_all(tf.equal(shape, expected)),
        lambda: tf.strings.format(
            name + ": expected shape {}, that of " + whose + ", got {}", (expected, shape)
        ),
    )
    with tf.control_dependencies([same]):
        return tf.identity(tensor)
