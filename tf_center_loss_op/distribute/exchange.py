"""The collective ops by which replicas exchange parts of a batch.

The package calls TensorFlow's collective ops itself, as TensorFlow's strategies do.
`ReplicaContext.all_gather` would suspend a replica in the middle of the model's forward pass until
the others arrive, and Keras would mix up the lists in which it collects the losses of all layers.
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

# Rows are padded to one of these lengths, so that few shapes occur; at most a sixteenth is padding.
_LENGTHS = sorted({step << k for step in range(32) for k in range(27)})


class Exchange:
    """The collective ops of the running replica.

    All replicas give the same op the same instance key. TensorFlow stores every key with the shape
    that was exchanged under it, so a key stands for a shape here: in a loop an op has the same key
    in every round, and the number of stored keys stays bounded. The ordering token keeps ops with
    the same key apart.

    Args:
      inputs: what the replica is about to exchange, or compute it from.
    """

    def __init__(self, inputs: list[tf.Tensor]):
        self._context = tf.distribute.get_replica_context()
        # In eager mode the replicas run one after another, so a collective op would wait for ever.
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
        """[R, K] of every replica's [K]."""
        return self._gather(own[tf.newaxis], 0)

    def rows(self, own: tf.Tensor, most: tf.Tensor) -> tf.Tensor:
        """[R * L, ...] of every replica's [K, ...], padded with zeros to L >= most >= K."""
        length = _length_index(most)
        padding = tf.gather(_LENGTHS, length) - tf.shape(own)[0]
        padded = tf.pad(own, [[0, padding]] + [[0, 0]] * (own.shape.rank - 1))
        return self._gather(padded, length)

    def add(self, rows: tf.Tensor) -> tf.Tensor:
        """The sum over the replicas, of rows [R * L, ...] as `rows` returned them."""
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
    """The index in _LENGTHS of the smallest length that is no smaller."""
    return tf.searchsorted(_LENGTHS, [tf.cast(rows, tf.int32)])[0]


@contextlib.contextmanager
def out_of_program_order() -> Iterator[None]:
    """Takes the checks that the package makes in this block out of program order.

    The replicas of one process are traced into one graph, one after another, and tf.function runs
    stateful ops in the order in which they were traced. A check of the second replica before an
    exchange would wait for a check of the first one after it, and that one for the exchange.
    Ops of the user's program keep their order.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly():
        yield
        return
    first = len(graph.get_operations())
    yield
    private_apis.run_out_of_program_order(graph, graph.get_operations()[first:])


class _Made(NamedTuple):
    """A collective op, by the exchange that it belongs to."""

    replica: int
    exchange: int  # counted for each replica, in program order
    op_name: str


# The collective ops that the replicas of this process have made in a graph.
_MADE: weakref.WeakKeyDictionary[tf.Graph, list[_Made]] = weakref.WeakKeyDictionary()


def _refuse_deadlock(inputs: list[tf.Tensor], replica: int, exchange: int) -> None:
    """Raises where program order would make this exchange wait for one that waits for it.

    That is so where op B, in program order, computes what this replica exchanges, and op A, before
    it in program order, depends on this or a later exchange of another replica: A waits for that
    exchange, which waits for this one, which waits for B, which waits for A.
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
    """The loss of the global batch, from every replica's share of it, as a layer adds it.

    Keras divides an added loss by the number of replicas and then adds up their gradients. What it
    shows is the mean over the replicas, weighted by their batches. So every replica must add the
    whole loss.
    """
    return share if variables.replicas() == 1 else sum_over_replicas(tf.reduce_sum(share))


def sum_over_replicas(numbers: tf.Tensor) -> tf.Tensor:
    """The sum of every replica's numbers, of any shape, where all of them go on to one loss.

    The numbers of a replica enter the losses of all R replicas, whose gradients are added up, so
    their gradient is R times the one of this replica's loss.
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
