"""The tutorial's function, for TensorFlow 1 style graphs."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op._core.dispatch import implementation


def center_loss(
    features: tf.Tensor, labels: tf.Tensor, alpha: float | tf.Tensor = 0.0
) -> tuple[tf.Tensor, tf.Variable, tf.Operation]:
    """The center loss of the TensorFlow 1 tutorial: loss, centers, and the op that moves them.

    Equals, in a ``tf.compat.v1`` graph:

        label = tf.argmax(labels, 1)
        centers_batch = tf.gather(centers, label)
        loss = tf.nn.l2_loss(features - centers_batch)
        _, idx, count = tf.unique_with_counts(label)
        diff = (1 - alpha) * (centers_batch - features) / (1 + tf.gather(count, idx))[:, None]
        centers_update_op = tf.scatter_sub(centers, label, alpha * diff)

    Run the update beside the optimizer, through ``tf.control_dependencies`` or the
    ``UPDATE_OPS`` collection. The centers move only when it runs, by the residuals of that run.

    Args:
      features: float32, float64, float16 or bfloat16 ``[B, D]``, D known.
      labels: one-hot rows ``[B, C]`` of any numeric type, C known.
      alpha: a number or scalar tensor, finite and >= 0; s_j = alpha (1 - alpha) / (1 + n_j). With
        the default 0 no center ever moves.

    Returns:
      ``(loss, centers, centers_update_op)``: the scalar sum of ||x_i - c_{y_i}||^2 / 2; the
      variable "doc_centers" ``[C, D]`` of the current variable scope, created (zeros,
      non-trainable) or reused; the operation that moves it.

    Raises:
      RuntimeError: called in eager mode, where there is no graph to add the update to.
      TypeError, ValueError: as `tf_center_loss_op.center_loss`.

    Determinism: as `tf_center_loss_op.center_loss`.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    ...     features = tf.constant([[2.0, 4.0]])
    ...     labels = tf.constant([[0, 1, 0]])
    ...     loss, centers, update = tcl.compat.v1.center_loss(features, labels, alpha=0.5)
    ...     session.run(tf.compat.v1.global_variables_initializer())
    ...     with tf.control_dependencies([update]):
    ...         after = tf.identity(loss)
    ...     print(session.run(after), session.run(centers).tolist())
    10.0 [[0.0, 0.0], [0.25, 0.5], [0.0, 0.0]]

    Source: Wen et al., ECCV 2016, equations 2 to 4, as the tutorial writes them.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "compat.v1.center_loss builds a TensorFlow 1 style graph and was called in eager "
            "mode; expected a call under tf.Graph().as_default(). In eager mode and in a "
            "tf.function use tf_center_loss_op.center_loss(..., rule='tutorial', reduction='sum')"
        )
    features, labels = tf.convert_to_tensor(features), tf.convert_to_tensor(labels)
    for name, tensor, shape in (("features", features, "[B, D]"), ("labels", labels, "[B, C]")):
        if tensor.shape.rank != 2 or tensor.shape[1] is None:
            raise ValueError(
                f"{name}: expected shape {shape} with its last dimension known, got {tensor.shape}"
            )
    with tf.name_scope("center_loss"):
        # The variable gets the features' type, and centers are never 16-bit numbers.
        if features.dtype in (tf.float16, tf.bfloat16):
            features = tf.cast(features, tf.float32)
        with tf.compat.v1.variable_scope(
            tf.compat.v1.get_variable_scope(), reuse=tf.compat.v1.AUTO_REUSE
        ):
            centers = tf.compat.v1.get_variable(
                "doc_centers",
                [labels.shape[1], features.shape[1]],
                dtype=features.dtype,
                initializer=tf.compat.v1.zeros_initializer(),
                trainable=False,
                use_resource=True,
            )
        a = arguments.check(
            features, labels, centers, alpha=alpha, rule="tutorial", reduction="sum"
        )
        run = implementation("auto", a.centers)
        loss, residual = run.sum_loss_and_residual(dataclasses.replace(a, update_centers=False))
        step = run.update_from_residual(a, residual)
        # Plain TensorFlow gives a variable, a read of the table after the step.
        return loss, centers, getattr(step, "op", step)
