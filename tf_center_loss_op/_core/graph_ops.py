"""The center loss in plain TensorFlow ops: Wen et al., ECCV 2016, equations 2 to 4, line by line.

Runs wherever TensorFlow does, and is what the native ops are held against. XLA compiles neither
checks of values nor shapes that depend on them, so under ``jit_compile=True`` `_check` has nothing
to say and `_groups_in_xla` stands for `_groups`.
"""

import functools
import math

import tensorflow as tf

from tf_center_loss_op import _native
from tf_center_loss_op._arguments import Arguments

# Up to this batch size XLA groups by comparing all labels with all: up to there it was the faster
# way (two cores; at 128 samples sorting is).
_MATRIX_BATCH = 64


def center_loss(a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss and ||x_i - c_{y_i}||^2 [B]; the centers have moved where a.update_centers."""
    loss, residual = loss_and_residual(a)
    squared_distance = tf.reduce_sum(residual * residual, axis=1)
    if not a.update_centers:
        return loss, squared_distance
    with tf.control_dependencies([update_from_residual(a, residual)]):
        return tf.identity(loss), squared_distance


def update_centers(a: Arguments) -> tf.Operation | None:
    """The step of the centers alone."""
    return update_from_residual(a, residual_of(a))


def loss_and_residual(a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss and x_i - c_{y_i} [B, D] in the centers' type; no center moves."""
    residual = residual_of(a)
    return loss_of(a, residual), residual


def residual_and_step(a: Arguments) -> tf.Tensor:
    """x_i - c_{y_i} [B, D]; the centers have moved where a.update_centers."""
    residual = tf.stop_gradient(residual_of(a))
    if not a.update_centers:
        return residual
    with tf.control_dependencies([update_from_residual(a, residual)]):
        return tf.identity(residual)


def loss_of(a: Arguments, residual: tf.Tensor) -> tf.Tensor:
    """The loss of samples with this residual x_i - c_{y_i} [B, D]."""
    counts = counted(a)
    loss = tf.reduce_sum(residual * residual, axis=1) / 2
    if a.sample_weight is not None:
        loss *= tf.where(counts, a.sample_weight, 0)
    loss *= _weight(a)
    if a.reduction != "none":
        # In float64 the order of the sum does not show in the result.
        loss = tf.reduce_sum(tf.cast(loss, tf.float64))
    if a.reduction == "mean":
        loss = tf.math.divide_no_nan(loss, tf.reduce_sum(tf.cast(counts, tf.float64)))
    return tf.cast(loss, a.centers.dtype)


def update_from_residual(a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
    """The step of the centers from a residual x_i - c_{y_i} [B, D] computed before."""
    residual = tf.stop_gradient(residual)
    counts = counted(a)
    finite = tf.reduce_all(tf.math.is_finite(a.features), axis=1)
    groups = _groups_in_xla if _native.in_xla() else _groups
    labels, n, total = groups(a, counts & _in_table(a) & finite, residual)

    dtype = residual.dtype
    scale = step_scale(a, tf.cast(n, dtype), tf.reduce_sum(tf.cast(counts, dtype)))
    moves = _good_alpha(a) & (a.alpha > 0)
    step = tf.where(moves, scale[:, tf.newaxis] * total, 0)
    return a.centers.scatter_add(tf.IndexedSlices(step, labels))


def _groups(a, moving, residual):
    """The distinct labels of the moving samples, n_j and the sums of their residuals."""
    moving = tf.where(moving)[:, 0]
    # One row of the table for each distinct label: the update is written once, in a fixed order.
    labels, group = tf.unique(tf.gather(a.labels, moving))
    groups = tf.size(labels)
    n = tf.math.unsorted_segment_sum(tf.ones_like(moving), group, groups)
    return labels, n, tf.math.unsorted_segment_sum(tf.gather(residual, moving), group, groups)


def _groups_in_xla(a, moving, residual):
    """The same as [B] places, for XLA; at a place too many the label is C, which XLA drops."""
    nowhere = tf.cast(_classes(a), a.labels.dtype)
    labels = tf.where(moving, a.labels, nowhere)
    residual = tf.where(moving[:, tf.newaxis], residual, 0)
    groups = _groups_by_matrix if _small(residual.shape[0]) else _groups_by_sorting
    labels, last, n, total = groups(labels, residual)
    return tf.where(last, labels, nowhere), n, total


def _small(batch):
    # On a GPU a product of matrices may keep ten bits of the residuals (TensorFloat-32).
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    return batch is not None and batch <= _MATRIX_BATCH and not on_gpu


def _groups_by_matrix(labels, residual):
    """Labels, whether a place is the last of its class, n and sums there: all compared with all."""
    # Not `==`, which in a graph of TensorFlow 1 compares the objects.
    same = tf.equal(labels[:, tf.newaxis], labels)
    place = tf.range(tf.size(labels))
    last = ~tf.reduce_any(same & (place > place[:, tf.newaxis]), axis=1)
    n = tf.reduce_sum(tf.cast(same, tf.int32), axis=1)
    return labels, last, n, tf.matmul(tf.cast(same, residual.dtype), residual)


def _groups_by_sorting(labels, residual):
    """The same in the order of the labels.

    In sorted order the members of a class are a run. Each place takes up the one `shift` before it,
    if that is of the same run, for shift = 1, 2, 4, ...: the last of a run ends with its sum.
    """
    order = tf.argsort(labels, stable=True)
    labels, total = tf.gather(labels, order), tf.gather(residual, order)
    place = tf.range(tf.size(labels))

    def same_run(shift):
        return (place >= shift) & tf.equal(labels, tf.roll(labels, shift, axis=0))

    def take_up(shift, n, total):
        same = same_run(shift)
        n += tf.where(same, tf.roll(n, shift, axis=0), 0)
        total += tf.where(same[:, tf.newaxis], tf.roll(total, shift, axis=0), 0)
        return 2 * shift, n, total

    _, n, total = tf.while_loop(
        lambda shift, *_: tf.reduce_any(same_run(shift)),
        take_up,
        (tf.constant(1), tf.ones_like(place), total),
    )
    last = tf.not_equal(labels, tf.roll(labels, -1, axis=0))
    last |= tf.equal(place, tf.size(labels) - 1)
    return labels, last, n, total


def step_scale(a: Arguments, n: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """s_j for a class with n finite samples, in a batch of so many counted ones."""
    alpha = a.alpha
    return {
        "paper": lambda: alpha / (1 + n),
        "mean": lambda: alpha / n,
        "sum": lambda: alpha * tf.ones_like(n),
        "batch_mean": lambda: alpha / batch * tf.ones_like(n),
        "paper_batch_mean": lambda: alpha / ((1 + n) * batch),
        "tutorial": lambda: alpha * (1 - alpha) / (1 + n),
    }[a.rule]()


def counted(a: Arguments) -> tf.Tensor:
    """[B], whether a sample is not ignored."""
    if a.ignore_class is None:
        return tf.fill(tf.shape(a.labels), True)
    return tf.not_equal(tf.cast(a.labels, tf.int64), a.ignore_class)


def _good_alpha(a):
    return tf.math.is_finite(a.alpha) & (a.alpha >= 0)


def _weight(a):
    # Where no check can raise, a bad alpha shows in the loss.
    if not (a.update_centers and _native.in_xla()):
        return a.loss_weight
    return tf.where(_good_alpha(a), a.loss_weight, math.nan)


def _classes(a):
    classes = a.centers.shape[0]
    if classes is None:
        classes = tf.raw_ops.VariableShape(input=a.centers.handle, out_type=tf.int64)[0]
    return tf.cast(classes, tf.int64)


def _in_table(a):
    labels = tf.cast(a.labels, tf.int64)
    return (labels >= 0) & (labels < _classes(a))


def residual_of(a: Arguments) -> tf.Tensor:
    """x_i - c_{y_i}; zero for ignored samples, NaN for a label that is no row of the table."""
    # What follows from the residual, and so every write, waits for the checks.
    counts, readable = counted(a), _in_table(a) & _check(a)
    # XLA reads any row for a label that is none, and adds what its gradient says to none.
    read = counts if _native.in_xla() else readable
    centers = tf.gather(a.centers, tf.where(read, a.labels, 0))
    if a.update_centers:
        centers = tf.stop_gradient(centers)
    residual = tf.cast(a.features, a.centers.dtype) - centers
    # A factor, so that the gradient is NaN too.
    residual *= tf.cast(tf.where(readable | ~counts, 1.0, math.nan), residual.dtype)[:, tf.newaxis]
    return tf.where(counts[:, tf.newaxis], residual, 0)


def _check(a):
    """True, or an error where the values are bad."""
    if _native.in_xla():
        return True
    checks = [_initialized(a)]
    for name in ("labels", "sample_weight"):
        tensor = getattr(a, name)
        if tensor is not None and None in (*tensor.shape, a.features.shape[0]):
            checks.append(_same_length(name, tensor, a.features))
    if a.update_centers:
        checks.append(check_alpha(a))
    bad = outside(a)
    checks.append(require(~tf.reduce_any(bad), lambda: first_outside(a, bad)))
    return functools.reduce(tf.logical_and, checks)


def check_alpha(a: Arguments) -> tf.Tensor:
    """True, or an error where the step size is negative or not finite."""
    return require(
        _good_alpha(a),
        lambda: tf.strings.format("alpha: expected a finite number >= 0, got {}", (a.alpha,)),
    )


def outside(a: Arguments) -> tf.Tensor:
    """[B], whether a label is neither a row of the table nor ignored."""
    return counted(a) & ~_in_table(a)


def first_outside(a: Arguments, bad: tf.Tensor) -> tf.Tensor:
    """What is wrong with the first of these labels."""
    position = tf.where(bad)[0, 0]
    return tf.strings.format(
        "labels[{}] = {} is outside [0, {})", (position, a.labels[position], _classes(a))
    )


def _initialized(a):
    # Outside TensorFlow 1 style graphs no variable is ever uninitialised.
    if tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function:
        return True
    # Reading, unlike gathering, says what is wrong. The value must enter the result, or the read
    # is optimised away.
    initialized = tf.raw_ops.VarIsInitializedOp(resource=a.centers.handle)
    return tf.cond(
        initialized, lambda: True, lambda: tf.math.is_finite(a.centers.read_value()[0, 0])
    )


def _same_length(name, tensor, features):
    length, batch = tf.shape(tensor)[0], tf.shape(features)[0]
    return require(
        tf.equal(length, batch),
        lambda: tf.strings.format(name + ": expected shape [{}], got [{}]", (batch, length)),
    )


def require(condition: tf.Tensor, message) -> tf.Tensor:
    """True, or an error that says message() where the condition does not hold."""
    # The message is only put together where it is needed.
    return tf.cond(condition, lambda: True, lambda: _fail(message()))


def _fail(message):
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.constant(False)
