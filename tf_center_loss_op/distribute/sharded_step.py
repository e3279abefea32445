"""The step on centers whose rows are split over the replicas.

Every replica takes the samples of all replicas. Labels of rows that it does not own are ignored
there. Only the owner of a center has the residual of a sample; the others have zero, so a sum over
the replicas brings it back to the sample's replica.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tf_center_loss_op._core import graph_ops, private_apis, variables
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op.distribute.exchange import out_of_program_order
from tf_center_loss_op.distribute.global_batch import (
    COUNTED,
    NO_CLASS,
    GlobalBatch,
    require_replica,
)

if TYPE_CHECKING:
    from tf_center_loss_op._core.dispatch import Implementation


class Sharded:
    """An `Implementation` (dispatch.py) for `ShardedCenters`, by one on each replica's part."""

    def __init__(self, on_one: Implementation):
        self._on_one = on_one

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's share of the loss, and ||x_i - c_{y_i}||^2 [B] of its samples."""
        if private_apis.in_stateless_scope():
            # Keras asks for the shapes of the results only.
            return _loss_from_residual(a, tf.cast(a.features, a.centers.dtype))
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.center_loss(_on_own_part(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                residual = self._residual(a, batch)
                return _loss_from_residual(batch.share(), residual)

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's sum of losses, and x_i - c_{y_i} [B, D] of its samples."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.sum_loss_and_residual(_on_own_part(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                residual = self._residual(a, batch)
                one = tf.ones([], a.centers.dtype)
                plain = dataclasses.replace(a, reduction="sum", loss_weight=one, sample_weight=None)
                return _loss_from_residual(plain, residual)[0], residual

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """The step alone."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.update_centers(_on_own_part(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                everything = _own_rows(a, batch, batch.samples(a.features))
                return self._on_one.update_centers(everything)

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """The step alone, from a residual x_i - c_{y_i} [B, D] computed before."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.update_from_residual(_on_own_part(a), residual)
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                rows = batch.samples(residual)
                return self._on_one.update_from_residual(_own_rows(a, batch, rows), rows)

    def _residual(self, a: Arguments, batch: GlobalBatch) -> tf.Tensor:
        """x_i - c_{y_i} [B, D] of this replica's samples; the centers move."""
        everything = _own_rows(a, batch, batch.samples(a.features))
        _, residual = self._on_one.sum_loss_and_residual(everything)
        return batch.own_samples(batch.exchange.add(residual))


def _on_own_part(a: Arguments) -> Arguments:
    return dataclasses.replace(a, centers=a.centers.own())


def _own_rows(a: Arguments, batch: GlobalBatch, features: tf.Tensor) -> Arguments:
    """The samples of all replicas, as the owner of a part of the table sees them."""
    labels = batch.labels()
    begin, end = a.centers.range_of(a.centers.own_index())
    is_own = (labels >= begin) & (labels < end)
    a = dataclasses.replace(a, sample_weight=None, ignore_class=NO_CLASS, reduction="sum")
    if "batch_mean" in a.rule:
        # N counts the samples of all owners.
        counted = tf.cast(batch.total(COUNTED), a.centers.dtype)
        rule = {"batch_mean": "sum", "paper_batch_mean": "paper"}[a.rule]
        a = dataclasses.replace(a, rule=rule, alpha=tf.math.divide_no_nan(a.alpha, counted))
    return dataclasses.replace(
        a,
        features=features,
        labels=tf.where(is_own, labels - tf.cast(begin, labels.dtype), NO_CLASS),
        centers=a.centers.own(),
    )


def _loss_from_residual(a: Arguments, residual: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    @tf.custom_gradient
    def of_features(features: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return residual, lambda upstream: tf.cast(upstream, features.dtype)

    residual = of_features(a.features)
    return graph_ops.loss_of(a, residual), tf.reduce_sum(residual * residual, axis=1)
