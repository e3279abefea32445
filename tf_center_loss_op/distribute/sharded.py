"""Centers whose rows are split over the replicas of a strategy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import arguments, private_apis, variables
from tf_center_loss_op.distribute import sharded_files
from tf_center_loss_op.distribute.exchange import Exchange
from tf_center_loss_op.distribute.strategies import require_supported_strategy
from tf_center_loss_op.tables import h5
from tf_center_loss_op.tables.blocks import blocks, write_rows
from tf_center_loss_op.tables.initializers import initial_rows


class ShardedCenters(variables.TableLike, private_apis.StoredInShards):
    """A table whose rows are split over the replicas of a strategy, for tables beyond one device.

    It takes the place of the variable in `center_loss` and `update_centers`; a layer makes it for
    ``CenterLoss(..., sharded=True)``. The results are those of a table that is not split:

        centers = tf.Variable(initializer([num_classes, dim]), trainable=False)

    Replica r of R owns the rows [C r // R, C (r + 1) // R), C/R * D numbers. It receives the
    features of all replicas' batches, moves its own rows, and sends the residuals back. On several
    replicas no gradient flows to these centers: they move by the rule. Make it in
    ``strategy.scope()``, on every worker. Without a strategy, or with one replica, there is one
    shard.

    Args:
      num_classes: C, at least the number of replicas.
      dim: D >= 1.
      initializer: zeros, ones, a constant, or `tables.RandomNormal`, by object or name.
        With a seed the numbers are the same on any number of replicas.
      dtype: ``"float32"`` or ``"float64"``.

    Attributes:
      shape, dtype: of the whole table.
      shards: this process's shards, as pairs (first row, ``tf.Variable``).
      weights: the same shards as ``keras.Variable``, which a layer lists among its weights.

    Raises:
      TypeError, ValueError: an argument is not one of these, or the strategy is not supported.

    Determinism: as `center_loss`.

    >>> import tensorflow as tf
    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.distribute.ShardedCenters(1000, 64)
    >>> loss = tcl.center_loss(tf.ones([32, 64]), tf.range(32), centers)
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        initializer: str | keras.initializers.Initializer = "zeros",
        dtype: str = "float32",
    ):
        require_supported_strategy()
        num_classes = arguments.positive("num_classes", num_classes)
        dim = arguments.positive("dim", dim)
        arguments.one_of("dtype", dtype, ("float32", "float64"))
        self._strategy = tf.distribute.get_strategy()
        if isinstance(self._strategy, tf.distribute.ParameterServerStrategy):
            raise ValueError(
                "strategy: ParameterServerStrategy splits tables itself: expected a tf.Variable "
                "made under its variable_partitioner"
            )
        self._replicas = self._strategy.num_replicas_in_sync
        if num_classes < self._replicas:
            raise ValueError(
                f"num_classes: expected at least one for each of {self._replicas} replicas, "
                f"got {num_classes}"
            )
        self.shape = tf.TensorShape([num_classes, dim])
        self.dtype = tf.as_dtype(dtype)
        with tf.init_scope():
            self._indices = _replicas_here(self._strategy)
            several = tf.distribute.has_strategy()
            devices = self._strategy.extended.worker_devices if several else [None]
            rows = initial_rows(keras.initializers.get(initializer), self.shape, self.dtype)
            self._variables = []
            for index, device in zip(self._indices, devices, strict=True):
                with tf.device(device):
                    # tf.Variable would ask the strategy, which makes a copy for each replica.
                    shard = private_apis.ResourceVariable(
                        rows(*self.range_of(index)), trainable=False, name="centers"
                    )
                self._variables.append(shard)
        self.weights = [private_apis.WeightOnVariable(v, "centers") for v in self._variables]

    @property
    def shards(self) -> list[tuple[int, tf.Variable]]:
        """This process's shards: (first row, variable)."""
        first = [self.range_of(index)[0] for index in self._indices]
        return list(zip(first, self._variables, strict=True))

    def range_of(self, index: int) -> tuple[int, int]:
        """The own rows [begin, end) of the replica with this index."""
        classes = self.shape[0]
        return classes * index // self._replicas, classes * (index + 1) // self._replicas

    def own_index(self) -> int:
        """The index, among all replicas, of the one whose code is being run or traced."""
        if variables.replicas() != self._replicas:
            raise ValueError(
                f"centers: expected a call under the strategy of {self._replicas} replicas that "
                f"these ShardedCenters were made in, got one of {variables.replicas()}"
            )
        return self._indices[variables.replica()]

    def own(self) -> tf.Variable:
        """The shard of this replica."""
        return self._variables[self._indices.index(self.own_index())]

    def save(self, folder: str | bytes | os.PathLike) -> None:
        """Writes the table to a folder that all workers see: one NumPy file for each shard.

        Call it on every worker, outside of ``strategy.run``. A save counts when all shards are
        complete and on the disk; a job killed meanwhile leaves the previous save.

        Args:
          folder: the folder; created if it does not exist.

        Raises:
          OSError: a file cannot be written.
        """
        save = sharded_files.Save(folder, self._replicas)
        for index, variable in zip(self._indices, self._variables, strict=True):
            save.write_shard(index, variable)
        self._wait_for_all()
        if 0 in self._indices:
            save.complete(self.shape, self.dtype)
        self._wait_for_all()

    def load(self, folder: str | bytes | os.PathLike, *, grow: bool = False) -> None:
        """Reads what `save` wrote, on any number of replicas, into this process's shards.

        A table gets more classes by a save of the smaller table and a load into a larger one:

            smaller.save(folder)
            larger = ShardedCenters(num_classes, dim, initializer=initializer)
            larger.load(folder, grow=True)

        Args:
          folder: the one that `save` was given.
          grow: whether the save may be of a table of fewer classes. Its rows become the first ones
            of this table, and the others stay as they are.

        Raises:
          FileNotFoundError: there is no complete save in the folder.
          ValueError: the save is of a table of another shape or type, or a file is incomplete. The
            shards may have been overwritten in part.
        """
        if not isinstance(grow, bool):
            raise TypeError(f"grow: expected True or False, got {grow!r}")
        rows, arrays = sharded_files.saved(folder, self.shape, self.dtype, fewer_rows=grow)
        self._fill(arrays, rows)

    def save_own_variables(self, store: Any) -> None:
        """Called by Keras's `save` and `save_weights`; one process must have all shards."""
        if len(self._indices) < self._replicas:
            raise ValueError(
                "centers: expected layer.centers.save(folder) on every worker where the shards of "
                f"ShardedCenters lie in several processes, got a Keras file; this process has "
                f"{len(self._indices)} of {self._replicas}"
            )
        for begin, variable in self.shards:
            store[str(begin)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras: reads what `save_own_variables` wrote, on any number of replicas."""
        group = h5.h5_group(store)

        def shard(key: str) -> np.ndarray:
            return np.asarray(store[key] if group is None else h5.whole_dataset(group, key))

        self._fill(map(shard, sorted(store.keys(), key=int)), self.shape[0])

    def checkpoint_slices(self, name: str) -> list[Any]:
        """A saveable for each shard: slices of one tensor, which is restored onto any slices."""
        whole = self.shape.as_list()
        found = []
        for begin, variable in self.shards:
            info = tf.Variable.SaveSliceInfo(name, whole, [begin, 0], variable.shape.as_list())
            found.append(private_apis.ResourceVariableSaveable(variable, info.spec, name))
        return found

    def _fill(self, arrays: Iterable[np.ndarray], expected: int) -> None:
        """Writes the first rows of the table, given as consecutive arrays, to own shards."""
        first = 0
        for rows in arrays:
            for begin, variable in self.shards:
                end = begin + variable.shape[0]
                for b, e in blocks(rows.shape, rows.itemsize):
                    low, high = max(begin, first + b), min(end, first + e)
                    if low < high:
                        block = np.array(rows[low - first : high - first])
                        write_rows(variable, low - begin, high - begin, block)
            first += len(rows)
        if first != expected:
            raise ValueError(f"centers: expected {expected} rows, got {first}")

    def _wait_for_all(self) -> None:
        """Returns when every worker has called it."""
        if len(self._indices) == self._replicas:
            return

        @tf.autograph.experimental.do_not_convert
        def meet() -> tf.Tensor:
            return Exchange([]).numbers(tf.zeros([1], tf.int64))

        tf.function(self._strategy.run, autograph=False)(meet)


def _replicas_here(strategy: tf.distribute.Strategy) -> list[int]:
    """The indices of this process's replicas among all."""
    if tf.distribute.get_replica_context() is not None:
        return [0]
    indices = strategy.run(lambda: tf.distribute.get_replica_context().replica_id_in_sync_group)
    return [int(index) for index in strategy.experimental_local_results(indices)]
