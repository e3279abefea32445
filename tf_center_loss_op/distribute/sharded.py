"""The same step across the replicas of a tf.distribute strategy.

Each replica brings a part of the global batch, and every copy of the centers takes the step of the
whole of it: the copies stay equal bit for bit, because all of them compute the same from the same
numbers. A step exchanges, in this order:

1. from each replica a few numbers: the sizes of its batch. From them all replicas know N, whether a
   label anywhere is out of range (then all of them raise, and nothing has been written), and
2. which of two forms is smaller: the features and labels themselves, or for each label of a replica
   the sum and the number of its residuals. Nothing that is exchanged grows with C.

The exchange calls TensorFlow's collective ops themselves, as its own strategies do, and not
`ReplicaContext.all_gather`: that suspends a replica in the middle of the model's forward pass until
the others are there, and with it the list in which Keras collects the losses of all layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.saving.keras_saveable import KerasSaveable
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops.resource_variable_ops import ResourceVariable
from tensorflow.python.trackable.base import VARIABLE_VALUE_KEY, Trackable
from tensorflow.python.training.saving.saveable_object_util import ResourceVariableSaveable

from tf_center_loss_op import _arguments, _graph_impl, _native, tables

# What a label becomes that is ignored, or only fills up the batch of a replica.
_NOBODY = -1

# TensorFlow counts the keys of its own collective ops from 100 upwards.
_FIRST_KEY = 2**30

# To how many rows a replica's are filled up: at most a sixteenth of them is in vain.
_LENGTHS = sorted({step << k for step in range(32) for k in range(27)})

# Places of the numbers that are exchanged first.
_SAMPLES, _COUNTED, _LABELS, _OUTSIDE, _REPLICA = range(5)

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


def require_supported_strategy():
    """Raises ValueError in the scope of a strategy under which a step would not be right."""
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
    if _launchers(strategy) is None:
        raise ValueError(
            f"strategy: {name} over {', '.join(strategy.extended.worker_devices)} is not "
            "supported: use devices of one kind"
        )


def replicas() -> int:
    """How many replicas run the code that is being run or traced, each on a part of the batch."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica() -> int:
    """Which of this process's replicas runs."""
    context = tf.distribute.get_replica_context()
    return 0 if context is None else context._replica_id


def own_copy(variable: keras.Variable) -> keras.Variable | tf.Variable:
    """The copy of a layer's weight that belongs to this replica.

    Where all replicas write the same to theirs there is nothing to agree on.
    """
    if in_stateless_scope():
        return variable
    variable = _arguments.unwrap(variable)
    return tf.distribute.get_strategy().experimental_local_results(variable)[replica()]


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy`, under which `fit` of Keras 3 works, too.

    Keras asks the strategy for the mean of whole batches, and of scalars along their first axis,
    which ends with an error (keras-team/keras issue 20585): here structures are reduced one by one,
    and scalars over the replicas only. Otherwise the same; for training loops of one's own either
    will do.

    >>> import tf_center_loss_op as tcl
    >>> strategy = tcl.distribute.MultiWorkerMirroredStrategy()  # of the workers in TF_CONFIG
    """

    def reduce(self, reduce_op, value, axis=None):
        """As in the base class, also for structures and scalars."""

        def one(value):
            local = self.experimental_local_results(value)[0]
            scalar = tf.convert_to_tensor(local).shape.rank == 0
            return super(MultiWorkerMirroredStrategy, self).reduce(
                reduce_op, value, axis=None if scalar else axis
            )

        return tf.nest.map_structure(one, value)


def loss_for_keras(share: tf.Tensor) -> tf.Tensor:
    """From every replica's share the loss of the global batch, as a layer adds it.

    Keras divides an added loss by the number of replicas, and then adds up their gradients; what it
    shows is the mean over the replicas, weighted by their batches. So all of them have the whole
    loss.
    """
    return share if replicas() == 1 else sum_over_replicas(tf.reduce_sum(share))


def sum_over_replicas(numbers: tf.Tensor) -> tf.Tensor:
    """The sum of every replica's numbers, of any shape, where all of them go on to one loss.

    A replica's numbers are in the losses of all R, whose gradients are added up: their gradient is
    R times the one of this replica's loss.
    """
    if tf.executing_eagerly() and len(_launchers(tf.distribute.get_strategy())) > 1:
        raise RuntimeError(
            "run_eagerly: expected False for CenterLoss and GlobalBatchLoss on several replicas of "
            "one process, got True; in a training loop, call strategy.run in a tf.function"
        )

    @tf.custom_gradient
    def added(numbers):
        all_numbers = _Exchange().numbers(tf.reshape(numbers, [-1]))
        whole = tf.reshape(tf.reduce_sum(all_numbers, axis=0), numbers.shape)
        return whole, lambda upstream: upstream * replicas()

    return added(numbers)


class ShardedCenters(_arguments.TableLike, Trackable, KerasSaveable):
    """A table whose rows are split over the replicas of a strategy, for tables beyond one device.

    Stands for the variable in `center_loss` and `update_centers`, and in a layer by
    ``CenterLoss(..., sharded=True)``; gives the numbers of a table that is not split:

        centers = tf.Variable(initializer([num_classes, dim]), trainable=False)

    Replica r of R owns the rows [C r // R, C (r + 1) // R), C/R * D numbers; it is given the
    features of all replicas' batches, moves its own rows, and gives back the residuals. No gradient
    flows to these centers: they move by the rule. Make it in ``strategy.scope()``, on every worker;
    without a strategy, or with one replica, there is one part.

    Args:
      num_classes: C, at least the number of replicas.
      dim: D >= 1.
      initializer: zeros, ones, a constant, or `RandomCenters`, by object or name. With a seed the
        numbers are the same on any number of replicas.
      dtype: ``"float32"`` or ``"float64"``.

    Attributes:
      shape, dtype: of the whole table.
      shards: this process's parts, as pairs (first row, ``tf.Variable``).

    Raises:
      ValueError: an argument is not one of these, or the strategy is not supported.

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
        num_classes = _arguments.positive("num_classes", num_classes)
        dim = _arguments.positive("dim", dim)
        _arguments.one_of("dtype", dtype, ("float32", "float64"))
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
            rows = _initial_rows(keras.initializers.get(initializer), self.shape, self.dtype)
            self._variables = []
            for index, device in zip(self._indices, devices, strict=True):
                with tf.device(device):
                    begin, end = self.range_of(index)
                    self._variables.append(
                        # tf.Variable would ask the strategy, which makes a copy for each replica.
                        ResourceVariable(rows(begin, end), trainable=False, name="centers")
                    )

    @property
    def shards(self) -> list[tuple[int, tf.Variable]]:
        """This process's parts: (first row, variable)."""
        first = [self.range_of(index)[0] for index in self._indices]
        return list(zip(first, self._variables, strict=True))

    def range_of(self, index: int) -> tuple[int, int]:
        """The rows [begin, end) of a replica."""
        classes = self.shape[0]
        return classes * index // self._replicas, classes * (index + 1) // self._replicas

    def own_index(self) -> int:
        """The index of the replica whose code is being run or traced."""
        if replicas() != self._replicas:
            raise ValueError(
                f"centers: expected a call under the strategy of {self._replicas} replicas that "
                f"these ShardedCenters were made in, got one of {replicas()}"
            )
        return self._indices[replica()]

    def own(self) -> tf.Variable:
        """The part of this replica."""
        return self._variables[self._indices.index(self.own_index())]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the table to a folder that all workers see: one NumPy file for each part.

        Call it on every worker, outside of ``strategy.run``. A save counts when all parts are
        complete and on the disk; a job killed meanwhile leaves the save before it.

        Args:
          folder: made where there is none.

        Raises:
          OSError: a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        serial = _saved(folder)["serial"] + 1 if (folder / _SAVED).exists() else 1
        for index, variable in zip(self._indices, self._variables, strict=True):
            tables.save_centers(variable, folder / _part(serial, index, self._replicas))
        self._wait_for_all()
        if 0 in self._indices:
            state = {"serial": serial, "parts": self._replicas}
            state |= {"shape": self.shape.as_list(), "dtype": self.dtype.name}
            _write_whole(folder / _SAVED, json.dumps(state))
            current = {_part(serial, k, self._replicas) for k in range(self._replicas)}
            for path in folder.glob("centers-*.npy"):
                if path.name not in current:
                    path.unlink()
        self._wait_for_all()

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote, on any number of replicas, into this process's parts.

        Args:
          folder: that `save` was given.

        Raises:
          FileNotFoundError: there is no complete save in the folder.
          ValueError: it is of a table of another shape or type, or a file is not whole. Parts may
            have been written then.
        """
        folder = Path(folder)
        state = _saved(folder)
        expected = [self.shape.as_list(), self.dtype.name]
        if [state["shape"], state["dtype"]] != expected:
            raise ValueError(
                f"folder: expected a table {self.dtype.name} {self.shape}, got {state['dtype']} "
                f"{tuple(state['shape'])} in {os.fspath(folder)!r}"
            )
        parts = state["parts"]
        files = [folder / _part(state["serial"], k, parts) for k in range(parts)]
        self._fill(_rows_of_file(path, self.dtype, self.shape[1]) for path in files)

    def save_own_variables(self, store):
        """Keras's `save` and `save_weights`, where one process has all parts."""
        if len(self._indices) < self._replicas:
            raise ValueError(
                "centers: expected layer.centers.save(folder) on every worker where the parts of "
                f"ShardedCenters lie in several processes, got a Keras file; this process has "
                f"{len(self._indices)} of {self._replicas}"
            )
        for begin, variable in self.shards:
            store[str(begin)] = variable.numpy()

    def load_own_variables(self, store):
        """As `save_own_variables`, on any number of replicas."""
        self._fill(np.asarray(store[key]) for key in sorted(store.keys(), key=int))

    def _gather_saveables_for_checkpoint(self):
        """Slices of one tensor to tf.train.Checkpoint, which restores them onto any others."""

        def saveables(name="centers"):
            whole = self.shape.as_list()
            for begin, variable in self.shards:
                part = tf.Variable.SaveSliceInfo(name, whole, [begin, 0], variable.shape.as_list())
                yield ResourceVariableSaveable(variable, part.spec, name)

        return {VARIABLE_VALUE_KEY: lambda name="centers": list(saveables(name))}

    def _fill(self, parts):
        """Writes the arrays that together are the table, in order, as far as its rows are here."""
        first = 0
        for rows in parts:
            for begin, variable in self.shards:
                end = begin + variable.shape[0]
                for b, e in tables._blocks(rows.shape, rows.itemsize):
                    low, high = max(begin, first + b), min(end, first + e)
                    if low < high:
                        block = np.array(rows[low - first : high - first])
                        tables._write(variable, low - begin, high - begin, block)
            first += len(rows)
        if first != self.shape[0]:
            raise ValueError(f"centers: expected {self.shape[0]} rows, got {first}")

    def _wait_for_all(self):
        if len(self._indices) == self._replicas:
            return

        @tf.autograph.experimental.do_not_convert
        def meet():
            return _Exchange().numbers(tf.zeros([1], tf.int64))

        tf.function(self._strategy.run, autograph=False)(meet)

    def _obj_type(self):
        # Of the kinds that Keras knows, one that holds no layers.
        return "Loss"


_SAVED = "sharded_centers.json"


def _saved(folder):
    return json.loads((folder / _SAVED).read_text())


def _write_whole(path, text):
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _rows_of_file(path, dtype, dim):
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"folder: expected a complete file {os.fspath(path)!r}: {error}"
        ) from error
    if rows.dtype != dtype.as_numpy_dtype or rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(
            f"folder: expected {dtype.name} [rows, {dim}], got {rows.dtype} {rows.shape} in "
            f"{os.fspath(path)!r}"
        )
    return rows


def _part(serial, index, parts):
    return f"centers-{serial:09d}-{index:05d}-of-{parts:05d}.npy"


def _replicas_here(strategy):
    """The indices of this process's replicas among all."""
    context = tf.distribute.get_replica_context()
    if context is not None:
        return [0]
    indices = strategy.run(lambda: tf.distribute.get_replica_context().replica_id_in_sync_group)
    return [int(index) for index in strategy.experimental_local_results(indices)]


def _initial_rows(initializer, shape, dtype):
    """What gives the rows [begin, end) of a table of this shape."""
    known = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    if isinstance(initializer, known):
        make = tables.in_place(initializer)
        return lambda begin, end: make((end - begin, shape[1]), dtype.name)
    if not isinstance(initializer, tables.RandomCenters):
        raise ValueError(
            "initializer: expected zeros, ones, a constant or RandomCenters, whose rows can be "
            f"made in parts, got {type(initializer).__name__}"
        )
    block_of = initializer.blocks(tuple(shape), dtype)
    blocks = tables._blocks(shape, dtype.size)

    def rows(begin, end):
        parts = [
            block_of(b, e)[max(begin - b, 0) : end - b] for b, e in blocks if b < end and begin < e
        ]
        return tf.concat(parts, axis=0)

    return lambda begin, end: tables._filled(
        (end - begin, shape[1]), dtype, lambda b, e: rows(begin + b, begin + e)
    )


class Replicated:
    """The step of all replicas' batches together, on this replica's copy of the centers.

    Has the functions of an implementation, and computes with those of the one it is given. The loss
    is this replica's share: the sum over the replicas is that of the global batch.
    """

    def __init__(self, run):
        if _native.gpu_atomics():
            raise ValueError(
                "set_gpu_atomics: expected False where every replica has a copy of the centers, "
                "which sums in any order would let drift apart, got True"
            )
        self._run = run

    def center_loss(self, a: _arguments.Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's share of the loss, and ||x_i - c_{y_i}||^2 [B] of its samples."""
        step = _Step(a)
        with tf.control_dependencies([step.checked]):
            share = dataclasses.replace(a, features=tf.identity(a.features), **_share(a, step))
            loss, squared_distance = self._run.center_loss(share)
            if a.update_centers:
                self._update(a, step)
        return loss, squared_distance

    def update_centers(self, a: _arguments.Arguments):
        """The step alone."""
        step = _Step(a)
        with tf.control_dependencies([step.checked]):
            self._update(a, step)

    def _update(self, a, step):
        tf.cond(
            step.sums_are_smaller,
            lambda: self._by_sums(a, step),
            lambda: self._by_samples(a, step),
        )

    def _by_samples(self, a, step):
        features, labels = step.everything()
        everything = dataclasses.replace(
            a, features=features, labels=labels, ignore_class=_NOBODY, sample_weight=None
        )
        self._run.update_centers(everything)
        return True

    def _by_sums(self, a, step):
        n, total = step.sums()
        labels = tf.where(n > 0, tf.cast(step.own_labels, tf.int64), _NOBODY)
        total = step.exchange.rows(total, step.most(_LABELS))
        numbers = step.exchange.rows(tf.stack([labels + 1, n], axis=1), step.most(_LABELS))
        labels, n = numbers[:, 0] - 1, numbers[:, 1]
        distinct, group = tf.unique(labels)
        n = tf.gather(tf.math.unsorted_segment_sum(n, group, tf.size(distinct)), group)
        dtype = a.centers.dtype
        counted = tf.cast(step.total(_COUNTED), dtype)
        scale = _graph_impl.step_scale(a, tf.cast(n, dtype), counted)
        # Scaled by all replicas' n_j already: what is left is to add the rows up, in their order.
        everything = dataclasses.replace(
            a,
            features=total,
            labels=labels,
            ignore_class=_NOBODY,
            sample_weight=None,
            rule="sum",
            alpha=tf.ones([], dtype),
        )
        self._run.update_from_residual(everything, scale[:, tf.newaxis] * total)
        return True


def _share(a, step):
    """What is different in the arguments for a replica's share of the loss."""
    changes = {}
    if a.update_centers:
        # The forward pass of a step, without the step.
        changes["alpha"] = tf.zeros([], a.alpha.dtype)
    if a.reduction == "mean":
        counted = tf.cast(step.total(_COUNTED), a.loss_weight.dtype)
        changes |= {
            "reduction": "sum",
            "loss_weight": tf.math.divide_no_nan(a.loss_weight, counted),
        }
    return changes


class Sharded:
    """The step of all replicas' batches together, on a table of which each has a part.

    As `Replicated`, for `ShardedCenters`. Every replica takes the samples of all, and the labels
    that are not its own for ignored ones; a sample's residual, which only the owner of its center
    has, goes back to it by addition: of what the others have, which is zero.
    """

    def __init__(self, run):
        self._run = run

    def center_loss(self, a: _arguments.Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's share of the loss, and ||x_i - c_{y_i}||^2 [B] of its samples."""
        if in_stateless_scope():
            # Keras wants to know the shapes of what comes out.
            return _loss_from_residual(a, tf.cast(a.features, a.centers.dtype))
        _in_a_replica()
        if replicas() == 1:
            return self._run.center_loss(dataclasses.replace(a, centers=a.centers.own()))
        step = _Step(a)
        with tf.control_dependencies([step.checked]):
            residual = self._run.residual_and_step(_own_rows(a, step))
            residual = step.own_part(step.exchange.add(residual))
            a = dataclasses.replace(a, **_share(a, step))
            return _loss_from_residual(a, residual)

    def update_centers(self, a: _arguments.Arguments):
        """The step alone."""
        _in_a_replica()
        if replicas() == 1:
            return self._run.update_centers(dataclasses.replace(a, centers=a.centers.own()))
        step = _Step(a)
        with tf.control_dependencies([step.checked]):
            self._run.update_centers(_own_rows(a, step))


def _in_a_replica():
    if tf.distribute.get_replica_context() is None:
        raise ValueError(
            "centers: expected a call in a replica, by strategy.run, for ShardedCenters, got one "
            "outside of it"
        )


def _own_rows(a, step):
    """The samples of all replicas, as the owner of a part of the table sees them."""
    features, labels = step.everything()
    begin, end = a.centers.range_of(a.centers.own_index())
    mine = (labels >= begin) & (labels < end)
    # N is over all owners' samples.
    dtype = a.centers.dtype
    a = dataclasses.replace(a, sample_weight=None, ignore_class=_NOBODY, reduction="sum")
    if "batch_mean" in a.rule:
        counted = tf.cast(step.total(_COUNTED), dtype)
        rule = {"batch_mean": "sum", "paper_batch_mean": "paper"}[a.rule]
        a = dataclasses.replace(a, rule=rule, alpha=tf.math.divide_no_nan(a.alpha, counted))
    return dataclasses.replace(
        a,
        features=features,
        labels=tf.where(mine, labels - tf.cast(begin, labels.dtype), _NOBODY),
        centers=a.centers.own(),
    )


def _loss_from_residual(a, residual):
    @tf.custom_gradient
    def of_features(features):
        return residual, lambda upstream: tf.cast(upstream, features.dtype)

    residual = of_features(a.features)
    return _graph_impl.loss_of(a, residual), tf.reduce_sum(residual * residual, axis=1)


class _Step:
    """What the replicas tell each other before anything else."""

    def __init__(self, a):
        self.exchange = _Exchange()
        self._a = a
        counted = _graph_impl.counted(a)
        outside = _graph_impl.outside(a)
        self.labels = tf.where(counted, a.labels, _NOBODY)
        self.own_labels, self.group = tf.unique(self.labels)
        self.num_labels = tf.size(self.own_labels)
        self._replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = [tf.size(a.labels), _count(counted), self.num_labels, _count(outside), self._replica]
        own = tf.stack([tf.cast(number, tf.int64) for number in own])
        self._sizes = self.exchange.numbers(own)
        self.checked = self._check(a, outside)

    @property
    def sums_are_smaller(self):
        """Whether the sums take fewer bytes than the samples they are of."""
        a = self._a
        dim = a.centers.shape[1]
        sample = dim * a.features.dtype.size + a.labels.dtype.size
        label = dim * a.centers.dtype.size + 2 * tf.int64.size
        return self.most(_LABELS) * label < self.most(_SAMPLES) * sample

    def most(self, place):
        """The largest of this number over the replicas."""
        return tf.reduce_max(self._sizes[:, place])

    def total(self, place):
        """The sum of this number over the replicas."""
        return tf.reduce_sum(self._sizes[:, place])

    def everything(self):
        """The features and labels of all replicas' batches."""
        features = self.exchange.rows(self._a.features, self.most(_SAMPLES))
        # One more, so that what is filled up is nobody's.
        return features, self.exchange.rows(self.labels + 1, self.most(_SAMPLES)) - 1

    def own_part(self, rows):
        """Of rows of all replicas' samples those of this one's."""
        place = tf.where(self._sizes[:, _REPLICA] == tf.cast(self._replica, tf.int64))[0, 0]
        length = tf.shape(rows)[0] // replicas()
        begin = tf.cast(place, tf.int32) * length
        return rows[begin : begin + tf.shape(self._a.features)[0]]

    def sums(self):
        """For each of own_labels n and the sum of the residuals of this replica's samples."""
        moving = tf.reduce_all(tf.math.is_finite(self._a.features), axis=1)
        moving &= tf.not_equal(self.labels, _NOBODY)
        residual = tf.stop_gradient(_graph_impl.residual_of(self._a))

        def add_up(rows):
            return tf.math.unsorted_segment_sum(rows, self.group, self.num_labels)

        n = add_up(tf.cast(moving, tf.int64))
        return n, add_up(tf.where(moving[:, tf.newaxis], residual, 0))

    def _check(self, a, outside):
        def message():
            return tf.cond(
                tf.reduce_any(outside),
                lambda: _graph_impl.first_outside(a, outside),
                lambda: tf.constant(
                    "labels: another replica's batch of this step holds a label that is outside "
                    "the table; nothing was written"
                ),
            )

        checked = _graph_impl.require(self.total(_OUTSIDE) == 0, message)
        return checked & _graph_impl.check_alpha(a) if a.update_centers else checked


def _count(where):
    return tf.reduce_sum(tf.cast(where, tf.int64))


class _Exchange:
    """The collective ops of this replica.

    A key tells the same op on all replicas from others. TensorFlow remembers every key with the
    shape of what went under it, so a key stands for a shape here: that is right in a loop, where an
    op has the same key in each round, and what is remembered stays bounded. The ordering token
    keeps ops of one key apart.
    """

    def __init__(self):
        self._context = tf.distribute.get_replica_context()
        # In eager mode replicas run one after another: a collective op would wait for ever.
        self._eager = tf.executing_eagerly()
        if _native.in_xla():
            raise ValueError(
                "jit_compile: expected False where several replicas exchange their batches, "
                "got True"
            )
        if not self._eager:
            _let_replicas_overlap()
            self._launcher = _launchers(self._context.strategy)[self._context._replica_id]

    def numbers(self, own):
        """[R, K] of every replica's [K]."""
        return self._gather(own[tf.newaxis], 0)

    def rows(self, own, most):
        """[R * L, ...] of every replica's [K, ...], zeros after them; L >= most, the largest K."""
        # Few lengths, so that there are few shapes.
        length = _length(most)
        missing = tf.gather(_LENGTHS, length) - tf.shape(own)[0]
        padded = tf.pad(own, [[0, missing]] + [[0, 0]] * (own.shape.rank - 1))
        return self._gather(padded, length)

    def add(self, rows):
        """The sum over the replicas, of rows as `rows` returned them."""
        if self._eager:
            return self._context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
        length = _length(tf.shape(rows)[0] // replicas())
        with tf.device(self._launcher._device):
            return tf.raw_ops.CollectiveReduceV2(
                input=rows, merge_op="Add", final_op="Id", **self._options("add", rows, length)
            )

    def _gather(self, rows, length):
        if rows.dtype == tf.bfloat16:
            # Which the op does not know; it only copies bits.
            return tf.bitcast(self._gather(tf.bitcast(rows, tf.float16), length), tf.bfloat16)
        if self._eager:
            return self._context.all_gather(rows, axis=0)
        with tf.device(self._launcher._device):
            gathered = tf.raw_ops.CollectiveGatherV2(
                input=rows, **self._options("gather", rows, length)
            )
        return tf.ensure_shape(gathered, [None, *rows.shape[1:]])

    def _options(self, what, rows, length):
        launcher = self._launcher
        shape = zlib.crc32(f"{what} {rows.dtype.name} {rows.shape[1:]}".encode()) % 2**20
        return {
            "group_size": launcher._group_size,
            "group_key": launcher._group_key,
            "instance_key": _FIRST_KEY + shape * 2**9 + length,
            "ordering_token": [launcher._get_ordering_token()],
            "communication_hint": launcher._options.implementation.value,
            "timeout_seconds": launcher._options.timeout_seconds or 0,
        }


def _let_replicas_overlap():
    """Takes what is only a side effect (Assert, Print) out of the order of the graph so far.

    Replicas of one process are traced into one graph, one after another, and TensorFlow runs such
    ops in the order in which they were traced: one of the second replica before an exchange would
    wait for one of the first after it, and the first for the second to exchange.
    """
    graph = tf.compat.v1.get_default_graph()
    manager = graph.experimental_acd_manager
    if manager is None:
        return
    known = set(manager._independent_ops)
    for op in graph.get_operations():
        touches_nothing = all(tensor.dtype != tf.resource for tensor in op.inputs)
        if op not in known and touches_nothing and auto_control_deps.op_is_stateful(op):
            manager.run_independently(op)


def _length(rows):
    """Place in _LENGTHS of the least that is no smaller."""
    return tf.searchsorted(_LENGTHS, [tf.cast(rows, tf.int32)])[0]


def _launchers(strategy):
    """What TensorFlow calls collective ops with, for each replica of this process, or None."""
    extended = strategy.extended
    ops = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    return getattr(ops, "_launchers", None)
