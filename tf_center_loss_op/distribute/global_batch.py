"""The batches of all replicas as one global batch, and what a step exchanges.

1. The size exchange. From it each replica knows N, and whether a label of any replica is outside
   the table: then all of them raise, and nothing has been written.
2. For mirrored centers that move, whichever takes fewer bytes: the sample exchange (all features
   and labels) or the sum exchange (for each distinct label of a replica, its number of samples and
   the sum of their residuals). For sharded centers the sample exchange and, where the loss is
   computed, the residual exchange.

Nothing that is exchanged grows with C.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tf_center_loss_op._core import graph_ops, variables
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op._core.checks import require
from tf_center_loss_op.distribute.exchange import Exchange

# The no-class label: of ignored samples and of padding rows.
NO_CLASS = -1

# The columns of the size exchange [R, 5]: the numbers of samples, of counted samples, of distinct
# labels and of labels outside the table; and the replica's index, because the rows have no fixed
# order.
SAMPLES, COUNTED, LABELS, _OUTSIDE, _REPLICA = range(5)


class GlobalBatch:
    """The global batch, as the running replica sees it. Creating one runs the size exchange."""

    def __init__(self, a: Arguments):
        self._a = a = graph_ops.with_equal_lengths(a)
        self.exchange = Exchange([a.features, a.labels])
        is_counted = graph_ops.counted(a)
        is_outside = graph_ops.outside(a)
        self._labels = tf.where(is_counted, a.labels, NO_CLASS)
        self.distinct_labels, self._segment = tf.unique(self._labels)
        self._num_labels = tf.size(self.distinct_labels)
        self._replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        sizes = [
            tf.size(a.labels),
            _count(is_counted),
            self._num_labels,
            _count(is_outside),
            self._replica,
        ]
        sizes = tf.stack([tf.cast(size, tf.int64) for size in sizes])
        self._sizes = self.exchange.numbers(sizes)  # [R, 5]
        self.checked = self._check(is_outside)

    @property
    def sums_are_smaller(self) -> tf.Tensor:
        """Whether the sum exchange takes fewer bytes than the sample exchange."""
        a = self._a
        dim = a.centers.shape[1]
        # Bytes of a row.
        sample = dim * a.features.dtype.size + a.labels.dtype.size
        label = dim * a.centers.dtype.size + 2 * tf.int64.size
        return self.most(LABELS) * label < self.most(SAMPLES) * sample

    def most(self, column: int) -> tf.Tensor:
        """The maximum of a column of the size exchange over the replicas."""
        return tf.reduce_max(self._sizes[:, column])

    def total(self, column: int) -> tf.Tensor:
        """The sum of a column of the size exchange over the replicas."""
        return tf.reduce_sum(self._sizes[:, column])

    def samples(self, rows: tf.Tensor) -> tf.Tensor:
        """[R * L, ...], the rows of all replicas' samples, padded, from this one's [B, ...]."""
        return self.exchange.rows(rows, self.most(SAMPLES))

    def labels(self) -> tf.Tensor:
        """[R * L], the labels of all replicas' samples; NO_CLASS where ignored or padding."""
        # Padding is zero, so labels are exchanged plus one: padding rows get NO_CLASS.
        return self.samples(self._labels + 1) - 1

    def own_samples(self, rows: tf.Tensor) -> tf.Tensor:
        """The rows [B, ...] of this replica's own samples, from rows [R * L, ...]."""
        is_own = self._sizes[:, _REPLICA] == tf.cast(self._replica, tf.int64)
        length = tf.shape(rows)[0] // variables.replicas()
        begin = tf.cast(tf.where(is_own)[0, 0], tf.int32) * length
        return rows[begin : begin + tf.shape(self._a.features)[0]]

    def sums_by_label(self, residual: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """n and the sum of the residuals [B, D], for each of this replica's distinct labels."""
        moving = tf.reduce_all(tf.math.is_finite(self._a.features), axis=1)
        moving &= tf.not_equal(self._labels, NO_CLASS)

        def sum_by_label(rows: tf.Tensor) -> tf.Tensor:
            return tf.math.unsorted_segment_sum(rows, self._segment, self._num_labels)

        n = sum_by_label(tf.cast(moving, tf.int64))
        return n, sum_by_label(tf.where(moving[:, tf.newaxis], residual, 0))

    def share(self) -> Arguments:
        """The arguments for this replica's share of the loss, with a step of zero."""
        a, changes = self._a, {}
        # Not update_centers=False: the loss would then have a gradient to the centers.
        if a.update_centers:
            changes["alpha"] = tf.zeros([], a.alpha.dtype)
        if a.reduction == "mean":
            counted = tf.cast(self.total(COUNTED), a.loss_weight.dtype)
            factor = tf.math.divide_no_nan(a.loss_weight, counted)
            changes |= {"reduction": "sum", "loss_weight": factor}
        # identity: the share and its gradient wait for the control dependencies of the caller.
        return dataclasses.replace(a, features=tf.identity(a.features), **changes)

    def _check(self, is_outside: tf.Tensor) -> tf.Tensor:
        a = self._a

        def message() -> tf.Tensor:
            return tf.cond(
                tf.reduce_any(is_outside),
                lambda: graph_ops.first_outside(a, is_outside),
                lambda: tf.constant(
                    "labels: another replica's batch of this step holds a label that is outside "
                    "the table; nothing was written"
                ),
            )

        checked = require(self.total(_OUTSIDE) == 0, message)
        return checked & graph_ops.check_alpha(a) if a.update_centers else checked


def require_replica() -> None:
    """Raises ValueError outside of the replicas of a strategy."""
    if tf.distribute.get_replica_context() is None:
        raise ValueError(
            "centers: expected a call in a replica, by strategy.run, for ShardedCenters, got one "
            "outside of it"
        )


def _count(condition: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(condition, tf.int64))
