"""Plain TensorFlow for the same step that XLA can compile; nothing is checked.

The tutorial's `tf.unique_with_counts` is nothing that XLA can compile. What is left is to count the
labels otherwise. (Adding up the steps by a product with a one-hot matrix instead of a scatter takes
longer even with ten classes.)
"""

import tensorflow as tf

from bench.cases import ALPHA


def with_counts(count):
    """The step, with `count(labels, classes)` saying how often the label of each sample occurs."""

    def step(features, labels, centers):
        with tf.GradientTape() as tape:
            tape.watch(features)
            residual = features - tf.stop_gradient(tf.gather(centers, labels))
            loss = tf.nn.l2_loss(residual)
        gradient = tape.gradient(loss, features)
        n = count(labels, centers.shape[0])[:, tf.newaxis]
        centers.scatter_add(tf.IndexedSlices(ALPHA / (1 + n) * residual, labels))
        return loss, gradient

    return step


def by_matrix(labels, classes):
    """By comparing all labels with all."""
    return tf.reduce_sum(tf.cast(labels[:, tf.newaxis] == labels, tf.float32), axis=1)


def by_table(labels, classes):
    """In an array of a number for each class."""
    counts = tf.math.unsorted_segment_sum(tf.ones_like(labels, tf.float32), labels, classes)
    return tf.gather(counts, labels)


def by_sorting(labels, classes):
    """By sorting, and counting runs."""
    order = tf.argsort(labels)
    ordered = tf.gather(labels, order)
    begins = tf.concat([[False], ordered[1:] != ordered[:-1]], 0)
    run = tf.cumsum(tf.cast(begins, tf.int32))
    n = tf.math.unsorted_segment_sum(tf.ones_like(ordered, tf.float32), run, tf.size(labels))
    return tf.scatter_nd(order[:, tf.newaxis], tf.gather(n, run), tf.shape(labels))


COUNTS = {"matrix": by_matrix, "table": by_table, "sorting": by_sorting}
