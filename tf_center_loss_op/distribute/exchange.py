"""The exchange between replicas: the collective ops of one step.

In a tf.function the package calls TensorFlow's collective ops itself, as TensorFlow's strategies
do. `ReplicaContext.all_gather` would suspend a replica in the middle of the model's forward pass
until the others arrive, and Keras would mix up the lists in which it collects the losses of all
layers. Eager mode has to use it, so `sum_over_replicas`, which the Keras losses call, refuses eager
mode with several replicas in a process.
"""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from tf_center_loss_op._core import private_apis, variables, xla

# TensorFlow counts the instance keys of its own collective ops from 100 upwards.
_FIRST_KEY = 2**30

# The padding lengths: 0 to 31, then sixteen in each doubling (32, 34, ..., 62, 64, 68, ...), up to
# 31 * 2**26. So few shapes occur, and at most a sixteenth more rows than needed are exchanged.
# There are fewer than 2**9 lengths, see `_options`.
_LENGTHS = sorted({step << k for step in range(32) for k in range(27)})


class Exchange:
    """The collective ops of one step of the running replica.

    An instance key must be the same on all replicas, and TensorFlow stores each key for ever, with
    the shape that was exchanged under it. So the key is computed from the shape: all replicas find
    the same one, a loop reuses it in every round, and few are stored. The ordering token keeps ops
    with the same key apart.

    Args:
      inputs: the tensors that will be exchanged, or from which they will be computed.

    Raises:
      ValueError: under jit_compile, in a graph of TensorFlow 1, or where replicas would deadlock.
    """

    def __init__(self, inputs: list[tf.Tensor]):
        self._context = tf.distribute.get_replica_context()
        # In eager mode the replicas of a process run one after another, so a collective op would
        # wait for ever: `add` and `_gather` call the strategy's all_reduce and all_gather there.
        self._eager = tf.executing_eagerly()
        if xla.in_xla():
            raise ValueError(
                "jit_compile: expected False where several replicas exchange their batches, "
                "got True"
            )
        if not self._eager:
            if not tf.compat.v1.get_default_graph().building_function:
                raise ValueError(
                    "strategy: expected a tf.function where several replicas exchange their "
                    "batches, got a graph of TensorFlow 1, whose sessions cannot run that exchange"
                )
            graph, self._replica = tf.compat.v1.get_default_graph(), variables.replica()
            made = [made for made in _MADE.get(graph, []) if made.replica == self._replica]
            self._number = 1 + max((made.exchange for made in made), default=-1)
            _refuse_deadlock(inputs, self._replica, self._number)
            launchers = private_apis.collective_launchers(self._context.strategy)
            self._launcher = private_apis.CollectiveLauncher(launchers[self._replica])

    def numbers(self, own: tf.Tensor) -> tf.Tensor:
        """[R, K], the numbers [K] of every replica, not in the order of the replicas' indices."""
        return self._gather(own[tf.newaxis], 0)

    def rows(self, own: tf.Tensor, most: tf.Tensor) -> tf.Tensor:
        """The rows [K, ...] of every replica, one replica after another: [R * L, ...].

        Each replica's rows are padded with zeros to L, the padding length of `most`, the largest K.
        """
        length = _length_index(most)
        padding = tf.gather(_LENGTHS, length) - tf.shape(own)[0]
        padded = tf.pad(own, [[0, padding]] + [[0, 0]] * (own.shape.rank - 1))
        return self._gather(padded, length)

    def add(self, rows: tf.Tensor) -> tf.Tensor:
        """The elementwise sum over the replicas of rows [R * L, ...]; L is a padding length."""
        if self._eager:
            return self._context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
        length = _length_index(tf.shape(rows)[0] // variables.replicas())
        with tf.device(self._launcher.device):
            added = tf.raw_ops.CollectiveReduceV2(
                input=rows, merge_op="Add", final_op="Id", **self._options("add", rows, length)
            )
        return self._recorded(added)

    def _gather(self, rows: tf.Tensor, length: tf.Tensor | int) -> tf.Tensor:
        if rows.dtype == tf.bfloat16:
            # CollectiveGatherV2 has no kernel for bfloat16; it only copies bits.
            return tf.bitcast(self._gather(tf.bitcast(rows, tf.float16), length), tf.bfloat16)
        if self._eager:
            return self._context.all_gather(rows, axis=0)
        with tf.device(self._launcher.device):
            gathered = tf.raw_ops.CollectiveGatherV2(
                input=rows, **self._options("gather", rows, length)
            )
        return tf.ensure_shape(self._recorded(gathered), [None, *rows.shape[1:]])

    def _recorded(self, result: tf.Tensor) -> tf.Tensor:
        made = _Made(self._replica, self._number, result.op.name)
        _MADE.setdefault(result.graph, []).append(made)
        return result

    def _options(self, what: str, rows: tf.Tensor, length: tf.Tensor | int) -> dict[str, Any]:
        launcher = self._launcher
        # The key encodes the kind of op and the type and shape of a row in 20 bits, and the padding
        # length in 9. Two shapes with the same 20 bits would share a key.
        shape = zlib.crc32(f"{what} {rows.dtype.name} {rows.shape[1:]}".encode()) % 2**20
        return {
            "group_size": launcher.group_size,
            "group_key": launcher.group_key,
            "instance_key": _FIRST_KEY + shape * 2**9 + length,
            "ordering_token": [launcher.new_ordering_token()],
            "communication_hint": launcher.communication_hint,
            "timeout_seconds": launcher.timeout_seconds,
        }


def _length_index(rows: tf.Tensor) -> tf.Tensor:
    """The index in _LENGTHS of the padding length of so many rows: the smallest one >= rows."""
    return tf.searchsorted(_LENGTHS, [tf.cast(rows, tf.int32)])[0]


@contextlib.contextmanager
def out_of_program_order() -> Iterator[None]:
    """Takes the checks that are made in this block out of program order.

    The checks are stateful ops without a resource. The replicas of one process are traced into one
    graph, one after another, and program order puts all checks of replica 0 before those of
    replica 1. A check of replica 0 after the exchange waits for the exchange. A check of replica 1
    before the exchange would wait for that check, and the exchange could never run.
    Ops on variables and the ops of the user's program keep their order.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly() or variables.replicas() == 1:
        yield
        return
    first = len(graph.get_operations())
    yield
    private_apis.run_out_of_program_order(graph, graph.get_operations()[first:])


class _Made(NamedTuple):
    """A collective op of a graph, and the exchange that it belongs to."""

    replica: int
    exchange: int  # the exchanges of each replica are numbered from 0, in program order
    op_name: str


# The collective ops that the replicas of this process have made in a graph.
_MADE: weakref.WeakKeyDictionary[tf.Graph, list[_Made]] = weakref.WeakKeyDictionary()


def _refuse_deadlock(inputs: list[tf.Tensor], replica: int, exchange: int) -> None:
    """ValueError where program order would make this exchange wait for one that waits for it.

    Exchange k of a replica runs together with exchange k of every other replica. It deadlocks if
    this replica computes what it exchanges from an op B that runs in program order, and an op A,
    earlier in program order, depends on exchange k or a later one of another replica: A waits for
    that exchange, which waits for this one, which waits for B, which waits for A.
    """
    graph = tf.compat.v1.get_default_graph()
    ops = graph.get_operations()  # In the order in which they were made: inputs come first.
    others = {
        made.op_name
        for made in _MADE.get(graph, [])
        if made.replica != replica and made.exchange >= exchange
    }
    waiting = _descendants(ops, others)
    if not waiting:
        return
    computed = _ancestors([tensor.op for tensor in inputs if tensor.graph is graph])
    earlier = None
    for op in filter(private_apis.runs_in_program_order, ops):
        if op.name in computed and earlier is not None:
            raise ValueError(
                "strategy: expected features and labels that no op with side effects computes, or "
                "no such op that uses the loss, where several replicas run in one process; got "
                f"{op.name!r} ({op.type}) before the exchange of batches, which tf.function runs "
                f"after {earlier.name!r} ({earlier.type}) of another replica, which waits for this "
                "exchange. Move one of them out of strategy.run"
            )
        if op.name in waiting:
            earlier = op


def _descendants(ops: list[tf.Operation], names: set[str]) -> set[str]:
    """The names of these ops and of all that depend on them."""
    found = set(names)
    if found:
        for op in ops:
            if any(before.name in found for before in _direct_inputs(op)):
                found.add(op.name)
    return found


def _ancestors(of: list[tf.Operation]) -> set[str]:
    """The names of these ops and of all that they depend on."""
    found, stack = set(), list(of)
    while stack:
        op = stack.pop()
        if op.name not in found:
            found.add(op.name)
            stack += _direct_inputs(op)
    return found


def _direct_inputs(op: tf.Operation) -> list[tf.Operation]:
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)


# --------------------------------------------------------------------------------- for Keras


def loss_for_keras(share: tf.Tensor) -> tf.Tensor:
    """The loss of the global batch, from the shares of all replicas, as a layer must add it.

    Keras divides an added loss by the number of replicas, adds up the replicas' gradients, and
    shows the mean of the replicas' losses, weighted by the sizes of their batches. All of this is
    right if every replica adds the whole loss.
    """
    return share if variables.replicas() == 1 else sum_over_replicas(tf.reduce_sum(share))


def sum_over_replicas(numbers: tf.Tensor) -> tf.Tensor:
    """The elementwise sum of the numbers of all replicas; their shape is known while tracing.

    Every replica computes its loss from this sum, and the gradients of all R losses are added up.
    So the gradient to one replica's numbers is R times that of its own loss.

    Raises:
      RuntimeError: in eager mode with several replicas in this process.
    """
    strategy = tf.distribute.get_strategy()
    if tf.executing_eagerly() and len(private_apis.collective_launchers(strategy)) > 1:
        raise RuntimeError(
            "run_eagerly: expected False for CenterLoss and GlobalBatchLoss on several replicas of "
            "one process, got True; in a training loop, call strategy.run in a tf.function"
        )

    @tf.custom_gradient
    def added(numbers: tf.Tensor) -> tuple[tf.Tensor, Any]:
        all_numbers = Exchange([numbers]).numbers(tf.reshape(numbers, [-1]))
        total = tf.reshape(tf.reduce_sum(all_numbers, axis=0), numbers.shape)
        return total, lambda upstream: upstream * variables.replicas()

    return added(numbers)
