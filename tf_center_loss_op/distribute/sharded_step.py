"""The step on sharded centers.

By the sample exchange every replica gets the samples of all replicas. It ignores those whose center
is not in its shard. So only the owner computes the residual of a sample; the others have zero for
it, and the sum over the replicas (the residual exchange) is the residual.
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

# For the rules that divide alpha by N, the rule that does not.
_WITHOUT_N = {"batch_mean": "sum", "paper_batch_mean": "paper"}


class Sharded:
    """An `Implementation` (dispatch.py) for sharded centers; each replica uses `on_one`."""

    def __init__(self, on_one: Implementation):
        self._on_one = on_one

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's share of the loss, and ||x_i - c_{y_i}||^2 [B] of its samples."""
        if private_apis.in_stateless_scope():
            # Keras asks for the shapes of the results only: the features stand for the residual.
            return _loss_from_residual(a, tf.cast(a.features, a.centers.dtype))
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.center_loss(_on_shard(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                residual = self._residual(a, batch)
                return _loss_from_residual(batch.share(), residual)

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's sum of ||x_i - c_{y_i}||^2 / 2, and x_i - c_{y_i} [B, D]."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.sum_loss_and_residual(_on_shard(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                residual = self._residual(a, batch)
                one = tf.ones([], a.centers.dtype)
                unweighted = dataclasses.replace(
                    a, reduction="sum", loss_weight=one, sample_weight=None
                )
                return _loss_from_residual(unweighted, residual)[0], residual

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """The step of the centers alone."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.update_centers(_on_shard(a))
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                on_shard = _on_own_rows(a, batch, batch.samples(a.features))
                return self._on_one.update_centers(on_shard)

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """The step from the residual [B, D] of this replica's samples."""
        require_replica()
        if variables.replicas() == 1:
            return self._on_one.update_from_residual(_on_shard(a), residual)
        with out_of_program_order():
            batch = GlobalBatch(a)
            with tf.control_dependencies([batch.checked]):
                rows = batch.samples(residual)
                return self._on_one.update_from_residual(_on_own_rows(a, batch, rows), rows)

    def _residual(self, a: Arguments, batch: GlobalBatch) -> tf.Tensor:
        """x_i - c_{y_i} [B, D] of this replica's samples; the centers move if a.update_centers."""
        on_shard = _on_own_rows(a, batch, batch.samples(a.features))
        _, residual = self._on_one.sum_loss_and_residual(on_shard)
        return batch.own_samples(batch.exchange.add(residual))


def _on_shard(a: Arguments) -> Arguments:
    """The arguments of a single replica, whose shard is the whole table."""
    return dataclasses.replace(a, centers=a.centers.own())


def _on_own_rows(a: Arguments, batch: GlobalBatch, features: tf.Tensor) -> Arguments:
    """The arguments of the global batch on this replica's shard; features: of all samples.

    Labels count from the first own row. Samples whose center is in another shard are NO_CLASS, as
    ignored samples and padding rows are. So NO_CLASS takes the place of the caller's ignore_class.
    """
    labels = batch.labels()
    begin, end = a.centers.range_of(a.centers.own_index())
    is_own = (labels >= begin) & (labels < end)
    a = dataclasses.replace(a, sample_weight=None, ignore_class=NO_CLASS, reduction="sum")
    if a.rule in _WITHOUT_N:
        # N is that of the global batch. on_one would count only the samples of its shard.
        counted = tf.cast(batch.total(COUNTED), a.centers.dtype)
        alpha = tf.math.divide_no_nan(a.alpha, counted)
        a = dataclasses.replace(a, rule=_WITHOUT_N[a.rule], alpha=alpha)
    return dataclasses.replace(
        a,
        features=features,
        labels=tf.where(is_own, labels - tf.cast(begin, labels.dtype), NO_CLASS),
        centers=a.centers.own(),
    )


def _loss_from_residual(a: Arguments, residual: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss, and ||x_i - c_{y_i}||^2 [B], from a residual without a gradient.

    of_features gives the residual the gradient to the features that x_i - c_{y_i} has.
    """

    @tf.custom_gradient
    def of_features(features: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return residual, lambda upstream: tf.cast(upstream, features.dtype)

    differentiable = of_features(a.features)
    squared_distance = tf.reduce_sum(differentiable * differentiable, axis=1)
    return graph_ops.loss_of(a, differentiable), squared_distance
