"""The arrays of a case in TensorFlow's memory, shared by all implementations of this process.

The table and the batches exist once. Implementations outside TensorFlow work on NumPy views of the
same memory, so that all implementations use pages of the same kind.
"""

import ctypes
import gc
import time

import numpy as np
import tensorflow as tf

from bench.cases import bytes_moved
from bench.check import Outcome


class Table:
    """Zeros [C, D] as a variable, and as an array over the same memory."""

    def __init__(self, classes, dim):
        self.variable = tf.Variable(tf.zeros([classes, dim]), trainable=False)
        # Only the address is kept. An array that held a reference to the tensor would make the
        # first step copy it.
        address = _view(self.variable.read_value()).ctypes.data
        numbers = (ctypes.c_float * (classes * dim)).from_address(address)
        self.array = np.ctypeslib.as_array(numbers).reshape(classes, dim)


class Tables:
    """The tables of centers; a table is kept while the next cases need it."""

    def __init__(self):
        self._tables = {}

    def of(self, cases):
        """Returns {case: its table}; cases of the same sizes share a table."""
        wanted = {(case.classes, case.dim) for case in cases}
        for sizes in self._tables.keys() - wanted:
            del self._tables[sizes]
        gc.collect()  # releases the old tables: there may not be room for both
        for sizes in wanted - self._tables.keys():
            self._tables[sizes] = Table(*sizes)
        return {case: self._tables[case.classes, case.dim] for case in cases}


class Workload:
    """A case's batches as TensorFlow tensors and NumPy arrays, and a table."""

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
        # A slice along the first dimension is a view, not a copy.
        self._slices = [(self.features[k], self.labels[k]) for k in range(self.batches)]

    def each_batch(self, step):
        """Makes `step(features, labels)` of tensors the `steps` of an implementation."""
        return self.each_index(lambda k: step(*self._slices[k]))

    def each_index(self, step):
        """Makes `step(k)` of batch k the `steps` of an implementation."""

        def steps(first, count):
            for k in range(first, first + count):
                last = step(k % self.batches)
            return last

        return steps

    def reset(self):
        """Sets the table to its values before the first step."""
        self.table.array[self.rows] = self._start

    def clear(self):
        """Sets the used rows to zero, as the next workload expects them."""
        self.table.array[self.rows] = 0


class Runner:
    """An implementation on a workload.

    `steps(first, count)` runs `count` steps from batch `first` on. It returns the last loss and
    gradient, each None if it is not computed.
    """

    def __init__(self, workload, steps):
        self._workload, self._steps = workload, steps
        self.reset()

    def reset(self):
        """Returns to the first batch and the initial rows, and discards the last result."""
        self._workload.reset()
        self._next, self._last = 0, None

    def run(self, count):
        """Runs `count` steps and returns the seconds that they took."""
        start = time.perf_counter()
        self._last = self._steps(self._next, count)
        seconds = time.perf_counter() - start
        self._next = (self._next + count) % self._workload.batches
        return seconds

    def outcome(self):
        """Returns the results of the last step and the rows of the table."""
        loss, gradient = (None if a is None else np.asarray(a) for a in self._last)
        return Outcome.of(loss, gradient, self._workload.table.array, self._workload.rows)


def _view(tensor):
    return np.asarray(memoryview(tensor))
