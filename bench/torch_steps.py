"""The same step in hand-written PyTorch: index_select, unique, index_add_.

    python -m bench --torch PYTHON    times it with the others, in a process of that PYTHON
    PYTHON -m bench.torch_steps       times it alone

It needs torch and NumPy, but not TensorFlow. With the others, it reads commands from its standard
input, one JSON array per line, and answers each command with one line. Between commands it sleeps.
"""

import json
import sys
import time

import numpy as np
import torch

from bench import measure, memory
from bench.cases import ALPHA, CASES, Case
from bench.check import Outcome


@torch.inference_mode()
def step(features, labels, centers):
    """Returns the loss and the hand-written gradient, and updates the centers in place."""
    residual = features - centers.index_select(0, labels)
    loss = torch.dot(residual.view(-1), residual.view(-1)) / 2
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    scale = ALPHA / (1 + counts.index_select(0, index))
    centers.index_add_(0, labels, residual * scale.unsqueeze(1))
    return loss, residual


class Runner:
    """A `bench.workload.Runner` for PyTorch. Its own table is kept from case to case."""

    def __init__(self):
        self._table = torch.empty(0)

    def load(self, case):
        """Creates the case's inputs; rows of the table that no label names are zero."""
        inputs = case.make()
        if self._table.shape != (case.classes, case.dim):
            self._table = torch.empty(0)  # releases the old table: there may be room for one only
            self._table = torch.empty(case.classes, case.dim)
        self._table.zero_()
        self._rows, self._start = inputs.rows, torch.tensor(inputs.start)
        features, labels = torch.tensor(inputs.features), torch.tensor(inputs.labels)
        self._batches = list(zip(features, labels, strict=True))
        self.reset()
        return self

    def reset(self):
        """See `bench.workload.Runner`."""
        self._table[torch.tensor(self._rows)] = self._start
        self._next, self._last = 0, None

    def run(self, count):
        """See `bench.workload.Runner`."""
        start = time.perf_counter()
        for k in range(self._next, self._next + count):
            self._last = step(*self._batches[k % len(self._batches)], self._table)
        seconds = time.perf_counter() - start
        self._next = (self._next + count) % len(self._batches)
        return seconds

    def outcome(self):
        """See `bench.workload.Runner`."""
        loss, gradient = (tensor.numpy() for tensor in self._last)
        return Outcome.of(loss, gradient, self._table.numpy(), self._rows)


def serve():
    """Answers commands until the standard input ends."""
    runner = Runner()
    commands = {
        "version": lambda: torch.__version__,
        "load": lambda fields: runner.load(Case(**fields)) and None,
        "reset": runner.reset,
        "run": runner.run,
        "extra_memory": lambda fields: memory.extra_memory(
            lambda: runner.load(Case(**fields)), runner.reset
        ),
        "outcome": lambda path: np.savez(path, **runner.outcome()._asdict()),
    }
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), flush=True)


def main():
    """Times each case alone."""
    runner = Runner()
    for case in CASES:
        times, _ = measure.seconds_per_step({"torch": runner.load(case)}, rounds=20)
        low, median, high = 1e6 * np.quantile(times["torch"], [0.1, 0.5, 0.9])
        print(f"{case.name:24} {median:8.1f} µs ({low:.1f} to {high:.1f})", flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
