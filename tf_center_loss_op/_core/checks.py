"""Checks of what is known only when the ops run: values, and shapes that tracing does not know.

Outside XLA a failed check raises an `InvalidArgumentError`. XLA drops such checks, but it knows
every shape when it compiles: there a wrong shape is an error of the compilation.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tf_center_loss_op._core import xla


def require(condition: tf.Tensor, message: Callable[[], tf.Tensor]) -> tf.Tensor:
    """True, or an error with the text message() where the condition does not hold."""
    # A branch, so that the message is formatted only where it is needed.
    return tf.cond(condition, lambda: True, lambda: _fail(message()))


def _fail(message: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.constant(False)


def with_shape(name: str, tensor: tf.Tensor, expected: tf.Tensor, whose: str) -> tf.Tensor:
    """The tensor, or an error where its shape differs from `expected`, an integer vector.

    Args:
      name: of the argument.
      tensor: of a rank that is known, that of `expected`.
      expected: the shape, which is that of `whose`.
      whose: words for the error.
    """
    expected = tf.cast(expected, tf.int32)
    if xla.in_xla():
        # tf.stack refuses to join two shapes, and its name is part of the error.
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
