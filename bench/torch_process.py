"""PyTorch in a process of its own (torch_steps.py), as one more runner."""

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bench.check import Outcome


class TorchProcess:
    """`bench.workload.Runner`, at the other end of a pipe."""

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
        """Makes the case's inputs there."""
        self._ask("load", dataclasses.asdict(case))

    def reset(self):
        """See `bench.workload.Runner`."""
        self._ask("reset")

    def run(self, count):
        """See `bench.workload.Runner`; the seconds are taken there, without the pipe."""
        return self._ask("run", count)

    def extra_memory(self, case):
        """`bench.memory.extra_memory` there."""
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
            raise RuntimeError(f"PyTorch ended with status {self._process.wait()}, see above")
        return json.loads(answer)
