"""The main loss of a Keras model across the replicas of a strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis, variables
from tf_center_loss_op._core.keras_backend import require_keras_on_tensorflow
from tf_center_loss_op.distribute.exchange import sum_over_replicas
from tf_center_loss_op.distribute.strategies import require_supported_strategy

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
REDUCTIONS = (*MEANS, "sum")


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class GlobalBatchLoss(keras.losses.Loss):
    """A Keras loss whose value and gradients are those of the global batch, on any replicas.

    Keras gives every replica's mean the same weight: the mean of a replica with one sample counts
    as much as that of a replica with hundreds, and `fit` shows a mean that is weighted in another
    way. With this loss instead, the gradients and the shown loss are those of the global batch,
    also where a replica has no sample. On each replica it equals:

        numbers = [sum(sample_weight * loss.call(y_true, y_pred)), number of samples]
        total, count = sum over all replicas(numbers)
        return total / count

    The number of samples is what the loss's own reduction divides by: the number of values that no
    mask leaves out, or with ``"mean_with_sample_weight"`` the sum of the weights. ``"sum"`` divides
    by nothing. On one replica, or without a strategy, it is the given loss.

    Args:
      loss: a `keras.losses.Loss` that reduces to a mean or a sum, the name of a loss, or a
        function (y_true, y_pred) -> the loss of each sample, whose mean is the loss. A sample's
        loss must not depend on other samples. A model with several outputs needs one
        `GlobalBatchLoss` for each.
      name: the name of the Keras loss; by default that of the given loss.

    Call arguments:
      y_true, y_pred, sample_weight: as the given loss takes them, of this replica.

    Returns:
      A scalar of the loss's type: the global loss divided by the R replicas. As for all losses of
      `keras.losses`, Keras adds up the gradients of the replicas and shows R times the scalar.

    Raises:
      TypeError, ValueError: ``loss`` is none of these, or the strategy is not supported; in a call
        on several replicas, the given loss returns one number for all samples.
      RuntimeError: a call in eager mode with several replicas in one process.

    Determinism: as the given loss; all replicas add the same numbers in the same order.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> on_one = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> loss = tcl.distribute.GlobalBatchLoss(on_one)
    """

    def __init__(
        self,
        loss: str | keras.losses.Loss | Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        *,
        name: str | None = None,
    ):
        require_keras_on_tensorflow("GlobalBatchLoss")
        require_supported_strategy()
        self._given = loss
        self.loss = loss = _loss_object(loss)
        if loss.reduction not in REDUCTIONS:
            raise ValueError(
                f"loss: expected one that reduces to a scalar, with reduction one of {REDUCTIONS}, "
                f"got reduction={loss.reduction!r}"
            )
        super().__init__(name or loss.name, loss.reduction, loss.dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The given loss of each sample."""
        return self.loss.call(y_true, y_pred)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        """The loss of the global batch, divided by the number of replicas."""
        if variables.replicas() == 1:
            return self.loss(y_true, y_pred, sample_weight)
        require_supported_strategy()
        with keras.name_scope(self.name):
            values, mask = self._values(y_true, y_pred)
            # A 16-bit float cannot hold every size of a batch.
            dtype = "float64" if values.dtype == tf.float64 else "float32"

            def sum_of(values: tf.Tensor, sample_weight: Any) -> tf.Tensor:
                # Keras returns an empty tensor as it is, without the sum.
                return tf.reduce_sum(
                    private_apis.reduce_weighted_values(values, sample_weight, mask, "sum", dtype)
                )

            counts_weights = self.reduction == "mean_with_sample_weight"
            numbers = [
                sum_of(values, sample_weight),
                sum_of(tf.ones_like(values), sample_weight if counts_weights else None),
            ]
            total, count = tf.unstack(sum_over_replicas(tf.stack(numbers)))
            if self.reduction in MEANS:
                total = tf.math.divide_no_nan(total, count)
            # Keras adds up the replicas' gradients and shows R times the loss.
            return tf.cast(total / variables.replicas(), values.dtype)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"loss": keras.losses.serialize(self._given), "name": self.name}

    def _values(self, y_true: Any, y_pred: Any) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The loss of each sample, and the mask or None, as `keras.losses.Loss` finds them."""
        masks = [private_apis.get_keras_mask(y_pred)]
        y_true, y_pred = keras.tree.map_structure(
            lambda x: keras.ops.convert_to_tensor(x, self.dtype), (y_true, y_pred)
        )
        values = self.call(y_true, y_pred)
        if values.shape.rank == 0:
            raise ValueError(
                "loss: expected one that gives the loss of each sample where there are several "
                f"replicas, got one number for all of them from {self.name!r}"
            )
        masks.append(private_apis.get_keras_mask(values))
        masks = [tf.cast(mask, tf.bool) for mask in masks if mask is not None]
        return values, functools.reduce(tf.logical_and, masks) if masks else None


def _loss_object(loss: Any) -> keras.losses.Loss:
    try:
        found = keras.losses.get(loss)
    except (TypeError, ValueError) as error:
        raise _wrong(loss) from error
    if found is None:
        raise _wrong(loss)
    if not isinstance(found, keras.losses.Loss):
        # The name that Keras gives to a loss made of this function.
        name = loss if isinstance(loss, str) else private_apis.get_object_name(found)
        return private_apis.LossFunctionWrapper(found, name=name)
    if type(found).__call__ is not keras.losses.Loss.__call__:
        raise TypeError(
            "loss: expected a keras.losses.Loss that is made by its call(), got "
            f"{type(found).__name__}, which has a __call__ of its own"
        )
    return found


def _wrong(loss: Any) -> TypeError:
    return TypeError(
        "loss: expected a keras.losses.Loss, the name of one or a function (y_true, y_pred), of "
        f"one output, got {loss!r}"
    )
