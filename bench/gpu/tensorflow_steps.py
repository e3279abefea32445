"""Steps in TensorFlow on the GPU: the op and plain ops, called as a `tf.function` for each batch.

The device's time comes from the profiler, because a clock around a loop cannot measure it: on a GPU
an empty `tf.while_loop` takes the host 150 µs per step, which hides a step of 20 µs. The time of
the empty loop cannot be subtracted either, because the loop runs in parallel with the device.
"""

import importlib
import importlib.util
import os
import types
from typing import NamedTuple

import numpy as np

from bench.check import Outcome
from bench.gpu import reference
from bench.gpu.workload import LeftOut, busy_seconds, wall_seconds

BATCHES = (4096, 65536, 256)  # few batches, because each compiles five programs
STEPS = 16  # the most steps in a block
ROUNDS = 3


class Row(NamedTuple):
    """See `bench.gpu.implementations.Implementation`."""

    what: str
    how: str


def load(place):
    """Imports TensorFlow for steps on this device; raises LeftOut or ImportError."""
    if importlib.util.find_spec("tensorflow") is None:
        raise LeftOut("no TensorFlow")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leaves memory for PyTorch
    import tensorflow as tf

    if "GPU" in place and not tf.config.list_physical_devices("GPU"):
        raise LeftOut("TensorFlow finds no GPU")
    importlib.import_module("bench.implementations")  # raises ImportError without native library
    return tf


def measured(tf, workload, truth, place, clocks=None):
    """Returns {key: (row, times)}, and {key: reason} of what is left out.

    `clocks` maps the end of a key to the function that times a block of steps.
    """
    clocks = clocks or {"busy": busy_seconds, "wall": wall_seconds}
    hows = {"busy": "device busy", "wall": "call"}
    found, left_out = {}, {}
    with tf.device(place):
        shared = _shared(tf, workload)
        for name, what, jit, step in _steps():
            try:
                runner = Runner(tf, shared, workload, step, jit)
                reference.validate(f"{workload.case.name}, {name}", runner, workload, truth)
            except Exception as reason:  # a step that cannot run here is not timed
                left_out[name] = reason
                continue
            for end, clock in clocks.items():
                how = f"{'XLA' if jit else 'tf.function'}, {hows[end]}"
                try:
                    seconds = [runner.seconds(clock) for _ in range(ROUNDS)]
                except Exception as reason:
                    left_out[f"{name} {end}"] = reason
                    continue
                found[f"{name} {end}"] = Row(what, how), seconds
    return found, left_out


def _steps():
    from bench.implementations import fused, graph, tuned, tutorial

    return (
        ("fused", "fused op", None, fused),
        ("fused xla", "fused op", True, fused),
        ("tutorial", "tutorial's ops", None, tutorial),
        ("tuned", "tuned TensorFlow ops", None, tuned),
        ("graph xla", 'impl="graph"', True, graph),
    )


def _shared(tf, workload):
    """Copies the batches and the table into TensorFlow's memory."""
    batches = zip(workload.features, workload.labels, strict=True)
    return types.SimpleNamespace(
        batches=[tuple(tf.constant(tensor.cpu().numpy()) for tensor in b) for b in batches],
        table=tf.Variable(tf.zeros([workload.case.classes, workload.case.dim])),
        rows=workload.rows.cpu().numpy(),
        start=workload.start.cpu().numpy(),
    )


class Runner:
    """See `bench.workload.Runner`."""

    def __init__(self, tf, shared, workload, step, jit):
        self._tf, self._shared, self._workload = tf, shared, workload
        self._step = tf.function(
            lambda features, labels: step(features, labels, shared.table),
            autograph=False,
            jit_compile=jit,
        )

    def reset(self):
        start = self._tf.IndexedSlices(self._shared.start, self._shared.rows)
        self._shared.table.scatter_update(start)
        self._last = None

    def run(self, count):
        for k in range(count):
            self._last = self._step(*self._shared.batches[k % len(self._shared.batches)])
        self._last[0].numpy()  # waits for the device

    def seconds(self, clock):
        """Returns the seconds per step by this clock."""
        count = min(STEPS, len(self._shared.batches))
        return clock(lambda: self.run(count)) / count

    def outcome(self):
        tf, table, rows = self._tf, self._shared.table, self._shared.rows
        others = np.setdiff1d((rows + 1) % table.shape[0], rows)
        arrays = [*self._last, tf.gather(table, rows)]
        return Outcome(
            *(self._workload.put(tensor.numpy()) for tensor in arrays),
            bool(tf.reduce_any(tf.gather(table, others) != 0)),
        )
