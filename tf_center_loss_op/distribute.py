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
import zlib

import keras
import tensorflow as tf

from tf_center_loss_op import _arguments, _graph_impl, _native

# What a label becomes that is ignored, or only fills up the batch of a replica.
_NOBODY = -1

# TensorFlow counts the keys of its own collective ops from 100 upwards.
_FIRST_KEY = 2**30

# To how many rows a replica's are filled up: at most a sixteenth of them is in vain.
_LENGTHS = sorted({step << k for step in range(32) for k in range(27)})

# Places of the numbers that are exchanged first.
_SAMPLES, _COUNTED, _LABELS, _OUTSIDE = range(4)

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
    """Raises ValueError in the scope of a strategy under which a step would not be the right one."""
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


def own_copy(variable: keras.Variable) -> tf.Variable:
    """The copy of a layer's weight that belongs to this replica.

    Where all replicas write the same to theirs there is nothing to agree on.
    """
    variable = _arguments.unwrap(variable)
    if isinstance(variable, _arguments.TableLike):
        return variable
    return tf.distribute.get_strategy().experimental_local_results(variable)[replica()]


def loss_for_keras(share: tf.Tensor) -> tf.Tensor:
    """From every replica's share the loss of the global batch, as a layer adds it.

    Keras divides an added loss by the number of replicas, and then adds up their gradients; what it
    shows is the mean over the replicas, weighted by their batches. So all of them have the whole
    loss, and each has R times the gradient of its share.
    """
    if replicas() == 1:
        return share
    if tf.executing_eagerly() and len(_launchers(tf.distribute.get_strategy())) > 1:
        raise RuntimeError(
            "run_eagerly: expected False for a CenterLoss layer on several replicas of one "
            "process, got True; in a training loop, call strategy.run in a tf.function"
        )

    @tf.custom_gradient
    def whole(share):
        shares = _Exchange().numbers(tf.reshape(share, [1]))
        return tf.reduce_sum(shares), lambda upstream: upstream * replicas()

    return whole(tf.reduce_sum(share))


class Replicated:
    """The step of all replicas' batches together, on this replica's copy of the centers.

    Has the functions of an implementation, and computes with those of the one it is given. The loss
    is this replica's share: the sum over the replicas is that of the global batch.
    """

    def __init__(self, run):
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
        features = step.exchange.rows(a.features, step.most(_SAMPLES))
        # One more, so that what is filled up is nobody's.
        labels = step.exchange.rows(step.labels + 1, step.most(_SAMPLES)) - 1
        everything = dataclasses.replace(
            a, features=features, labels=labels, ignore_label=_NOBODY, sample_weight=None
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
            ignore_label=_NOBODY,
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
        counted = tf.cast(step.total(_COUNTED), a.weight.dtype)
        changes |= {"reduction": "sum", "weight": tf.math.divide_no_nan(a.weight, counted)}
    return changes


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
        own = [tf.size(a.labels), _count(counted), self.num_labels, _count(outside)]
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
        return checked & _graph_impl.check_alpha(a)


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


def _length(rows):
    """Place in _LENGTHS of the least that is no smaller."""
    return tf.searchsorted(_LENGTHS, [tf.cast(rows, tf.int32)])[0]


def _launchers(strategy):
    """What TensorFlow calls collective ops with, for each replica of this process, or None."""
    extended = strategy.extended
    ops = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    return getattr(ops, "_launchers", None)
