"""The arrays of a case on the GPU, and the runners that execute steps on them.

A runner has the methods of `bench.workload.Runner`: reset(), run(count) -> seconds, outcome().
"""

import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.check import Outcome, from_tests
from bench.gpu.report import covered

gpu = from_tests("gpu/device")


class LeftOut(Exception):
    """The reason why an implementation is not timed here."""


class Workload:
    """A case's batches and the table that they move; `table` is zeros [C, D] on the device."""

    def __init__(self, case, table, device):
        self.case, self.table, self.device = case, table, device
        labels = case.draw()
        rows, index = np.unique(labels, return_inverse=True)
        others = np.setdiff1d((rows + 1) % case.classes, rows)
        self.bytes = case.bytes(labels)
        self.rows, self._others = (self.put(numbers) for numbers in (rows, others))
        self.labels = self.put(labels).unbind()
        self.index = self.put(index.reshape(labels.shape)).unbind()  # the index into `rows`
        # Random numbers are drawn on the device: drawing on the host and copying takes seconds.
        generator = torch.Generator(device.place).manual_seed(case.batch)
        random = {"generator": generator, "device": device.place}
        features = torch.randn([*labels.shape, case.dim], **random)
        self.features = features.to(getattr(torch, case.dtype)).unbind()
        self.start = torch.randn([len(rows), case.dim], **random)
        self.compiled = {}  # programs of torch.compile, shared by implementations
        self._outputs = None
        self.clear()

    def outputs(self):
        """Returns the losses and gradients of all batches, to which all kernels write.

        Each batch has its own, so that they are no more in the cache than the features.
        """
        if self._outputs is None:
            shape = [self.case.batches, self.case.batch, self.case.dim]
            zeros = (torch.zeros(sizes, device=self.device.place) for sizes in (shape[:1], shape))
            self._outputs = [numbers.unbind() for numbers in zeros]
        return self._outputs

    def unwrite(self):
        """Fills the outputs with a number that no step computes."""
        for tensors in self.outputs():
            for tensor in tensors:
                tensor.fill_(-77)

    def reset(self):
        """Sets the table to its values before the first step."""
        self.table[self.rows] = self.start

    def clear(self):
        """Sets the used rows to zero, as the next workload expects them."""
        self.table[self.rows] = 0

    def outcome(self, last):
        """Returns the outcome of a runner; `last` is the last loss and gradient."""
        loss, gradient = (None if a is None else _tensor(a).clone() for a in last)
        moved = bool(self.table[self._others].any())
        return Outcome(loss, gradient, self.table[self.rows], moved)

    def put(self, numbers):
        """Copies a NumPy array to the device."""
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device.place)


def _tensor(array):
    if isinstance(array, torch.Tensor):
        return array
    return torch.as_tensor(array, device="cuda")


def event_seconds(work):
    """Returns the seconds of `work()` by CUDA events: the longer of the device's and the host's."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def busy_seconds(work):
    """Returns the seconds for which `work()` keeps the device busy, without waits for the host.

    They come from the profiler, which records the work of every library in this process.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    if not spans:
        raise LeftOut("the profiler sees no work on the device")
    return covered(spans) / 1e6


def wall_seconds(work):
    """Returns the wall time of `work()`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Calls:
    """A runner that calls `step(k)` from Python for one batch after the other."""

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
    """A runner that captures a step on each batch in one CUDA graph and replays it as a whole."""

    def __init__(self, workload, step, seconds):
        super().__init__(workload, step, seconds)
        self._steps(min(2, workload.case.batches))  # loads modules before the capture
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
    """Returns the bytes per second that a large copy reads and writes; the median of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device.place)
    target = torch.ones_like(source)

    def copies():
        for _ in range(10):
            target.copy_(source)

    copies()
    return 2 * size * 10 / float(np.median([seconds(copies) for _ in range(10)]))
