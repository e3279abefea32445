"""Plain TensorFlow ops for the same step that XLA can compile, without checks.

XLA cannot compile the tutorial's `tf.unique_with_counts`, so these variants count the labels in
other ways. All of them add up the steps by a scatter: a product with a one-hot matrix takes longer
even with ten classes.
"""

import tensorflow as tf

from bench.cases import ALPHA


def with_counts(count):
    """Returns the step. `count(labels, classes)` returns how often each sample's label occurs."""

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
    """Counts by comparing all pairs of labels."""
    return tf.reduce_sum(tf.cast(labels[:, tf.newaxis] == labels, tf.float32), axis=1)


def by_table(labels, classes):
    """Counts in an array of one number per class."""
    counts = tf.math.unsorted_segment_sum(tf.ones_like(labels, tf.float32), labels, classes)
    return tf.gather(counts, labels)


def by_sorting(labels, classes):
    """Counts by sorting the labels and measuring the runs."""
    order = tf.argsort(labels)
    ordered = tf.gather(labels, order)
    begins = tf.concat([[False], ordered[1:] != ordered[:-1]], 0)
    run = tf.cumsum(tf.cast(begins, tf.int32))
    n = tf.math.unsorted_segment_sum(tf.ones_like(ordered, tf.float32), run, tf.size(labels))
    return tf.scatter_nd(order[:, tf.newaxis], tf.gather(n, run), tf.shape(labels))


COUNTS = {"matrix": by_matrix, "table": by_table, "sorting": by_sorting}
TITLES = {"matrix": "all-pairs counts", "table": "count array", "sorting": "sorted counts"}
