"""The supported strategies of tf.distribute, and a multi-worker one with which `fit` works."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis

_SUPPORTED = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.ParameterServerStrategy,
)
_INSTEAD = (
    "use tf.distribute.MirroredStrategy (the devices of one machine), MultiWorkerMirroredStrategy "
    "(several machines) or ParameterServerStrategy"
)


def require_supported_strategy() -> None:
    """Raises ValueError in the scope of a strategy that is not supported."""
    if keras.distribution.distribution() is not None:
        name = type(keras.distribution.distribution()).__name__
        raise ValueError(f"strategy: keras.distribution.{name} is not supported: {_INSTEAD}")
    if not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    name = type(strategy).__name__
    if not isinstance(strategy, _SUPPORTED):
        raise ValueError(f"strategy: {name} is not supported: {_INSTEAD}")
    if strategy.num_replicas_in_sync == 1:
        return
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            f"strategy: {name} with {strategy.num_replicas_in_sync} GPUs a worker is not "
            "supported: give each worker one GPU (CUDA_VISIBLE_DEVICES), or use "
            "MultiWorkerMirroredStrategy"
        )
    if private_apis.collective_launchers(strategy) is None:
        raise ValueError(
            f"strategy: {name} over {', '.join(strategy.extended.worker_devices)} is not "
            "supported: use devices of one kind"
        )


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy`, with which `fit` of Keras 3 works, too.

    Keras asks the strategy to reduce whole structures, and scalars along their first axis, which
    raises an error (keras-team/keras issue 20585). This class reduces the tensors of a structure
    one by one, and scalars over the replicas only. Custom training loops work with either class.

    >>> import tf_center_loss_op as tcl
    >>> strategy = tcl.distribute.MultiWorkerMirroredStrategy()  # of the workers in TF_CONFIG
    """

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """As in the base class, also for structures and scalars."""

        def reduce_tensor(value: Any) -> tf.Tensor:
            local = self.experimental_local_results(value)[0]
            is_scalar = tf.convert_to_tensor(local).shape.rank == 0
            return super(MultiWorkerMirroredStrategy, self).reduce(
                reduce_op, value, axis=None if is_scalar else axis
            )

        return tf.nest.map_structure(reduce_tensor, value)
