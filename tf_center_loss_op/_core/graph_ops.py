"""The center loss in plain TensorFlow ops, after Wen et al., ECCV 2016, equations 2 to 4.

It runs wherever TensorFlow does, and the tests compare the native ops with it. XLA compiles neither
checks of values nor shapes that depend on them: under ``jit_compile=True`` `_check` does nothing
and `_sums_by_class_in_xla` takes the place of `_sums_by_class`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import tensorflow as tf

from tf_center_loss_op._core import xla
from tf_center_loss_op._core.arguments import NO_CLASS_IN_ROW, Arguments
from tf_center_loss_op._core.checks import require, with_shape

# Up to this batch size comparing all pairs of labels is faster under XLA than sorting them
# (measured on two cores; at 128 samples sorting is faster).
_MATRIX_BATCH = 64


class GraphOps:
    """An `Implementation` (dispatch.py) in plain TensorFlow ops."""

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Implementation`."""
        a = with_equal_lengths(a)
        residual = _after_step(a, residual_of(a))
        return loss_of(a, residual), tf.reduce_sum(residual * residual, axis=1)

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Implementation`."""
        a = with_equal_lengths(a)
        residual = _after_step(a, residual_of(a))
        one = tf.ones([], a.centers.dtype)
        unweighted = dataclasses.replace(a, reduction="sum", loss_weight=one, sample_weight=None)
        return loss_of(unweighted, residual), tf.stop_gradient(residual)

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """See `Implementation`."""
        a = with_equal_lengths(a)
        return _move(a, residual_of(a))

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """See `Implementation`."""
        # The step reads alpha through tf.where, so it waits for the check of alpha.
        checked = True if xla.in_xla() else check_alpha(a)
        return _move(dataclasses.replace(a, alpha=tf.where(checked, a.alpha, 0)), residual)


def _after_step(a: Arguments, residual: tf.Tensor) -> tf.Tensor:
    """The residual, once the centers have moved where a.update_centers.

    In a graph of TensorFlow 1 the step runs only because another op needs it. What is computed from
    this residual does, the gradient of the loss included.
    """
    if not a.update_centers:
        return residual
    with tf.control_dependencies([_move(a, residual)]):
        return tf.identity(residual)


def with_equal_lengths(a: Arguments) -> Arguments:
    """The arguments; an error when the ops run if labels or sample weights are not [B]."""
    changes = {}
    for name in ("labels", "sample_weight"):
        tensor = getattr(a, name)
        if tensor is not None and None in (*tensor.shape, a.features.shape[0]):
            batch = tf.shape(a.features)[:1]
            changes[name] = with_shape(name, tensor, batch, "the batch of features")
    return dataclasses.replace(a, **changes)


# ------------------------------------------------------------------------- loss and residual


def residual_of(a: Arguments) -> tf.Tensor:
    """The residual x_i - c_{y_i} [B, D]; zero for ignored samples.

    A label outside the table is an error; under XLA, which cannot raise, its residual is NaN.
    """
    # Whatever depends on the residual, and so every write, waits for the checks.
    is_counted, is_readable = counted(a), _is_in_table(a) & _check(a)
    # Under XLA a bad label stays: its gather is clamped, and the scatter of its gradient, NaN, is
    # dropped. With 0 in its place the NaN would go to the center of class 0.
    read = is_counted if xla.in_xla() else is_readable
    centers = tf.gather(a.centers, tf.where(read, a.labels, 0))
    if a.update_centers:
        centers = tf.stop_gradient(centers)
    residual = tf.cast(a.features, a.centers.dtype) - centers
    # Multiply by NaN: a NaN written by tf.where would leave the gradient zero.
    factor = tf.where(is_readable | ~is_counted, 1.0, math.nan)
    residual *= tf.cast(factor, residual.dtype)[:, tf.newaxis]
    return tf.where(is_counted[:, tf.newaxis], residual, 0)


def loss_of(a: Arguments, residual: tf.Tensor) -> tf.Tensor:
    """The loss of a batch with these residuals [B, D]."""
    is_counted = counted(a)
    loss = tf.reduce_sum(residual * residual, axis=1) / 2
    if a.sample_weight is not None:
        loss *= tf.where(is_counted, a.sample_weight, 0)
    loss *= _loss_weight(a)
    if a.reduction != "none":
        # In float64 the order of the sum hardly ever changes the float32 result.
        loss = tf.reduce_sum(tf.cast(loss, tf.float64))
    if a.reduction == "mean":
        loss = tf.math.divide_no_nan(loss, tf.reduce_sum(tf.cast(is_counted, tf.float64)))
    return tf.cast(loss, a.centers.dtype)


def counted(a: Arguments) -> tf.Tensor:
    """[B], whether a sample is not ignored."""
    if a.ignore_class is None:
        return tf.fill(tf.shape(a.labels), True)
    return tf.not_equal(tf.cast(a.labels, tf.int64), a.ignore_class)


def _loss_weight(a: Arguments) -> tf.Tensor:
    # Nothing can raise under XLA: there a bad alpha makes the loss NaN.
    if not (a.update_centers and xla.in_xla()):
        return a.loss_weight
    return tf.where(_is_good_alpha(a), a.loss_weight, math.nan)


def _is_in_table(a: Arguments) -> tf.Tensor:
    """[B], whether a label is a row of the table."""
    labels = tf.cast(a.labels, tf.int64)
    return (labels >= 0) & (labels < _num_classes(a))


def _num_classes(a: Arguments) -> tf.Tensor:
    classes = a.centers.shape[0]
    if classes is None:
        classes = tf.raw_ops.VariableShape(input=a.centers.handle, out_type=tf.int64)[0]
    return tf.cast(classes, tf.int64)


# ---------------------------------------------------------------------- step of the centers


def _move(a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
    """c_j += s_j * sum of the residuals of class j."""
    residual = tf.stop_gradient(residual)
    is_counted = counted(a)
    is_finite = tf.reduce_all(tf.math.is_finite(tf.stop_gradient(a.features)), axis=1)
    sums_by_class = _sums_by_class_in_xla if xla.in_xla() else _sums_by_class
    labels, n, total = sums_by_class(a, is_counted & _is_in_table(a) & is_finite, residual)

    dtype = residual.dtype
    scale = step_scale(a, tf.cast(n, dtype), tf.reduce_sum(tf.cast(is_counted, dtype)))
    # Outside XLA a bad alpha has raised before. Under XLA the step is zero for it.
    moves = _is_good_alpha(a) & (a.alpha > 0)
    step = tf.where(moves, scale[:, tf.newaxis] * total, 0)
    return a.centers.scatter_add(tf.IndexedSlices(step, labels))


def step_scale(a: Arguments, n: tf.Tensor, num_counted: tf.Tensor) -> tf.Tensor:
    """s_j [K] of classes with n_j = n [K], in a batch with N = num_counted."""
    alpha = a.alpha
    return {
        "paper": lambda: alpha / (1 + n),
        "mean": lambda: alpha / n,
        "sum": lambda: alpha * tf.ones_like(n),
        "batch_mean": lambda: alpha / num_counted * tf.ones_like(n),
        "paper_batch_mean": lambda: alpha / ((1 + n) * num_counted),
        "tutorial": lambda: alpha * (1 - alpha) / (1 + n),
    }[a.rule]()


def _sums_by_class(
    a: Arguments, moving: tf.Tensor, residual: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The distinct labels of the samples with moving [B], their n_j and their sums of residuals."""
    samples = tf.where(moving)[:, 0]
    # Distinct labels: the scatter writes each row of the table once, so its order does not matter.
    labels, segment = tf.unique(tf.gather(a.labels, samples))
    classes = tf.size(labels)
    n = tf.math.unsorted_segment_sum(tf.ones_like(samples), segment, classes)
    return labels, n, tf.math.unsorted_segment_sum(tf.gather(residual, samples), segment, classes)


def _sums_by_class_in_xla(
    a: Arguments, moving: tf.Tensor, residual: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `_sums_by_class`, in arrays of length B.

    Unused entries have label C. The table has no such row, and XLA drops it in the scatter.
    """
    unused = tf.cast(_num_classes(a), a.labels.dtype)
    labels = tf.where(moving, a.labels, unused)
    residual = tf.where(moving[:, tf.newaxis], residual, 0)
    sums = _sums_by_comparing if _is_small(residual.shape[0]) else _sums_by_sorting
    labels, is_last, n, total = sums(labels, residual)
    return tf.where(is_last, labels, unused), n, total


def _is_small(batch: int | None) -> bool:
    # On a GPU a matrix product may keep ten bits of the residuals only (TensorFloat-32).
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    return batch is not None and batch <= _MATRIX_BATCH and not on_gpu


def _sums_by_comparing(
    labels: tf.Tensor, residual: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """For each sample: its label, whether it is the last of its class, and its class's n and sum.

    All pairs of labels are compared: a matrix [B, B].
    """
    # tf.equal, because `==` compares the objects in a graph of TensorFlow 1.
    same = tf.equal(labels[:, tf.newaxis], labels)
    position = tf.range(tf.size(labels))
    is_last = ~tf.reduce_any(same & (position > position[:, tf.newaxis]), axis=1)
    n = tf.reduce_sum(tf.cast(same, tf.int32), axis=1)
    return labels, is_last, n, tf.matmul(tf.cast(same, residual.dtype), residual)


def _sums_by_sorting(
    labels: tf.Tensor, residual: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `_sums_by_comparing`, with the samples in the order of their labels.

    Sorting makes each class a run. A segmented scan (doubling: shift = 1, 2, 4, ...) adds to each
    entry the sum of the entry `shift` before it, if that is in the same run. In the end the last
    entry of a run holds the sum of the run.
    """
    order = tf.argsort(labels, stable=True)
    labels, total = tf.gather(labels, order), tf.gather(residual, order)
    position = tf.range(tf.size(labels))

    def in_same_run(shift: tf.Tensor) -> tf.Tensor:
        return (position >= shift) & tf.equal(labels, tf.roll(labels, shift, axis=0))

    def scan(
        shift: tf.Tensor, n: tf.Tensor, total: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        same = in_same_run(shift)
        n += tf.where(same, tf.roll(n, shift, axis=0), 0)
        total += tf.where(same[:, tf.newaxis], tf.roll(total, shift, axis=0), 0)
        return 2 * shift, n, total

    _, n, total = tf.while_loop(
        lambda shift, *_: tf.reduce_any(in_same_run(shift)),
        scan,
        (tf.constant(1), tf.ones_like(position), total),
    )
    is_last = tf.not_equal(labels, tf.roll(labels, -1, axis=0))
    is_last |= tf.equal(position, tf.size(labels) - 1)
    return labels, is_last, n, total


# --------------------------------------------------------------------- checks of the values


def _check(a: Arguments) -> tf.Tensor | bool:
    """True; outside XLA an error if a label, alpha or the variable's state is bad."""
    if xla.in_xla():
        return True
    checks = [_initialized(a)]
    if a.update_centers:
        checks.append(check_alpha(a))
    is_bad = outside(a)
    checks.append(require(~tf.reduce_any(is_bad), lambda: first_outside(a, is_bad)))
    return functools.reduce(tf.logical_and, checks)


def check_alpha(a: Arguments) -> tf.Tensor:
    """True; an error if alpha is negative or not finite."""
    return require(
        _is_good_alpha(a),
        lambda: tf.strings.format("alpha: expected a finite number >= 0, got {}", (a.alpha,)),
    )


def _is_good_alpha(a: Arguments) -> tf.Tensor:
    return tf.math.is_finite(a.alpha) & (a.alpha >= 0)


def outside(a: Arguments) -> tf.Tensor:
    """[B], whether a label is neither a row of the table nor ignored."""
    return counted(a) & ~_is_in_table(a)


def first_outside(a: Arguments, is_outside: tf.Tensor) -> tf.Tensor:
    """The message about the first label that is outside the table."""
    position = tf.where(is_outside)[0, 0]
    label = tf.cast(a.labels[position], tf.int64)
    text = tf.strings.format(
        "labels[{}] = {} is outside [0, {})", (position, label, _num_classes(a))
    )
    no_class = ": the label of a one-hot row that is all zero or not finite"
    return text + tf.where(tf.equal(label, NO_CLASS_IN_ROW), no_class, "")


def _initialized(a: Arguments) -> tf.Tensor | bool:
    # Only a graph of TensorFlow 1 can hold an uninitialized variable.
    if tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function:
        return True
    # Reading the variable raises an error that says what is wrong; gathering from it does not. The
    # value must enter the result: an unused read is optimized away.
    initialized = tf.raw_ops.VarIsInitializedOp(resource=a.centers.handle)
    return tf.cond(
        initialized, lambda: True, lambda: tf.math.is_finite(a.centers.read_value()[0, 0])
    )
