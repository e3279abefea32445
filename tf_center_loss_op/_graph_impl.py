"""The center loss in plain TensorFlow ops: Wen et al., ECCV 2016, equations 2 to 4, line by line.

Runs wherever TensorFlow does, and is what the native ops are held against.
"""

import tensorflow as tf

from tf_center_loss_op._arguments import Arguments


def center_loss(a: Arguments) -> tf.Tensor:
    """The loss; the centers have moved where a.update_centers."""
    loss, residual = loss_and_residual(a)
    if not a.update_centers:
        return loss
    with tf.control_dependencies([update_from_residual(a, residual)]):
        return tf.identity(loss)


def update_centers(a: Arguments) -> tf.Operation | None:
    """The step of the centers alone."""
    with tf.control_dependencies(_check(a)):
        return update_from_residual(a, _residual(a, _counted(a)))


def loss_and_residual(a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss and x_i - c_{y_i} [B, D] in the centers' type; no center moves."""
    with tf.control_dependencies(_check(a)):
        counted = _counted(a)
        residual = _residual(a, counted)
        loss = tf.reduce_sum(residual * residual, axis=1) / 2
        if a.sample_weight is not None:
            loss *= tf.where(counted, a.sample_weight, 0)
        loss *= a.weight
        if a.reduction != "none":
            # In float64 the order of the sum does not show in the result.
            loss = tf.reduce_sum(tf.cast(loss, tf.float64))
        if a.reduction == "mean":
            loss = tf.math.divide_no_nan(loss, tf.reduce_sum(tf.cast(counted, tf.float64)))
        return tf.cast(loss, a.centers.dtype), residual


def update_from_residual(a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
    """The step of the centers from a residual x_i - c_{y_i} [B, D] computed before."""
    residual = tf.stop_gradient(residual)
    counted = _counted(a)
    finite = tf.reduce_all(tf.math.is_finite(a.features), axis=1)
    moving = tf.where(counted & finite)[:, 0]

    # One row of the table for each distinct label: the update is written once, in a fixed order.
    labels, group = tf.unique(tf.gather(a.labels, moving))
    groups = tf.size(labels)
    n = tf.math.unsorted_segment_sum(tf.ones_like(moving), group, groups)
    total = tf.math.unsorted_segment_sum(tf.gather(residual, moving), group, groups)

    dtype = residual.dtype
    scale = _scale(a, tf.cast(n, dtype), tf.reduce_sum(tf.cast(counted, dtype)))
    step = tf.where(a.alpha > 0, scale[:, tf.newaxis] * total, 0)
    return a.centers.scatter_add(tf.IndexedSlices(step, labels))


def _scale(a, n, batch):
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


def _counted(a):
    if a.ignore_label is None:
        return tf.fill(tf.shape(a.labels), True)
    return tf.not_equal(tf.cast(a.labels, tf.int64), a.ignore_label)


def _residual(a, counted):
    """x_i - c_{y_i}; zero for ignored samples, whose label may be no row of the table."""
    centers = tf.gather(a.centers, tf.where(counted, a.labels, 0))
    if a.update_centers:
        centers = tf.stop_gradient(centers)
    residual = tf.cast(a.features, a.centers.dtype) - centers
    return tf.where(counted[:, tf.newaxis], residual, 0)


def _check(a):
    """Ops that fail where the values are bad, before anything is written."""
    checks = []
    if not a.labels.shape.is_compatible_with(a.features.shape[:1]) or not (
        a.labels.shape.is_fully_defined() and a.features.shape[:1].is_fully_defined()
    ):
        checks.append(_same_length("labels", a.labels, a.features))
    if a.sample_weight is not None and not a.sample_weight.shape.is_fully_defined():
        checks.append(_same_length("sample_weight", a.sample_weight, a.features))
    if a.update_centers:
        checks.append(
            _require(
                tf.math.is_finite(a.alpha) & (a.alpha >= 0),
                lambda: tf.strings.format(
                    "alpha: expected a finite number >= 0, got {}", (a.alpha,)
                ),
            )
        )
    classes = tf.cast(tf.raw_ops.VariableShape(input=a.centers.handle)[0], a.labels.dtype)
    bad = _counted(a) & ((a.labels < 0) | (a.labels >= classes))

    def first_bad():
        position = tf.where(bad)[0, 0]
        return tf.strings.format(
            "labels[{}] = {} is outside [0, {})", (position, a.labels[position], classes)
        )

    checks.append(_require(~tf.reduce_any(bad), first_bad))
    return checks


def _same_length(name, tensor, features):
    length, batch = tf.shape(tensor)[0], tf.shape(features)[0]
    return _require(
        tf.equal(length, batch),
        lambda: tf.strings.format(name + ": expected shape [{}], got [{}]", (batch, length)),
    )


def _require(condition, message):
    # The message is only put together where it is needed.
    return tf.cond(condition, lambda: True, lambda: _fail(message()))


def _fail(message):
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.constant(False)
