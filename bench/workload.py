"""A case in TensorFlow's memory, shared by all implementations of this process.

The table and the batches exist once. Implementations outside TensorFlow work on NumPy views of the
same memory, so that none is faster because its pages are of another kind.
"""

import ctypes
import gc
import time

import numpy as np
import tensorflow as tf

from bench.cases import bytes_moved
from bench.check import Outcome


class Table:
    """Zeros [C, D] as a variable and as an array over the same memory."""

    def __init__(self, classes, dim):
        self.variable = tf.Variable(tf.zeros([classes, dim]), trainable=False)
        # Only the address is kept: an array that held a reference would make the first step copy.
        address = _view(self.variable.read_value()).ctypes.data
        numbers = (ctypes.c_float * (classes * dim)).from_address(address)
        self.array = np.ctypeslib.as_array(numbers).reshape(classes, dim)


class Tables:
    """The tables of centers, kept for as long as the cases that follow need them."""

    def __init__(self):
        self._tables = {}

    def of(self, cases):
        """{case: its table}; cases of the same sizes share one."""
        wanted = {(case.classes, case.dim) for case in cases}
        for sizes in self._tables.keys() - wanted:
            del self._tables[sizes]
        gc.collect()  # before the new ones: there may not be room for both
        for sizes in wanted - self._tables.keys():
            self._tables[sizes] = Table(*sizes)
        return {case: self._tables[case.classes, case.dim] for case in cases}


class Workload:
    """A case's batches, as TensorFlow and NumPy see them, and a table to work on."""

    def __init__(self, case, inputs, table):
        self.case, self.table = case, table
        self.batches = case.batches
        self.bytes = bytes_moved(inputs.labels, case.dim)
        self.rows, self._start = inputs.rows, inputs.start
        self.features, self.labels = tf.constant(inputs.features), tf.constant(inputs.labels)
        self.feature_arrays, self.label_arrays = (
            list(_view(self.features)),
            list(_view(self.labels)),
        )
        # A slice of whole batches is a view, too.
        self._slices = [(self.features[k], self.labels[k]) for k in range(self.batches)]

    def each_batch(self, step):
        """`step(features, labels)` of tensors as an implementation's `steps`."""
        return self.each_index(lambda k: step(*self._slices[k]))

    def each_index(self, step):
        """`step(k)` of the batch k as an implementation's `steps`."""

        def steps(first, count):
            for k in range(first, first + count):
                last = step(k % self.batches)
            return last

        return steps

    def reset(self):
        """The table as it is before the first step."""
        self.table.array[self.rows] = self._start

    def clear(self):
        """The table as the next workload wants to find it."""
        self.table.array[self.rows] = 0


class Runner:
    """An implementation on a workload. `steps(first, count)` runs `count` steps from batch `first`
    on and returns the last loss and gradient, each None where it is not computed."""

    def __init__(self, workload, steps):
        self._workload, self._steps = workload, steps
        self.reset()

    def reset(self):
        """Back to the first batch, the rows at the start, and no result."""
        self._workload.reset()
        self._next, self._last = 0, None

    def run(self, count):
        """Runs so many steps and returns the seconds they took."""
        start = time.perf_counter()
        self._last = self._steps(self._next, count)
        seconds = time.perf_counter() - start
        self._next = (self._next + count) % self._workload.batches
        return seconds

    def outcome(self):
        """What the last step gave and what the table became."""
        loss, gradient = (None if a is None else np.asarray(a) for a in self._last)
        return Outcome.of(loss, gradient, self._workload.table.array, self._workload.rows)


def _view(tensor):
    return np.asarray(memoryview(tensor))
