"""Distances between given pairs of samples and centers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tf_center_loss_op._core.xla import in_xla
from tf_center_loss_op.nearest.inputs import NO_LABEL, CenterRows, checked

# About how many numbers a temporary holds.
TEMPORARY_SIZE = 2**21


def distance_to_center(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike,
    *,
    name: str | None = None,
) -> tf.Tensor:
    """Computes the distance of each sample to the center of a given class.

    Equals, summed in float64:

        tf.norm(features - tf.gather(centers, labels), axis=-1)

    In symbols, distance_i = |x_i - c_{y_i}|.

    To verify a claimed label, or to reject a predicted one, compare the distance with a threshold
    that was chosen on separate data.

    Args:
      features: as in `predict`. The distance of a sample with a NaN is NaN.
      labels: int32 or int64 ``[...]``, each in ``[0, C)``, or -1, for which the distance is NaN.
      centers: as in `predict`.
      name: a name scope for the ops.

    Returns:
      Distances ``[...]``, float64 where features or centers are, else float32. No gradient flows
      through them.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.
      tf.errors.InvalidArgumentError: a label is out of range. Compiled programs
        (``jit_compile=True``) cannot raise: there its distance is NaN.

    Determinism: the same inputs give the same bits.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tf.constant([[0.0, 0.0], [3.0, 4.0]])
    >>> tcl.nearest.distance_to_center(tf.constant([[0.0, 0.0]]), [1], centers).numpy().tolist()
    [5.0]

    Source: as `predict`.
    """
    with tf.name_scope(name or "distance_to_center"):
        features, table = checked(features, centers)
        labels = tf.convert_to_tensor(labels)
        if labels.dtype not in (tf.int32, tf.int64):
            raise TypeError(f"labels: expected dtype int32 or int64, got {labels.dtype.name}")
        if not labels.shape.is_compatible_with(features.shape[:-1]):
            raise ValueError(
                f"labels: expected shape {features.shape[:-1]}, one for each sample of features "
                f"{features.shape}, got {labels.shape}"
            )
        x = tf.reshape(features, [-1, table.width])
        y = tf.reshape(tf.cast(labels, tf.int64), [-1])
        with tf.control_dependencies([_check_labels(y, table)]):
            known = (y >= 0) & (y < table.count())
        distances = pair_distances(x, table.take, tf.range(tf.size(y)), tf.where(known, y, 0))
        distances = tf.where(known, distances, math.nan)
        return tf.ensure_shape(tf.reshape(distances, tf.shape(labels)), labels.shape)


def width(rows: tf.Tensor) -> int | tf.Tensor:
    """D of the rows [n, D], as an int where it is known while tracing."""
    return tf.shape(rows)[1] if rows.shape[1] is None else rows.shape[1]


def pair_distances(
    x: tf.Tensor, take: Callable[[tf.Tensor], tf.Tensor], sample: tf.Tensor, label: tf.Tensor
) -> tf.Tensor:
    """|x[sample] - take(label)| of each pair [P], in the dtype of x."""

    def distances_of_block(start: tf.Tensor, stop: tf.Tensor) -> list[tf.Tensor]:
        rows = take(label[start:stop])
        difference = tf.cast(tf.gather(x, sample[start:stop]), tf.float64)
        difference -= tf.cast(rows, tf.float64)
        return [tf.cast(tf.norm(difference, axis=1), x.dtype)]

    size = tf.maximum(1, TEMPORARY_SIZE // 4 // width(x))
    return by_blocks(tf.size(label), size, distances_of_block, [(x.dtype, [None])])[0]


def by_blocks(
    count: tf.Tensor,
    size: int | tf.Tensor,
    function: Callable[[tf.Tensor, tf.Tensor], Sequence[tf.Tensor]],
    specs: Sequence[tuple[tf.DType, list[int | None]]],
) -> Sequence[tf.Tensor]:
    """The concatenated results of ``function(start, stop)`` over blocks of the range [0, count).

    Args:
      count: the length of the range.
      size: the largest length of a block.
      function: returns one tensor for each of `specs`, with stop - start rows.
      specs: dtype and shape of each result.
    """
    if in_xla():
        # XLA compiles no loop whose number of results depends on values.
        return function(0, count)
    blocks = tf.maximum(1, -(-count // size))  # an empty range, too, needs a result to concatenate
    arrays = [
        tf.TensorArray(dtype, blocks, infer_shape=False, element_shape=shape)
        for dtype, shape in specs
    ]

    def body(block: tf.Tensor, *arrays: tf.TensorArray) -> tuple:
        start = block * size
        results = function(start, tf.minimum(start + size, count))
        return block + 1, *(a.write(block, r) for a, r in zip(arrays, results, strict=True))

    # One block after another: the temporaries of parallel iterations would add up.
    _, *arrays = tf.while_loop(
        lambda block, *_: block < blocks, body, (0, *arrays), parallel_iterations=1
    )
    return [array.concat() for array in arrays]


def _check_labels(y: tf.Tensor, table: CenterRows) -> tf.Tensor | bool:
    """Raises when it runs, unless each label is in [0, C) or -1."""
    if in_xla():
        return True
    rows = table.count()
    bad = (y < NO_LABEL) | (y >= rows)

    def raise_at_first_bad() -> tf.Tensor:
        i = tf.where(bad)[0, 0]
        message = "labels[{}] = {} is outside [0, {}) and not -1"
        message = tf.strings.format(message, (i, tf.gather(y, i), rows))
        with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
            return tf.constant(False)

    return tf.cond(tf.reduce_any(bad), raise_at_first_bad, lambda: True)
