"""A case on the GPU, and what runs steps over it.

A runner is a `bench.workload.Runner`: reset(), run(count) -> seconds, outcome().
"""

import math
import time

import numpy as np
import torch

from bench.check import Outcome, from_tests

gpu = from_tests("gpu/device")


class LeftOut(Exception):
    """Why an implementation is not timed here."""


class Workload:
    """A case's batches and the table that they move."""

    def __init__(self, case, inputs, table, device):
        self.case, self.table, self.device = case, table, device
        self.features = device.tensor(inputs.features).unbind()
        self.labels = device.tensor(inputs.labels).unbind()
        self.rows, self._start = device.tensor(inputs.rows), device.tensor(inputs.start)
        others = np.setdiff1d((inputs.rows + 1) % case.classes, inputs.rows)
        self._others = device.tensor(others)
        self.clear()

    def reset(self):
        """The table as it is before the first step."""
        self.table[self.rows] = self._start

    def clear(self):
        """The table as the next workload wants to find it."""
        self.table[self.rows] = 0

    def outcome(self, last):
        """What a runner is judged by, after `last`: a loss and a gradient."""
        loss, gradient = (None if a is None else gpu.to_host(_tensor(a)) for a in last)
        moved = bool(self.table[self._others].any())
        return Outcome(loss, gradient, gpu.to_host(self.table[self.rows]), moved)


def _tensor(array):
    if isinstance(array, torch.Tensor):
        return array
    return torch.as_tensor(array, device="cuda")


def event_seconds(work):
    """What the device needs for what `work` gives it; or the host, where that takes longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(work):
    """By the clock on the wall."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Calls:
    """`step(k)` of batch after batch, each called from Python."""

    def __init__(self, workload, step, seconds):
        self._workload, self._step, self._seconds = workload, step, seconds
        self.reset()

    def reset(self):
        self._workload.reset()
        self._next, self._last = 0, (None, None)

    def run(self, count):
        return self._seconds(lambda: self._steps(count))

    def outcome(self):
        return self._workload.outcome(self._last)

    def _steps(self, count):
        for k in range(self._next, self._next + count):
            self._last = self._step(k % self._workload.case.batches)
        self._next = (self._next + count) % self._workload.case.batches


class Graph(Calls):
    """The same captured: a CUDA graph of a step on each batch, replayed as a whole."""

    def __init__(self, workload, step, seconds):
        super().__init__(workload, step, seconds)
        self._steps(min(2, workload.case.batches))  # whatever is loaded at the first call is
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self.reset()
        with torch.cuda.graph(self._graph):
            self._steps(workload.case.batches)
        self._captured = self._last
        self.reset()

    def run(self, count):
        batches = self._workload.case.batches
        replays = math.ceil(count / batches)
        self._last = self._captured
        seconds = self._seconds(lambda: [self._graph.replay() for _ in range(replays)])
        return seconds * count / (replays * batches)


def copy_speed(device, seconds, size):
    """Bytes a second, read and written, of a large copy on the device; median of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device.place)
    target = torch.ones_like(source)

    def copies():
        for _ in range(10):
            target.copy_(source)

    copies()
    return 2 * size * 10 / float(np.median([seconds(copies) for _ in range(10)]))
