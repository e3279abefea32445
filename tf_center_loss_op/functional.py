"""The functions `center_loss` and `update_centers`: check the arguments, dispatch, compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op._core.dispatch import implementation
from tf_center_loss_op.distribute.exchange import out_of_program_order
from tf_center_loss_op.distribute.sharded import ShardedCenters
from tf_center_loss_op.distribute.strategies import require_supported_strategy


def center_loss(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | ShardedCenters,
    *,
    alpha: tf.types.experimental.TensorLike = 0.5,
    rule: str = "paper",
    reduction: str = "mean",
    sample_weight: tf.types.experimental.TensorLike | None = None,
    ignore_class: int | None = None,
    update_centers: bool = True,
    impl: str = "auto",
    name: str | None = None,
) -> tf.Tensor:
    """The center loss of a batch; moves the centers of its classes by one step, in place.

    Equals, with distinct labels and the default arguments:

        residual = features - tf.gather(centers, labels)
        loss = tf.nn.l2_loss(residual) / B
        centers.scatter_add(tf.IndexedSlices(alpha / (1 + 1) * residual, labels))

    but in one pass over the batch, and for any labels. With class ids the cost does not depend on
    the number of classes. In general, with d_i = x_i - c_{y_i}, the residual, computed from the
    centers before the step:

        loss_i = sample_weight_i * ||d_i||^2 / 2
        d loss / d x_i = upstream * sample_weight_i * d_i   (/ N for reduction "mean")
        c_j += sum over {i : y_i = j} of s_j * d_i

    N is the number of samples that are not ignored, n_j the number of those whose label is j and
    whose features are finite. A sample with a NaN or an infinity keeps its non-finite loss and
    gradient, so that a loss-scaling optimizer sees it, but never moves a center.

    Args:
      features: float32, float64, float16 or bfloat16 ``[..., D]``. With 16-bit features all
        arithmetic is float32; the gradient is rounded once, at the end.
      labels: int32 or int64 ``[...]``, each in ``[0, C)`` or ``ignore_class``; or one-hot or
        probability rows ``[..., C]``, numeric or bool: the label is then the position of the
        largest number (the first of equal ones). A row that is all zero, or holds a NaN or an
        infinity, is an error like a label out of range.
      centers: ``tf.Variable`` (a resource variable) or ``keras.Variable`` ``[C, D]``, or
        `distribute.ShardedCenters`, in a replica; float64 for float64 features, else float32.
      alpha: the step size, a number or a scalar tensor or variable, finite and >= 0.
      rule: s_j by name: ``"paper"`` alpha / (1 + n_j), ``"mean"`` alpha / n_j, ``"sum"`` alpha,
        ``"batch_mean"`` alpha / N, ``"paper_batch_mean"`` alpha / ((1 + n_j) N), ``"tutorial"``
        alpha (1 - alpha) / (1 + n_j). `CONVENTIONS` says which codebase uses which.
      reduction: ``"mean"`` sum of loss_i / N (0 where N = 0), ``"sum"``, or ``"none"``: the
        losses ``[...]``, one for each sample.
      sample_weight: numbers ``[...]``, one for each sample; default all one. They scale loss and
        gradient, not the step of the centers. No gradient flows to them.
      ignore_class: samples with this label have loss 0, count nowhere and move nothing.
      update_centers: with False nothing is written, and the loss has a gradient to the centers
        too (``tf.IndexedSlices``), so that an optimizer can train them. `ShardedCenters` on several
        replicas get no such gradient.
      impl: ``"native"`` the fused op, ``"graph"`` plain TensorFlow ops, ``"auto"`` the fused op
        where it is available; the environment variable ``TF_CENTER_LOSS_IMPL`` changes what
        "auto" means. In a ``keras.StatelessScope`` plain TensorFlow ops compute in every case.
      name: a name scope for the ops.

    Returns:
      The loss, float64 for float64 features, else float32: a scalar, or ``[...]`` for
      reduction "none".

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value; before anything runs.
      tf.errors.InvalidArgumentError: a label is out of range, a one-hot row has no class, or an
        ``alpha`` given as a tensor or variable is negative or not finite. Nothing has been
        written. Two cases cannot raise: the fused op on a GPU, and ``impl="graph"`` under
        ``jit_compile=True``. There a bad label makes the loss and the gradient of its own sample
        NaN, and that sample moves no center; a bad ``alpha`` makes the losses and gradients of all
        samples NaN, and no center moves.
      RuntimeError: ``impl="native"`` without a usable native library; a step of the centers inside
        ``tf.recompute_grad``.

    Determinism: the same inputs give the same bits with the same ``impl`` on the same device,
    whatever the number of threads. Two exceptions on a GPU: after
    ``training.set_gpu_atomics(True)``, and ``impl="graph"``, which is as deterministic as
    TensorFlow's own ops.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tf.Variable(tf.zeros([10, 2]), trainable=False)
    >>> features = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    >>> float(tcl.center_loss(features, [7, 7], centers, alpha=0.6))
    7.5
    >>> [round(float(c), 3) for c in centers[7]]
    [0.8, 1.2]

    Source: Wen, Zhang, Li, Qiao, "A Discriminative Feature Learning Approach for Deep Face
    Recognition", ECCV 2016, equations 2 to 4.
    """
    return loss_and_squared_distance(
        features,
        labels,
        centers,
        loss_weight=1.0,
        alpha=alpha,
        rule=rule,
        reduction=reduction,
        sample_weight=sample_weight,
        ignore_class=ignore_class,
        update_centers=update_centers,
        impl=impl,
        name=name,
    ).loss


class Result(NamedTuple):
    """The loss and squared distances of a call, and its checked batch: flattened, class ids."""

    loss: tf.Tensor
    squared_distance: tf.Tensor  # [B] ||x_i - c_{y_i}||^2, without a gradient
    features: tf.Tensor  # [B, D]
    labels: tf.Tensor  # [B] class ids
    ignore_class: int | None  # also the label of masked samples


def loss_and_squared_distance(
    features: Any,
    labels: Any,
    centers: Any,
    *,
    loss_weight: Any,
    alpha: Any,
    rule: str,
    reduction: str,
    sample_weight: Any,
    ignore_class: int | None,
    update_centers: bool,
    impl: str,
    mask: Any = None,
    name: str | None = None,
) -> Result:
    """`center_loss` times loss_weight (multiplied inside the op), with the squared distances."""
    require_supported_strategy()
    with tf.name_scope(name or "center_loss"), out_of_program_order():
        a = arguments.check(
            features,
            labels,
            centers,
            alpha=alpha,
            rule=rule,
            reduction=reduction,
            loss_weight=loss_weight,
            sample_weight=sample_weight,
            ignore_class=ignore_class,
            update_centers=update_centers,
            mask=mask,
        )
        if a.update_centers:
            arguments.require_no_recomputation()
        loss, squared_distance = implementation(impl, a.centers).center_loss(a)
        if a.reduction == "none" and a.loss_shape is not None:
            loss = tf.reshape(loss, a.loss_shape)
        squared_distance = tf.stop_gradient(squared_distance)
        return Result(loss, squared_distance, a.features, a.labels, a.ignore_class)


def update_centers(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | ShardedCenters,
    *,
    alpha: tf.types.experimental.TensorLike = 0.5,
    rule: str = "paper",
    ignore_class: int | None = None,
    impl: str = "auto",
    name: str | None = None,
) -> None:
    """The step of `center_loss` alone: moves the centers of the batch's classes once, in place.

    For training loops that compute the loss with ``update_centers=False``, once or several times a
    step (gradient accumulation, gradient checkpointing), and move the centers later. Equals, with
    distinct labels and the default arguments:

        residual = features - tf.gather(centers, labels)
        centers.scatter_add(tf.IndexedSlices(alpha / (1 + 1) * residual, labels))

    Args:
      features: as in `center_loss`.
      labels: as in `center_loss`.
      centers: as in `center_loss`.
      alpha: as in `center_loss`.
      rule: as in `center_loss`.
      ignore_class: as in `center_loss`.
      impl: as in `center_loss`.
      name: a name scope for the ops.

    Returns:
      None in eager mode and in a ``tf.function``, which runs the step in program order; the
      operation that does the step in a TF1-style graph.

    Raises:
      As `center_loss`. Where `center_loss` cannot raise, this cannot either: a sample with a bad
      label is left out without a sign, and with a bad ``alpha`` no center moves.

    Determinism: as `center_loss`.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tf.Variable(tf.zeros([3, 2]), trainable=False)
    >>> tcl.update_centers(tf.constant([[2.0, 4.0]]), [1], centers)
    >>> centers.numpy().tolist()
    [[0.0, 0.0], [0.5, 1.0], [0.0, 0.0]]

    Source: Wen et al., ECCV 2016, equation 4.
    """
    require_supported_strategy()
    with tf.name_scope(name or "update_centers"), out_of_program_order():
        a = arguments.check(
            features, labels, centers, alpha=alpha, rule=rule, ignore_class=ignore_class
        )
        arguments.require_no_recomputation()
        step = implementation(impl, a.centers).update_centers(a)
        in_program_order = (
            tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function
        )
        # Plain TensorFlow gives a variable, a read of the table after the step.
        return None if in_program_order else getattr(step, "op", step)
