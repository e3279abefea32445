"""Searches the k nearest centers of a batch of samples, block of rows by block of rows.

A matrix product gives the closeness 2 x.c - |c|^2 of all samples and rows of a block. Its rounding
error is bounded, and only the rows that it cannot rule out are compared exactly (`_errors`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core.xla import in_xla
from tf_center_loss_op.nearest.distances import pair_distances, width
from tf_center_loss_op.nearest.inputs import NO_LABEL, CenterRows


class _Queries(NamedTuple):
    """The samples, prepared for the matrix product."""

    x: tf.Tensor  # [n, D]
    origin: tf.Tensor  # [D], is subtracted from samples and centers
    shifted: tf.Tensor  # whether the origin is not zero
    factors: tf.Tensor  # [n, D], 2 (x - origin); zero where that is too large to be squared
    finite: tf.Tensor  # [n], whether x is finite: otherwise no row is compared
    errors: _Errors


class _Errors(NamedTuple):
    """Numbers in the bounds of the rounding errors of each sample, see `_errors`."""

    upper: tf.Tensor  # [n], infinite where every row is compared exactly
    shrink: tf.Tensor
    lower: tf.Tensor  # [n], -infinite where every row is compared exactly
    grow: tf.Tensor


class _Block(NamedTuple):
    """Some rows of the table, and how close the samples are to them."""

    rows: tf.Tensor  # [m, D]
    start: tf.Tensor  # the label of the first row
    closeness: tf.Tensor  # [n, m], 2 x.c - |c|^2 with the origin subtracted; never NaN
    unbounded: tf.Tensor  # [m], whether the row is finite but too large to be squared


def nearest(
    x: tf.Tensor, table: CenterRows, k: int, block: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The labels and distances [n, k] of the nearest centers of the samples x [n, D].

    Args:
      x: in the dtype of the distances.
      table: the centers.
      k: how many centers for each sample.
      block: how many rows of the table are read at a time, int64.
    """
    finite = tf.reduce_all(tf.math.is_finite(x), axis=1)
    x = tf.where(finite[:, tf.newaxis], x, 0)
    rows = table.count()
    n = tf.shape(x)[0]
    if in_xla():
        block = min(block, table.static_rows or block)
        queries = None
    else:
        queries = _queries(x, finite)

    def body(start: tf.Tensor, labels: tf.Tensor, distances: tf.Tensor) -> tuple:
        # Of equal distances top_k takes the first, and earlier blocks have lower labels.
        if queries is None:
            found = _all_distances(x, table, start, block)
            negative, place = tf.math.top_k(-tf.concat([distances, found], 1), k)
            place, distances = tf.cast(place, tf.int64), -negative
            earlier = tf.gather(labels, tf.minimum(place, k - 1), batch_dims=1)
            labels = tf.where(place < k, earlier, start + place - k)
        else:
            read = _read(queries, table, start, tf.minimum(start + block, rows), k)
            labels, distances = _search_block(queries, read, labels, distances, k)
        return start + block, labels, distances

    start = (
        tf.constant(0, tf.int64),
        tf.fill([n, k], tf.constant(NO_LABEL, tf.int64)),
        tf.fill([n, k], tf.constant(math.inf, table.dtype)),
    )
    _, labels, distances = tf.while_loop(
        lambda start, *_: start < rows,
        body,
        start,
        shape_invariants=(tf.TensorShape([]), *2 * [tf.TensorShape([None, k])]),
        parallel_iterations=1,
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
    return tf.where(~tf.math.is_nan(exact) & (row < table.count()), exact, math.inf)


def _largest_square(dtype: tf.DType) -> float:
    """Below this, |c|^2 - 2 x.c and its partial sums cannot overflow."""
    return float(np.finfo(dtype.as_numpy_dtype).max) / 16


def _too_large(squares: tf.Tensor) -> tf.Tensor:
    """Which squares are too large for `_largest_square`, or NaN."""
    # Not `~(squares <= largest)`: TensorFlow's graph optimizer makes `squares > largest` of it,
    # which is false for a NaN.
    return (squares > _largest_square(squares.dtype)) | tf.math.is_nan(squares)


def _median(values: tf.Tensor) -> tf.Tensor:
    half = tf.size(values) // 2
    return tf.math.top_k(values, half + 1).values[half]


def _queries(x: tf.Tensor, finite: tf.Tensor) -> _Queries:
    """The samples and the origin that keeps the numbers small, and with them the errors.

    The origin is the mean of the samples without those of a much larger norm: a single one would
    move it away from all others. It stays at zero unless a shift reduces the norms by a half: each
    shift of a block costs a pass over it.
    """
    squares = tf.reduce_sum(x * x, 1)
    padded = tf.pad(squares, [[0, 1]])  # top_k needs a number, and a batch may be empty
    usual = finite & (squares <= 4 * _median(padded))
    sums = tf.reduce_sum(tf.where(usual[:, tf.newaxis], x, 0), axis=0)
    mean = sums / tf.maximum(tf.reduce_sum(tf.cast(usual, x.dtype)), 1)
    around_mean = tf.pad(tf.reduce_sum(tf.square(x - mean), 1), [[0, 1]])
    # A comparison with NaN, from an overflow, is false.
    shifted = _median(around_mean) < _median(padded) / 4
    origin = tf.where(shifted, mean, tf.zeros_like(mean))
    moved = x - origin
    squares = tf.reduce_sum(moved * moved, 1)
    unbounded = _too_large(squares)
    factors = tf.where(unbounded[:, tf.newaxis], tf.zeros_like(x), 2 * moved)
    return _Queries(x, origin, shifted, factors, finite, _errors(x, squares, unbounded))


def _read(
    queries: _Queries, table: CenterRows, start: tf.Tensor, stop: tf.Tensor, k: int
) -> _Block:
    """The rows [start, stop) of the table, and how close the samples are to them."""
    rows = table.block(start, stop)
    squares = tf.reduce_sum(tf.square(rows), 1)

    def usual() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return rows, -squares, tf.zeros_like(squares, tf.bool)

    def unusual() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        moved = rows - queries.origin
        squares = tf.reduce_sum(tf.square(moved), 1)
        too_large = _too_large(squares)
        finite = tf.reduce_all(tf.math.is_finite(rows), axis=1)
        moved = tf.where(too_large[:, tf.newaxis], tf.zeros_like(moved), moved)
        # Rows of zeros after k others are not among the k nearest, because the lower labels win. A
        # table in its first epoch is mostly zeros, and all of them would be candidates.
        zero = tf.reduce_all(rows == 0, axis=1)
        surplus = zero & (tf.cumsum(tf.cast(zero, tf.int32)) > k)
        return moved, tf.where(~(too_large | surplus), -squares, -math.inf), too_large & finite

    # One branch for all: each tensor that a branch takes is passed on by an op of its own.
    zeros = tf.math.count_nonzero(squares == 0, dtype=tf.int32)
    is_usual = tf.reduce_all(squares <= _largest_square(rows.dtype)) & (zeros <= k)
    moved, bias, unbounded = tf.cond(is_usual & ~queries.shifted, usual, unusual)
    closeness = tf.nn.bias_add(tf.matmul(queries.factors, moved, transpose_b=True), bias)
    return _Block(rows, start, closeness, unbounded)


def _search_block(
    queries: _Queries, block: _Block, labels: tf.Tensor, distances: tf.Tensor, k: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The k nearest centers so far, with those of the block."""
    # Most blocks have no row that comes near to what was found before, for most samples.
    closest = tf.reduce_max(block.closeness, 1)
    bounds = tf.square(distances[:, -1])
    candidates = (closest >= _limits(queries.errors, bounds)) | tf.reduce_any(block.unbounded)
    samples = tf.where(candidates & queries.finite)[:, 0]

    def with_block() -> tuple[tf.Tensor, tf.Tensor]:
        known = tf.gather(bounds, samples)
        found = _exact(queries, block, samples, tf.gather(closest, samples), known, k)
        all_labels = tf.concat([tf.gather(labels, samples), found[0]], 1)
        all_distances = tf.concat([tf.gather(distances, samples), found[1]], 1)
        negative, place = tf.math.top_k(-all_distances, k)
        nearest_labels = tf.gather(all_labels, place, batch_dims=1)
        samples_column = samples[:, tf.newaxis]
        return (
            tf.tensor_scatter_nd_update(labels, samples_column, nearest_labels),
            tf.tensor_scatter_nd_update(distances, samples_column, -negative),
        )

    return tf.cond(tf.size(samples) > 0, with_block, lambda: (labels, distances))


def _exact(
    queries: _Queries,
    block: _Block,
    samples: tf.Tensor,
    closest: tf.Tensor,
    bounds: tf.Tensor,
    k: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels and distances [a, w] of the rows that may be among the k nearest of a sample.

    Args:
      queries: all samples.
      block: the rows.
      samples: [a], the samples to search for, as indices.
      closest: [a], the largest closeness of each.
      bounds: [a], squares that the k-th smallest distance of each does not exceed.
      k: how many centers are searched.

    Returns:
      In ascending order of the labels, filled with infinite distances: w is the largest number of
      candidates of a sample.
    """
    upper, shrink, lower, grow = queries.errors
    errors = _Errors(tf.gather(upper, samples), shrink, tf.gather(lower, samples), grow)
    closeness = tf.gather(block.closeness, samples)
    if k > 1:
        m = tf.shape(closeness)[1]
        closest = tf.math.top_k(closeness, tf.minimum(k, m)).values[:, -1]
        closest = tf.where(m >= k, closest, -math.inf)
    bounds = tf.minimum(bounds, _bounds(errors, closest))
    limits = _limits(errors, bounds)
    pairs = tf.where((closeness >= limits[:, tf.newaxis]) | block.unbounded)
    sample, row = pairs[:, 0], pairs[:, 1]
    exact = pair_distances(
        queries.x, lambda y: tf.gather(block.rows, y), tf.gather(samples, sample), row
    )
    exact = tf.where(~tf.math.is_nan(exact), exact, math.inf)
    # The pairs are sorted, first by the sample and then by the row.
    count = tf.size(samples, tf.int64)
    first = tf.searchsorted(sample, tf.range(count), out_type=tf.int64)
    column = tf.range(tf.size(sample, tf.int64)) - tf.gather(first, sample)
    shape = tf.stack([count, tf.reduce_max(tf.concat([column, [-1]], 0)) + 1])
    place = tf.stack([sample, column], 1)
    labels = tf.fill(shape, tf.constant(NO_LABEL, tf.int64))
    distances = tf.fill(shape, tf.constant(math.inf, exact.dtype))
    return (
        tf.tensor_scatter_nd_update(labels, place, block.start + row),
        tf.tensor_scatter_nd_update(distances, place, exact),
    )


def _errors(x: tf.Tensor, squares: tf.Tensor, unbounded: tf.Tensor) -> _Errors:
    """Bounds of the rounding errors for samples [n, D] with these squared norms.

    The computed closeness differs from |x|^2 - |x - c|^2 by at most p (|x| + |c|)^2, and by what
    products lose that underflow; the origin is subtracted from both. With |c| <= |x| + d, the
    distance d to a row fulfils

        d^2 <= |x|^2 - closeness + p (2 |x| + d)^2,  (2 |x| + d)^2 <= 8 |x|^2 + 2 d^2

    and the same with signs reversed. So the norm of the row is not needed, and no other row
    matters, however large it is. This holds for D below a million.
    """
    limits = np.finfo(x.dtype.as_numpy_dtype)
    d = tf.cast(width(x), x.dtype)
    # D products and sums, and 10 more roundings for the shift of the origin and the rest. `eps` is
    # twice the error of one rounding.
    p = (d + 10) * float(limits.eps)
    if x.dtype == tf.float32 and tf.config.list_physical_devices("GPU"):
        # A GPU's matmul uses TensorFloat-32 by default, which keeps ten bits of the factors.
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
        p += 2.0**-9 if tf32 else 0.0
    underflow = 4 * d * float(limits.tiny)
    # 9 and 3: the bounds themselves are rounded. Distances that differ by less than a rounding are
    # rounded to the same number, and then the lower label wins: p is larger than that, too.
    error = 9 * p * squares + underflow
    return _Errors(
        upper=tf.where(~unbounded, squares + error, math.inf),
        shrink=1 / (1 - 2 * p),
        lower=tf.where(~unbounded, squares - error, -math.inf),
        grow=1 + 3 * p,
    )


def _bounds(errors: _Errors, closeness: tf.Tensor) -> tf.Tensor:
    """Squares that the distances to rows of at least this closeness do not exceed."""
    return tf.maximum((errors.upper - closeness) * errors.shrink, 0)


def _limits(errors: _Errors, bounds: tf.Tensor) -> tf.Tensor:
    """Rows of a smaller closeness are farther away than the square roots of these bounds."""
    return errors.lower - errors.grow * bounds
