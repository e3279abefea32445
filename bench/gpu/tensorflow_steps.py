"""Steps in TensorFlow on the GPU: the op and the tutorial's ops, in a `tf.while_loop`."""

import importlib.util
import types

import numpy as np

from bench.check import Outcome
from bench.gpu.workload import LeftOut, wall_seconds

KEYS = ("fused loop", "tutorial loop", "tuned loop", "empty loop")


def build(case, inputs):
    """{key: implementation} and {key: runner}."""
    if importlib.util.find_spec("tensorflow") is None:
        raise LeftOut("no TensorFlow")
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise LeftOut("TensorFlow finds no GPU")
    if not tf.config.experimental.get_memory_growth(gpus[0]):
        tf.config.experimental.set_memory_growth(gpus[0], True)
    from bench.implementations import IMPLEMENTATIONS

    implementations = {key: IMPLEMENTATIONS[key] for key in KEYS}
    with tf.device("/GPU:0"):
        workload = types.SimpleNamespace(
            features=tf.constant(inputs.features),
            labels=tf.constant(inputs.labels),
            table=types.SimpleNamespace(variable=tf.Variable(tf.zeros([case.classes, case.dim]))),
            batches=case.batches,
        )
        return implementations, {
            key: Runner(workload, inputs, one.build(workload))
            for key, one in implementations.items()
        }


class Runner:
    """See `bench.workload.Runner`; by the clock on the wall, to the end of the device's work."""

    def __init__(self, workload, inputs, steps):
        self._workload, self._inputs, self._steps = workload, inputs, steps
        self.reset()

    def reset(self):
        import tensorflow as tf

        rows = tf.IndexedSlices(self._inputs.start, self._inputs.rows)
        self._workload.table.variable.scatter_update(rows)
        self._next, self._last = 0, None

    def run(self, count):
        return wall_seconds(lambda: self._run(count))

    def outcome(self):
        import tensorflow as tf

        table, rows = self._workload.table.variable, self._inputs.rows
        others = np.setdiff1d((rows + 1) % table.shape[0], rows)
        return Outcome(
            *(a.numpy() for a in self._last),
            tf.gather(table, rows).numpy(),
            bool(tf.reduce_any(tf.gather(table, others) != 0)),
        )

    def _run(self, count):
        self._last = self._steps(self._next, count)
        self._last[0].numpy()
        self._next = (self._next + count) % self._workload.batches
