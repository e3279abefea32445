"""The step on mirrored centers.

Every copy takes the step of the global batch. The copies stay equal bit for bit, because all
replicas compute the same from the same numbers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tensorflow as tf

from tf_center_loss_op._core import graph_ops, native
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op.distribute.exchange import out_of_program_order
from tf_center_loss_op.distribute.global_batch import COUNTED, LABELS, NO_CLASS, GlobalBatch

if TYPE_CHECKING:
    from tf_center_loss_op._core.dispatch import Implementation


class Replicated:
    """An `Implementation` (dispatch.py) for mirrored centers; each replica uses `on_one`."""

    def __init__(self, on_one: Implementation):
        if native.gpu_atomics():
            raise ValueError(
                "set_gpu_atomics: expected False where every replica has a copy of the centers, "
                "because sums in any order would let the copies drift apart, got True"
            )
        self._on_one = on_one

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's share of the loss, and ||x_i - c_{y_i}||^2 [B] of its samples."""
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                result = self._on_one.center_loss(batch.share())
                if a.update_centers:
                    self._update(a, batch)
            return result

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's sum of ||x_i - c_{y_i}||^2 / 2, and x_i - c_{y_i} [B, D]."""
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                loss, residual = self._on_one.sum_loss_and_residual(batch.share())
                if a.update_centers:
                    self._update(a, batch, residual)
            return loss, residual

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """The step of the centers alone."""
        return self.update_from_residual(a, None)

    def update_from_residual(self, a: Arguments, residual: tf.Tensor | None) -> tf.Operation | None:
        """The step from the residual [B, D] of this replica's samples, or None to compute it."""
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                return self._update(a, batch, residual)

    def _update(
        self, a: Arguments, batch: GlobalBatch, residual: tf.Tensor | None = None
    ) -> tf.Operation | None:
        done = tf.cond(
            batch.sums_are_smaller,
            lambda: self._by_sums(a, batch, residual),
            lambda: self._by_samples(a, batch, residual),
        )
        return None if tf.executing_eagerly() else done.op

    def _by_samples(
        self, a: Arguments, batch: GlobalBatch, residual: tf.Tensor | None
    ) -> tf.Tensor:
        """The step from the sample exchange; with a residual, that takes the features' place."""
        rows = batch.samples(a.features if residual is None else residual)
        # Ignored samples have the label NO_CLASS by now, as padding rows have: NO_CLASS takes the
        # place of the caller's ignore_class.
        global_batch = dataclasses.replace(
            a, features=rows, labels=batch.labels(), ignore_class=NO_CLASS, sample_weight=None
        )
        if residual is None:
            step = self._on_one.update_centers(global_batch)
        else:
            step = self._on_one.update_from_residual(global_batch, rows)
        return _after(step)

    def _by_sums(self, a: Arguments, batch: GlobalBatch, residual: tf.Tensor | None) -> tf.Tensor:
        """The step from the sum exchange."""
        if residual is None:
            residual = graph_ops.residual_of(a)
        n, total = batch.sums_by_label(tf.stop_gradient(residual))
        labels = tf.where(n > 0, tf.cast(batch.distinct_labels, tf.int64), NO_CLASS)
        total = batch.exchange.rows(total, batch.most(LABELS))
        # Padding is zero, so labels are exchanged plus one: padding rows get NO_CLASS.
        numbers = batch.exchange.rows(tf.stack([labels + 1, n], axis=1), batch.most(LABELS))
        labels, n = numbers[:, 0] - 1, numbers[:, 1]
        distinct, segment = tf.unique(labels)
        n = tf.gather(tf.math.unsorted_segment_sum(n, segment, tf.size(distinct)), segment)
        dtype = a.centers.dtype
        counted = tf.cast(batch.total(COUNTED), dtype)
        scale = graph_ops.step_scale(a, tf.cast(n, dtype), counted)
        # Each row is multiplied here by s_j, from the n_j of the global batch. The rule "sum" with
        # alpha = 1 then only adds up the rows of a class, in the same order on every replica.
        # NO_CLASS takes the place of the caller's ignore_class, because the labels of ignored
        # samples, of padding rows and of classes without a finite sample are NO_CLASS by now.
        sums = dataclasses.replace(
            a,
            features=total,
            labels=labels,
            ignore_class=NO_CLASS,
            sample_weight=None,
            rule="sum",
            alpha=tf.ones([], dtype),
        )
        step = self._on_one.update_from_residual(sums, scale[:, tf.newaxis] * total)
        return _after(step)


def _after(step: tf.Operation | None) -> tf.Tensor:
    """A result for tf.cond that comes after the step."""
    with tf.control_dependencies([] if step is None else [step]):
        return tf.constant(True)
