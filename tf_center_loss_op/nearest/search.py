"""Searches the k nearest centers of a batch of samples, block of rows by block of rows."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core.xla import in_xla
from tf_center_loss_op.nearest.distances import pair_distances
from tf_center_loss_op.nearest.inputs import NO_LABEL, CenterRows


def nearest(x: tf.Tensor, table: CenterRows, k: int, block: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The labels and distances [n, k] of the nearest centers of the samples x [n, D].

    Args:
      x: in the dtype of the distances.
      table: the centers.
      k: how many centers for each sample.
      block: how many rows of the table are read at a time.
    """
    finite = tf.reduce_all(tf.math.is_finite(x), axis=1)
    x = tf.where(finite[:, tf.newaxis], x, 0)
    # A shift of the origin leaves the distances unchanged and reduces the rounding errors of
    # |c|^2 - 2 x.c.
    origin = tf.reduce_mean(x, axis=0)
    rows = table.count()
    n = tf.shape(x)[0]

    compiled = in_xla()
    if compiled:
        block = min(block, table.static_rows or block)

    def body(start: tf.Tensor, labels: tf.Tensor, distances: tf.Tensor) -> tuple:
        if compiled:
            found = _all_distances(x, table, start, block)
        else:
            found = _candidate_distances(x, table, start, block, origin, distances, k)
        # Of equal distances top_k takes the first, and earlier blocks have lower labels.
        negative, place = tf.math.top_k(-tf.concat([distances, found], 1), k)
        place = tf.cast(place, tf.int64)
        earlier = tf.gather(labels, tf.minimum(place, k - 1), batch_dims=1)
        return start + block, tf.where(place < k, earlier, start + place - k), -negative

    start = (
        tf.constant(0, tf.int64),
        tf.fill([n, k], tf.constant(NO_LABEL, tf.int64)),
        tf.fill([n, k], tf.constant(math.inf, table.dtype)),
    )
    _, labels, distances = tf.while_loop(
        lambda start, *_: start < rows, body, start, parallel_iterations=1
    )
    finite = finite[:, tf.newaxis]
    return tf.where(finite, labels, NO_LABEL), tf.where(finite, distances, math.nan)


def _all_distances(x: tf.Tensor, table: CenterRows, start: tf.Tensor, block: int) -> tf.Tensor:
    """The distances [n, block] to the rows from `start` on, infinite beyond the last row."""
    row = start + tf.range(block, dtype=tf.int64)
    centers = table.take(tf.minimum(row, table.count() - 1))
    centers = tf.cast(centers, tf.float64)
    # Sample by sample: for all samples at once XLA would hold the differences [n, block, D].
    exact = tf.map_fn(
        lambda one: tf.cast(tf.norm(tf.cast(one, tf.float64) - centers, axis=1), x.dtype), x
    )
    return tf.where(tf.math.is_nan(exact) | (row >= table.count()), math.inf, exact)


def _candidate_distances(
    x: tf.Tensor,
    table: CenterRows,
    start: tf.Tensor,
    block: int,
    origin: tf.Tensor,
    distances: tf.Tensor,
    k: int,
) -> tf.Tensor:
    """The distances [n, <= block] to the candidates among the rows, infinite to the other rows."""
    stop = tf.minimum(start + block, table.count())
    centers = table.block(start, stop)
    candidates = _candidates(x, centers, origin, distances, k)
    sample, row = candidates[:, 0], candidates[:, 1]
    exact = pair_distances(x, lambda y: tf.gather(centers, y), sample, row)
    exact = tf.where(tf.math.is_nan(exact), math.inf, exact)
    shape = tf.stack([tf.shape(x, tf.int64)[0], stop - start])
    return tf.tensor_scatter_nd_update(
        tf.fill(shape, tf.constant(math.inf, table.dtype)), candidates, exact
    )


def _candidates(
    x: tf.Tensor, centers: tf.Tensor, origin: tf.Tensor, distances: tf.Tensor, k: int
) -> tf.Tensor:
    """The pairs [P, 2] of a sample and a row that may be among the sample's k nearest.

    Compares score = |x - c|^2 - |x|^2 = |c|^2 - 2 x.c, whose rounding error is at most `error`,
    with the k-th smallest upper bound so far.

    Args:
      x: the samples [n, D].
      centers: a block of rows [m, D].
      origin: what is subtracted from both.
      distances: the k smallest distances of each sample to earlier rows, [n, k].
      k: how many centers are searched for each sample.
    """
    limits = np.finfo(x.dtype.as_numpy_dtype)
    # D products and sums, and 8 more roundings for the shift of the origin and the rest.
    rounding = (x.shape[1] + 8) * float(limits.eps)
    product = rounding
    if tf.config.list_physical_devices("GPU"):
        # A GPU's matmul uses TensorFloat-32 by default, which keeps ten bits of the factors.
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
        product += 2.0**-9 if tf32 else 0.0
    underflow = x.shape[1] * float(limits.tiny)  # the error of products that underflow
    # A row of zeros after k others of its block is not among the k nearest, because the lower
    # labels win. A table in its first epoch is mostly zeros, and all of them would be candidates.
    zero = tf.reduce_all(centers == 0, axis=1)
    surplus = zero & (tf.cumsum(tf.cast(zero, tf.int32)) > k)
    x, centers = x - origin, centers - origin
    square_x, square_c = tf.reduce_sum(x * x, 1, keepdims=True), tf.reduce_sum(centers**2, 1)
    norm_x, norm_c = tf.sqrt(square_x + underflow), tf.sqrt(square_c + underflow)
    score = square_c - 2 * tf.matmul(x, centers, transpose_b=True)
    error = product * norm_c * (2 * norm_x + norm_c) + 4 * underflow
    highest = tf.where(surplus, math.inf, score + error)
    bounds = tf.concat([distances**2 - square_x, highest], 1)
    bounds = tf.where(tf.math.is_nan(bounds), math.inf, bounds)
    bound = -tf.math.top_k(-bounds, k).values[:, -1:]
    # Distances that differ by less than this are rounded to the same number, and then the lower
    # label wins.
    bound += 2 * rounding * (tf.abs(bound) + square_x) + 4 * underflow
    # Not `<=`: a NaN, which an overflow leaves, must not rule a center out.
    return tf.where(~((score - error > bound) | surplus))
