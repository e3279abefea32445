"""The main loss of a Keras model across the replicas of a strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
import tensorflow as tf
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import reduce_weighted_values
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.utils.naming import get_object_name

from tf_center_loss_op import distribute

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
REDUCTIONS = (*MEANS, "sum")


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class GlobalBatchLoss(keras.losses.Loss):
    """A Keras loss as it is on one replica, on any number of them.

    Keras gives every replica's mean the same weight: that of a replica with one sample counts as
    much as that of one with hundreds, and what `fit` shows is weighted in another way. With this
    loss in its place the gradients and what is shown are those of the concatenated batch, also
    where a replica has no sample. On each replica, r of R, equals:

        numbers = [sum(sample_weight * loss.call(y_true, y_pred)), number of samples]
        total, count = sum over all replicas(numbers)
        return total / count

    The number is what the loss's own reduction divides by: of all values, of those that a mask
    leaves, or with ``"mean_with_sample_weight"`` the sum of the weights; ``"sum"`` divides by
    nothing. On one replica, or without a strategy, it is the given loss.

    Args:
      loss: a `keras.losses.Loss` that reduces to a mean or a sum, the name of a loss, or a
        function (y_true, y_pred) -> the loss of each sample, of which the mean is taken. A sample's
        loss depends on no other sample. For several outputs, one for each.
      name: that of the given loss by default.

    Call arguments:
      y_true, y_pred, sample_weight: as the given loss takes them, of this replica.

    Returns:
      A scalar of the loss's type: as of all losses of `keras.losses`, one R-th of what Keras shows.

    Raises:
      TypeError, ValueError: the loss is none of these; the strategy is not supported; in a call on
        several replicas, the loss gives one number for all samples.
      RuntimeError: in a call, on several replicas of one process in eager mode.

    Determinism: as the given loss; all replicas add the same numbers in the same order.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> loss = tcl.distribute.GlobalBatchLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    """

    def __init__(
        self,
        loss: str | keras.losses.Loss | Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        *,
        name: str | None = None,
    ):
        distribute.require_supported_strategy()
        self._given = loss
        self.loss = loss = _loss_object(loss)
        if loss.reduction not in REDUCTIONS:
            raise ValueError(
                f"loss: expected one that reduces to a scalar, with reduction one of {REDUCTIONS}, "
                f"got reduction={loss.reduction!r}"
            )
        super().__init__(name or loss.name, loss.reduction, loss.dtype)

    def call(self, y_true, y_pred):
        """The given loss of each sample."""
        return self.loss.call(y_true, y_pred)

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The loss of all replicas' batches."""
        if distribute.replicas() == 1:
            return self.loss(y_true, y_pred, sample_weight)
        distribute.require_supported_strategy()
        with keras.name_scope(self.name):
            values, mask = self._values(y_true, y_pred)
            # 16-bit numbers do not count a batch.
            dtype = "float64" if values.dtype == tf.float64 else "float32"

            def add_up(values, sample_weight):
                # Not yet added up where the shape says that there is nothing.
                return tf.reduce_sum(
                    reduce_weighted_values(values, sample_weight, mask, "sum", dtype)
                )

            weighs = self.reduction == "mean_with_sample_weight"
            numbers = [
                add_up(values, sample_weight),
                add_up(tf.ones_like(values), sample_weight if weighs else None),
            ]
            total, count = tf.unstack(distribute.sum_over_replicas(tf.stack(numbers)))
            if self.reduction in MEANS:
                total = tf.math.divide_no_nan(total, count)
            # Keras adds up the replicas' gradients, and shows R times the loss.
            return tf.cast(total / distribute.replicas(), values.dtype)

    def get_config(self):
        """The constructor's arguments."""
        return {"loss": keras.losses.serialize(self._given), "name": self.name}

    def _values(self, y_true, y_pred):
        """The loss of each sample, and the mask or None, as `keras.losses.Loss` finds them."""
        masks = [get_keras_mask(y_pred)]
        y_true, y_pred = keras.tree.map_structure(
            lambda x: keras.ops.convert_to_tensor(x, self.dtype), (y_true, y_pred)
        )
        values = self.call(y_true, y_pred)
        if values.shape.rank == 0:
            raise ValueError(
                "loss: expected one that gives the loss of each sample where there are several "
                f"replicas, got one number for all of them from {self.name!r}"
            )
        masks.append(get_keras_mask(values))
        masks = [tf.cast(mask, tf.bool) for mask in masks if mask is not None]
        return values, functools.reduce(tf.logical_and, masks) if masks else None


def _loss_object(loss):
    try:
        found = keras.losses.get(loss)
    except (TypeError, ValueError) as error:
        raise _wrong(loss) from error
    if found is None:
        raise _wrong(loss)
    if not isinstance(found, keras.losses.Loss):
        # Named as Keras names it.
        name = loss if isinstance(loss, str) else get_object_name(found)
        return LossFunctionWrapper(found, name=name)
    if type(found).__call__ is not keras.losses.Loss.__call__:
        raise TypeError(
            "loss: expected a keras.losses.Loss that is made by its call(), got "
            f"{type(found).__name__}, which has a __call__ of its own"
        )
    return found


def _wrong(loss):
    return TypeError(
        "loss: expected a keras.losses.Loss, the name of one or a function (y_true, y_pred), of "
        f"one output, got {loss!r}"
    )
