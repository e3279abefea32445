"""Runs PyTorch in a separate process (torch_steps.py), as one more runner."""

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bench.check import Outcome


class TorchProcess:
    """A `bench.workload.Runner` whose steps run at the other end of a pipe."""

    def __init__(self, python, environment=None):
        self._process = subprocess.Popen(
            [python, "-m", "bench.torch_steps", "--serve"],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.version = self._ask("version")

    def load(self, case):
        """Creates the case's inputs in the PyTorch process."""
        self._ask("load", dataclasses.asdict(case))

    def reset(self):
        """See `bench.workload.Runner`."""
        self._ask("reset")

    def run(self, count):
        """See `bench.workload.Runner`; the other process times the steps, without the pipe."""
        return self._ask("run", count)

    def extra_memory(self, case):
        """Runs `bench.memory.extra_memory` in the PyTorch process."""
        return self._ask("extra_memory", dataclasses.asdict(case))

    def outcome(self):
        """See `bench.workload.Runner`."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/outcome.npz"
            self._ask("outcome", path)
            with np.load(path) as arrays:
                return Outcome(**arrays)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, *command):
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            raise RuntimeError(f"the PyTorch process ended with status {status}, see above")
        return json.loads(answer)
