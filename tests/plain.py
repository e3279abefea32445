"""The formulas in a few lines of plain TensorFlow; its error defines the tolerances."""

import tensorflow as tf


def loss(features, labels, centers, *, reduction="mean", sample_weight=None, ignore_class=None):
    """The loss, differentiable in the features and in the centers (tensor or tf.Variable)."""
    counted = tf.ones_like(labels, tf.bool)
    if ignore_class is not None:
        counted = tf.not_equal(labels, tf.cast(ignore_class, labels.dtype))
    residual = tf.cast(features, centers.dtype) - tf.gather(
        centers, tf.where(counted, labels, tf.zeros_like(labels))
    )
    residual = tf.where(counted[..., None], residual, tf.zeros_like(residual))
    losses = tf.reduce_sum(tf.square(residual), axis=-1) / 2
    if sample_weight is not None:
        losses = losses * tf.cast(sample_weight, losses.dtype)
    if reduction == "none":
        return losses
    total = tf.reduce_sum(losses)
    if reduction == "mean":
        total = tf.math.divide_no_nan(total, tf.math.count_nonzero(counted, dtype=total.dtype))
    return total


def _steps(features, labels, centers, alpha, rule, ignore_class):
    """Labels [B], residuals [B, D] and step sizes [B, 1] of the samples that count."""
    features = tf.reshape(tf.cast(features, centers.dtype), [-1, features.shape[-1]])
    labels = tf.reshape(labels, [-1])
    if ignore_class is not None:
        keep = tf.not_equal(labels, tf.cast(ignore_class, labels.dtype))
        features, labels = tf.boolean_mask(features, keep), tf.boolean_mask(labels, keep)
    total = tf.cast(tf.size(labels), centers.dtype)
    _, index, counts = tf.unique_with_counts(labels)
    n = tf.cast(tf.gather(counts, index), centers.dtype)[:, None]
    # Not tf.cast, which converts a Python number to float32 first.
    alpha = tf.convert_to_tensor(alpha, centers.dtype)
    size = {
        "paper": lambda: alpha / (1 + n),
        "mean": lambda: alpha / n,
        "sum": lambda: alpha * tf.ones_like(n),
        "batch_mean": lambda: alpha / total * tf.ones_like(n),
        "paper_batch_mean": lambda: alpha / ((1 + n) * total),
        "tutorial": lambda: alpha * (1 - alpha) / (1 + n),
    }[rule]()
    return labels, features - tf.gather(centers, labels), size


def moved_centers(features, labels, centers, *, alpha=0.5, rule="paper", ignore_class=None):
    """The centers after one step, as a new tensor; each sample's step is added to its row."""
    labels, residual, size = _steps(features, labels, centers, alpha, rule, ignore_class)
    return tf.tensor_scatter_nd_add(centers, labels[:, None], size * residual)


def centers_moved_by_sums(features, labels, centers, *, alpha=0.5, rule="paper", ignore_class=None):
    """The same step, but sums the residuals before it scales them, so the rounding differs."""
    labels, residual, size = _steps(features, labels, centers, alpha, rule, ignore_class)
    classes, index, _ = tf.unique_with_counts(labels)
    sums = tf.math.unsorted_segment_sum(residual, index, tf.size(classes))
    size = tf.math.unsorted_segment_max(size, index, tf.size(classes))
    return tf.tensor_scatter_nd_add(centers, classes[:, None], size * sums)
