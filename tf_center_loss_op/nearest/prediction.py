"""Predicts classes by the nearest centers."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op.nearest.calls import SAMPLES, search
from tf_center_loss_op.nearest.inputs import NO_LABEL, checked

# How many numbers a block of rows or of scores has: a few megabytes stay in the caches.
_BLOCK_SIZE = 2**20


def predict(
    features: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike,
    *,
    k: int = 1,
    threshold: tf.types.experimental.TensorLike | None = None,
    block: int | None = None,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the classes whose centers are nearest to each sample, and the distances to them.

    Equals, without the ``[B, C, D]`` and ``[B, C]`` tensors:

        distances = tf.norm(features[:, None, :] - centers[None, :, :], axis=-1)
        labels = tf.argmin(distances, axis=1)
        distances = tf.reduce_min(distances, axis=1)
        labels = tf.where(distances > threshold, -1, labels)  # where a threshold is given

    In symbols, label_i = argmin over j of |x_i - c_j|.

    The table is read in blocks of rows and never as a whole. Each distance is correct to about its
    last digit, also far from the origin. Of equal distances, the lowest label comes first. The
    first eager call with a dtype and k traces a ``tf.function``, which later ones share.

    Args:
      features: float32, float64, float16 or bfloat16 ``[..., D]``. A sample with a NaN or an
        infinity has label -1 and distance NaN.
      centers: ``[C, D]``, a ``tf.Variable``, ``keras.Variable``, tensor or NumPy array of one of
        these dtypes. A memory-mapped array stays on disk, also inside a ``tf.function``; under
        ``jit_compile=True`` it becomes a constant of the program. A center with a NaN or an
        infinity is never among the nearest.
      k: the number of centers for each sample, in ``[1, C]``.
      threshold: a number or scalar tensor >= 0. A label at a larger distance becomes -1,
        "unknown"; its distance stays. None: no label is replaced.
      block: how many classes are read at a time, >= 1; the default keeps each temporary at about
        4 MB.
      name: a name scope for the ops.

    Returns:
      labels int64 and distances (float64 where features or centers are, else float32), nearest
      first: ``[..., k]``, for k = 1 ``[...]``. Where fewer than k centers are finite, the remaining
      places have label -1 and distance infinity. No gradient flows through either.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.

    Determinism: the same inputs give the same bits, for every ``block``.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tf.constant([[0.0, 0.0], [3.0, 4.0]])
    >>> features = tf.constant([[3.0, 3.0], [9.0, 12.0]])
    >>> labels, distances = tcl.nearest.predict(features, centers)
    >>> labels.numpy().tolist(), distances.numpy().tolist()
    ([1, 1], [1.0, 10.0])
    >>> tcl.nearest.predict(features, centers, threshold=5.0)[0].numpy().tolist()
    [1, -1]

    Source: open-set rejection by distance to the class mean: Bendale and Boult, "Towards Open Set
    Deep Networks", CVPR 2016.
    """
    with tf.name_scope(name or "predict"):
        features, table = checked(features, centers)
        k = arguments.positive("k", k)
        if table.static_rows is not None and k > table.static_rows:
            raise ValueError(
                f"k: expected at most C = {table.static_rows}, the rows of centers, got {k}"
            )
        threshold = None if threshold is None else _scalar(threshold, table.dtype)
        if block is None:
            block = max(1, _BLOCK_SIZE // max(SAMPLES, table.width))
        else:
            block = arguments.positive("block", block)
        outer = tf.shape(features)[:-1]
        x = tf.reshape(features, [-1, table.width])
        labels, distances = search(x, table, k, block)
        if threshold is not None:
            # Not `distances > threshold`: a NaN has label -1 already.
            labels = tf.where(distances <= threshold, labels, NO_LABEL)
        shape = outer if k == 1 else tf.concat([outer, [k]], 0)
        static = features.shape[:-1] if k == 1 else features.shape[:-1] + [k]
        return tuple(
            tf.ensure_shape(tf.reshape(value, shape), static) for value in (labels, distances)
        )


def _scalar(threshold: Any, dtype: tf.DType) -> tf.Tensor:
    if tf.is_tensor(threshold) or isinstance(threshold, (tf.Variable, keras.Variable)):
        value = tf.convert_to_tensor(threshold)
        if not value.shape.is_compatible_with([]):
            raise ValueError(f"threshold: expected a scalar, got shape {value.shape}")
        return tf.cast(value, dtype)
    return tf.constant(arguments.number("threshold", threshold), dtype)
