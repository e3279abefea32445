"""A common interface to every kind of variable that can hold the centers.

A caller may give a `tf.Variable`, the `keras.Variable` around one, a variable with a copy on each
replica, or one whose rows a partitioner has split. `unwrap` returns the `tf.Variable`, or one of
the classes below where there is no single variable with a handle. `own_copy` and `own_table` return
the copy of the running replica.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis


class TableLike:
    """What stands for a tf.Variable [C, D] where there is no single variable with a handle.

    `PartitionedCenters` and `StatelessCenters` have what `GraphOps` calls: sparse_read, through
    `tf.gather`, and scatter_add. `distribute.ShardedCenters` has neither: `Sharded` steps on its
    shard.
    """

    dtype: tf.DType
    shape: tf.TensorShape


class PartitionedCenters(TableLike):
    """A variable whose rows a partitioner has split over several parameter servers."""

    def __init__(self, variable: Any):
        self.dtype = variable.dtype
        self.shape = variable.shape
        self.scatter_add = variable.scatter_add
        self._parts = list(variable.variables)

    def sparse_read(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """The rows at the indices; called by `tf.gather`.

        The variable's own method returns them grouped by part, not in the order of the indices.
        """
        return tf.compat.v1.nn.embedding_lookup(
            self._parts, indices, partition_strategy="div", name=name
        )


class StatelessCenters(TableLike):
    """A keras.Variable inside a `keras.StatelessScope`: its value is a tensor there."""

    def __init__(self, variable: keras.Variable):
        self._variable = variable
        self.dtype = tf.as_dtype(variable.dtype)
        self.shape = tf.TensorShape(variable.shape)

    def sparse_read(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """The rows at the indices; called by `tf.gather`."""
        return tf.gather(self._variable.value, indices, name=name)

    def scatter_add(self, sparse_delta: tf.IndexedSlices) -> Any:
        """As `tf.Variable.scatter_add`; the StatelessScope keeps the new value, a new table."""
        indices = sparse_delta.indices[:, tf.newaxis]
        return self._variable.assign(
            tf.tensor_scatter_nd_add(self._variable.value, indices, sparse_delta.values)
        )


def unwrap(variable: Any) -> Any:
    """The tf.Variable inside a keras.Variable, or what stands for it; anything else as it is."""
    if isinstance(variable, keras.Variable):
        inner = private_apis.variable_of(variable)
        if private_apis.in_stateless_scope() or inner is None:
            return StatelessCenters(variable)
        variable = inner
    if isinstance(variable, private_apis.ShardedVariable):
        return PartitionedCenters(variable)
    return variable


def is_resource_variable(variable: Any) -> bool:
    """Whether it is a tf.Variable with a handle that ops can take."""
    return isinstance(variable, tf.Variable) and hasattr(variable, "handle")


def wrong_kind(centers: Any) -> TypeError:
    """The error for centers that are not a resource variable."""
    got = type(centers).__name__
    if isinstance(centers, tf.Variable):
        got += ", a reference variable: create it with use_resource=True"
    if isinstance(centers, private_apis.PartitionedVariable):
        got += (
            ", which a partitioner has split: create it without one, or use "
            "tf_center_loss_op.distribute.ShardedCenters"
        )
    return TypeError(
        "centers: expected a tf.Variable (a resource variable) or a keras.Variable around one, "
        f"got {got}"
    )


def resource_table(centers: Any) -> tf.Variable:
    """The resource variable [C, D] behind `centers`.

    Raises:
      TypeError, ValueError: there is none, or it does not have rank 2.
    """
    variable = unwrap(centers)
    if not is_resource_variable(variable):
        raise wrong_kind(centers)
    if variable.shape.rank != 2:
        raise ValueError(f"centers: expected shape [C, D], got {variable.shape}")
    return variable


def replicas() -> int:
    """How many replicas run this code together, each on its own batch; 1 outside of a replica."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica() -> int:
    """The index of the running replica among those of this process."""
    return private_apis.running_replica()


def own_copy(variable: Any) -> Any:
    """The running replica's copy of a variable that has one on each replica.

    Every replica writes the same values to its copy, so the copies need no synchronization.
    """
    if private_apis.in_stateless_scope():
        return variable
    copies = tf.distribute.get_strategy().experimental_local_results(unwrap(variable))
    return copies[replica()]


def own_table(variable: tf.Variable, moves: bool) -> tf.Variable:
    """The running replica's copy of a table of centers.

    Raises:
      ValueError: the centers are to move on several replicas, and the call is outside of the
        replicas or the variable has no copy on each of them.
    """
    strategy = tf.distribute.get_strategy()
    copies = strategy.experimental_local_results(variable)
    context = tf.distribute.get_replica_context()
    if context is None:
        if moves and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "centers: expected a call in a replica, by strategy.run, where the centers of a "
                f"strategy of {strategy.num_replicas_in_sync} replicas move; got one outside of it"
            )
        return copies[0]
    if context.num_replicas_in_sync == 1:
        return copies[0]
    mirrored = isinstance(variable, tf.distribute.DistributedValues) and (
        variable.synchronization != tf.VariableSynchronization.ON_READ
    )
    if moves and not mirrored:
        raise ValueError(
            "centers: expected a variable with a copy on each replica, made in strategy.scope() "
            f"without synchronization=ON_READ, got {type(variable).__name__}"
        )
    return copies[replica()] if mirrored else copies[0]
