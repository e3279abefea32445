"""Using the centers: the nearest ones to features, and the distance to one, in bounded memory.

Distances come from the differences, summed in float64, never from |x|^2 - 2 x.c + |c|^2: in float32
that has no digit left for features near their centers and far from the origin. It only decides
which differences are worth computing: with its rounding error bounded, whatever it cannot rule out
is computed exactly. How many those are depends on the data, a few for each sample as a rule.

XLA knows no shapes that depend on values: under ``jit_compile=True`` every difference is computed.
"""

from __future__ import annotations

import math

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import _arguments, _native
from tf_center_loss_op.distribute import ShardedCenters

_FLOATS = (tf.float32, tf.float64, tf.float16, tf.bfloat16)
_SAMPLES = 512  # of features at a time
_NUMBERS = 2**21  # in a temporary, about
_NO_LABEL = -1


def nearest_centers(
    features: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike,
    *,
    k: int = 1,
    threshold: tf.types.experimental.TensorLike | None = None,
    block: int | None = None,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The classes whose centers are nearest to each sample, and their distances.

    Equals, without the ``[B, C, D]`` and ``[B, C]`` tensors:

        distances = tf.norm(features[:, None, :] - centers[None, :, :], axis=-1)
        labels = tf.argmin(distances, axis=1)
        distances = tf.reduce_min(distances, axis=1)
        labels = tf.where(distances > threshold, -1, labels)  # where a threshold is given

    The table is read in blocks of rows and never as a whole. Each distance is right to its last
    place or so, also far from the origin. Of equal distances the lowest label comes first. Large
    tables take less than half the time inside a ``tf.function``.

    Args:
      features: float32, float64, float16 or bfloat16 ``[..., D]``. A sample with a NaN or an
        infinity has label -1 and distance NaN.
      centers: ``[C, D]``, a ``tf.Variable``, ``keras.Variable``, tensor or NumPy array, of the
        types of the features; a memory-mapped array stays on disk, also inside a ``tf.function``
        (under ``jit_compile=True`` it becomes a constant of the program). A center with a NaN or
        an infinity is nobody's nearest.
      k: how many, in ``[1, C]``.
      threshold: a number or scalar tensor >= 0. Labels farther away become -1, "unknown"; their
        distances stay. None: every sample belongs to somebody.
      block: classes read at a time; the default keeps each temporary at about 8 MB.
      name: a name scope for the ops.

    Returns:
      labels int64 and distances (float64 where features or centers are, else float32), nearest
      first: ``[..., k]``, for k = 1 ``[...]``. Where fewer than k centers are finite the rest has
      label -1 and distance infinity. No gradient flows through either.

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
    with tf.name_scope(name or "nearest_centers"):
        features, table = _arguments_of(features, centers)
        k = _arguments.positive("k", k)
        if table.static_rows is not None and k > table.static_rows:
            raise ValueError(
                f"k: expected at most C = {table.static_rows}, the rows of centers, got {k}"
            )
        threshold = None if threshold is None else _threshold(threshold, table.dtype)
        block = _default_block(table) if block is None else _arguments.positive("block", block)
        outer = tf.shape(features)[:-1]
        x = tf.reshape(features, [-1, table.width])
        labels, distances = _in_parts(
            tf.shape(x)[0],
            _SAMPLES,
            lambda start, stop: _nearest(x[start:stop], table, k, block),
            [(tf.int64, [None, k]), (table.dtype, [None, k])],
        )
        if threshold is not None:
            # Not `distances > threshold`: the label of a NaN is -1 already.
            labels = tf.where(distances <= threshold, labels, _NO_LABEL)
        shape = outer if k == 1 else tf.concat([outer, [k]], 0)
        static = features.shape[:-1] if k == 1 else features.shape[:-1] + [k]
        return tuple(
            tf.ensure_shape(tf.reshape(value, shape), static) for value in (labels, distances)
        )


def distance_to_center(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike,
    *,
    name: str | None = None,
) -> tf.Tensor:
    """The distance of each sample to the center of a given class.

    Equals ``tf.norm(features - tf.gather(centers, labels), axis=-1)``, summed in float64. To
    verify a claimed label, or to reject a predicted one, compare it with a threshold that was
    chosen on data of its own.

    Args:
      features: as in `nearest_centers`. The distance of a sample with a NaN is NaN.
      labels: int32 or int64 ``[...]``, each in ``[0, C)``, or -1: that sample's distance is NaN.
      centers: as in `nearest_centers`.
      name: a name scope for the ops.

    Returns:
      Distances ``[...]``, float64 where features or centers are, else float32. No gradient flows
      through them.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.
      tf.errors.InvalidArgumentError: a label is out of range. Under ``jit_compile=True``, where
        nothing can be raised, its distance is NaN.

    Determinism: the same inputs give the same bits.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tf.constant([[0.0, 0.0], [3.0, 4.0]])
    >>> tcl.nearest.distance_to_center(tf.constant([[0.0, 0.0]]), [1], centers).numpy().tolist()
    [5.0]

    Source: as `nearest_centers`.
    """
    with tf.name_scope(name or "distance_to_center"):
        features, table = _arguments_of(features, centers)
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
            known = (y >= 0) & (y < table.rows())
        distances = _pair_distances(x, table.take, tf.range(tf.size(y)), tf.where(known, y, 0))
        distances = tf.where(known, distances, math.nan)
        return tf.ensure_shape(tf.reshape(distances, tf.shape(labels)), labels.shape)


# ---------------------------------------------------------------------------- the arguments


class _Table:
    """The centers, of which rows can be read without a copy of the whole."""

    def __init__(self, centers):
        self._centers = centers = _arguments.unwrap(centers)
        if isinstance(centers, ShardedCenters):
            raise TypeError(
                "centers: expected one table, got ShardedCenters: load its save() into one of a "
                "single replica, and give the variable in its shards"
            )
        if not (
            isinstance(centers, (tf.Variable, np.ndarray, _arguments.StatelessCenters))
            or tf.is_tensor(centers)
        ):
            self._centers = centers = tf.convert_to_tensor(centers)
        if isinstance(centers, np.ndarray) and _native.in_xla():
            self._centers = centers = tf.convert_to_tensor(centers)
        self.source_type = tf.as_dtype(centers.dtype)
        if self.source_type not in _FLOATS:
            raise TypeError(
                f"centers: expected dtype {_names(_FLOATS)}, got {self.source_type.name}"
            )
        shape = tf.TensorShape(centers.shape)
        if shape.rank != 2 or not shape[1]:
            raise ValueError(f"centers: expected shape [C, D] with D known and > 0, got {shape}")
        self.shape, self.static_rows, self.width = shape, shape[0], shape[1]
        self.dtype = self.source_type if self.source_type == tf.float64 else tf.float32

    def rows(self):
        """C, int64."""
        if self.static_rows is not None:
            return tf.constant(self.static_rows, tf.int64)
        if isinstance(self._centers, tf.Variable):
            return tf.raw_ops.VariableShape(input=self._centers.handle, out_type=tf.int64)[0]
        return tf.shape(self._centers, tf.int64)[0]

    def block(self, start, stop):
        """Rows [start, stop)."""
        if isinstance(self._centers, np.ndarray):
            return self._from_numpy(lambda a, b: self._centers[a:b], start, stop)
        if tf.is_tensor(self._centers) and not isinstance(self._centers, tf.Variable):
            return tf.cast(self._centers[start:stop], self.dtype)
        # A slice of a variable would read all of it, and in copy-on-read mode copy it.
        return self.take(tf.range(start, stop))

    def take(self, labels):
        """The rows of these labels."""
        if isinstance(self._centers, np.ndarray):
            return self._from_numpy(lambda y: self._centers[y], labels)
        # A tape would keep every block of a trainable variable.
        return tf.stop_gradient(tf.cast(tf.gather(self._centers, labels), self.dtype))

    def _from_numpy(self, read, *args):
        # Read when the op runs: converted to a tensor the whole array would be in memory.
        rows = tf.numpy_function(read, args, self.source_type)
        return tf.cast(tf.ensure_shape(rows, [None, self.width]), self.dtype)


def _arguments_of(features, centers):
    features = tf.convert_to_tensor(features)
    if features.dtype not in _FLOATS:
        raise TypeError(f"features: expected dtype {_names(_FLOATS)}, got {features.dtype.name}")
    table = _Table(centers)
    if features.dtype == tf.float64:
        table.dtype = tf.float64
    if features.shape.rank is None or features.shape.rank < 1:
        raise ValueError(f"features: expected shape [..., D], got {features.shape}")
    if not features.shape[-1:].is_compatible_with([table.width]):
        raise ValueError(
            f"features: expected shape [..., {table.width}] for centers of shape {table.shape}, "
            f"got {features.shape}"
        )
    return tf.stop_gradient(tf.cast(features, table.dtype)), table


def _names(types):
    return ", ".join(t.name for t in types)


def _threshold(value, dtype):
    if tf.is_tensor(value) or isinstance(value, (tf.Variable, keras.Variable)):
        value = tf.convert_to_tensor(value)
        if not value.shape.is_compatible_with([]):
            raise ValueError(f"threshold: expected a scalar, got shape {value.shape}")
        return tf.cast(value, dtype)
    return tf.constant(_arguments.number("threshold", value), dtype)


def _default_block(table):
    return max(1, _NUMBERS // max(_SAMPLES, table.width))


def _check_labels(y, table):
    if _native.in_xla():
        return True
    rows = table.rows()
    bad = (y < _NO_LABEL) | (y >= rows)

    def first_bad():
        i = tf.where(bad)[0, 0]
        message = "labels[{}] = {} is outside [0, {}) and not -1"
        message = tf.strings.format(message, (i, tf.gather(y, i), rows))
        with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
            return tf.constant(False)

    return tf.cond(tf.reduce_any(bad), first_bad, lambda: True)


# ------------------------------------------------------------------------- the computation


def _in_parts(count, size, function, specs):
    """`function(start, stop)` of at most `size` places at a time, its results joined."""
    if _native.in_xla():
        # As many parts as the values ask for are more than XLA knows.
        return function(0, count)
    parts = tf.maximum(1, -(-count // size))  # without a part there would be nothing to join
    arrays = [
        tf.TensorArray(dtype, parts, infer_shape=False, element_shape=shape)
        for dtype, shape in specs
    ]

    def body(part, *arrays):
        start = part * size
        results = function(start, tf.minimum(start + size, count))
        return part + 1, *(a.write(part, r) for a, r in zip(arrays, results, strict=True))

    # One part after another: in parallel their temporaries would add up.
    _, *arrays = tf.while_loop(
        lambda part, *_: part < parts, body, (0, *arrays), parallel_iterations=1
    )
    return [array.concat() for array in arrays]


def _nearest(x, table, k, block):
    """Labels and distances [n, k] of the samples x [n, D]."""
    finite = tf.reduce_all(tf.math.is_finite(x), axis=1)
    x = tf.where(finite[:, tf.newaxis], x, 0)
    # Distances do not change with the origin, their rounding errors do.
    origin = tf.reduce_mean(x, axis=0)
    rows = table.rows()
    n = tf.shape(x)[0]

    if _native.in_xla():
        block = min(block, table.static_rows or block)
        distances_of_block = _all_distances
    else:
        distances_of_block = _candidates_distances

    def body(start, labels, distances):
        found = distances_of_block(x, table, start, block, origin, distances, k)
        # Of equal ones top_k takes the first: those found earlier have the lower labels.
        nearest, place = tf.math.top_k(-tf.concat([distances, found], 1), k)
        place = tf.cast(place, tf.int64)
        earlier = tf.gather(labels, tf.minimum(place, k - 1), batch_dims=1)
        return start + block, tf.where(place < k, earlier, start + place - k), -nearest

    start = (
        tf.constant(0, tf.int64),
        tf.fill([n, k], tf.constant(_NO_LABEL, tf.int64)),
        tf.fill([n, k], tf.constant(math.inf, table.dtype)),
    )
    _, labels, distances = tf.while_loop(
        lambda start, *_: start < rows, body, start, parallel_iterations=1
    )
    finite = finite[:, tf.newaxis]
    return tf.where(finite, labels, _NO_LABEL), tf.where(finite, distances, math.nan)


def _all_distances(x, table, start, block, *_):
    """[n, block]: the distances to the rows from `start` on; infinite beyond the last row."""
    row = start + tf.range(block, dtype=tf.int64)
    centers = table.take(tf.minimum(row, table.rows() - 1))
    centers = tf.cast(centers, tf.float64)
    # Sample by sample: XLA would hold the differences of all of them.
    exact = tf.map_fn(
        lambda one: tf.cast(tf.norm(tf.cast(one, tf.float64) - centers, axis=1), x.dtype), x
    )
    return tf.where(tf.math.is_nan(exact) | (row >= table.rows()), math.inf, exact)


def _candidates_distances(x, table, start, block, origin, distances, k):
    """[n, up to block]: the same, infinite also where a row is nobody's k nearest."""
    stop = tf.minimum(start + block, table.rows())
    centers = table.block(start, stop)
    candidates = _candidates(x, centers, origin, distances, k)
    sample, row = candidates[:, 0], candidates[:, 1]
    exact = _pair_distances(x, lambda y: tf.gather(centers, y), sample, row)
    exact = tf.where(tf.math.is_nan(exact), math.inf, exact)
    shape = tf.stack([tf.shape(x, tf.int64)[0], stop - start])
    return tf.tensor_scatter_nd_update(
        tf.fill(shape, tf.constant(math.inf, table.dtype)), candidates, exact
    )


def _candidates(x, centers, origin, distances, k):
    """[P, 2]: every sample and row of a block that may belong to the sample's k nearest.

    Compares |x - c|^2 - |x|^2 = |c|^2 - 2 x.c, whose rounding error is at most `error`, with the
    k-th smallest so far.
    """
    limits = np.finfo(x.dtype.as_numpy_dtype)
    # D + 8: the products and sums, and the shift of the origin.
    rounding = (x.shape[1] + 8) * float(limits.eps)
    product = rounding
    if tf.config.list_physical_devices("GPU"):
        # TensorFloat-32, the default there, keeps ten bits of the factors.
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
        product += 2.0**-9 if tf32 else 0.0
    hidden = x.shape[1] * float(limits.tiny)  # in products that underflow
    # A row of zeros with k before it is nobody's k-th: a table in its first epoch is mostly zeros,
    # and all of them would tie.
    zero = tf.reduce_all(centers == 0, axis=1)
    surplus = zero & (tf.cumsum(tf.cast(zero, tf.int32)) > k)
    x, centers = x - origin, centers - origin
    square_x, square_c = tf.reduce_sum(x * x, 1, keepdims=True), tf.reduce_sum(centers**2, 1)
    norm_x, norm_c = tf.sqrt(square_x + hidden), tf.sqrt(square_c + hidden)
    score = square_c - 2 * tf.matmul(x, centers, transpose_b=True)
    error = product * norm_c * (2 * norm_x + norm_c) + 4 * hidden
    highest = tf.where(surplus, math.inf, score + error)
    bounds = tf.concat([distances**2 - square_x, highest], 1)
    bounds = tf.where(tf.math.is_nan(bounds), math.inf, bounds)
    bound = -tf.math.top_k(-bounds, k).values[:, -1:]
    # Distances that differ by less are equal when they are rounded, and then the label decides.
    bound += 2 * rounding * (tf.abs(bound) + square_x) + 4 * hidden
    # Not `<=`: a NaN, from an overflow, rules nothing out.
    return tf.where(~((score - error > bound) | surplus))


def _pair_distances(x, take, sample, label):
    """|x[sample] - take(label)| of each pair, in the type of x."""

    def part(start, stop):
        rows = take(label[start:stop])
        difference = tf.cast(tf.gather(x, sample[start:stop]), tf.float64)
        difference -= tf.cast(rows, tf.float64)
        return [tf.cast(tf.norm(difference, axis=1), x.dtype)]

    size = max(1, _NUMBERS // 4 // x.shape[1])
    return _in_parts(tf.size(label), size, part, [(x.dtype, [None])])[0]
