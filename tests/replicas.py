"""For programs that run on several replicas: each in a process, or several, of its own.

A program imports this before anything else of TensorFlow. It holds what the replicas give against
one replica on the concatenated batch.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np

from child import TESTS

# Nothing may hang; a process takes 10 to 40 seconds.
BOUND = 150


def mirrored(replicas, **options):
    """A MirroredStrategy over so many logical CPU devices."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(replicas)], **options)


def spread(strategy, parts):
    """What strategy.run takes for one part a replica."""
    import tensorflow as tf

    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def gather(strategy, value):
    """The parts of this process's replicas, one after another."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def copies(strategy, variable):
    """The table of each of this process's replicas; they must have the same bits."""
    tables = [copy.numpy() for copy in strategy.experimental_local_results(variable)]
    assert all(np.array_equal(tables[0], table) for table in tables)
    return tables[0]


def ports(count):
    """So many free ports of this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Processes of one program, with a TF_CONFIG each; none of them outlives the `with` block."""

    def __init__(self, source, folder, **tasks):
        program = folder / "program.py"
        program.write_text(textwrap.dedent(source))
        free = iter(ports(sum(tasks.values())))
        cluster = {kind: [f"127.0.0.1:{next(free)}" for _ in range(n)] for kind, n in tasks.items()}
        environment = dict(os.environ, PYTHONPATH=str(TESTS), TF_CPP_MIN_LOG_LEVEL="2")
        environment.pop("TF_CENTER_LOSS_IMPL", None)
        self.processes, self._logs = {}, {}
        for kind, n in tasks.items():
            for index in range(n):
                task = {"cluster": cluster, "task": {"type": kind, "index": index}}
                log = self._logs[kind, index] = folder / f"{kind}-{index}.log"
                self.processes[kind, index] = subprocess.Popen(
                    [sys.executable, program],
                    cwd=folder,
                    env=environment | {"TF_CONFIG": json.dumps(task)},
                    stdout=open(log, "w"),
                    stderr=subprocess.STDOUT,
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self, kind, index):
        """What the process has printed so far."""
        return self._logs[kind, index].read_text()

    def wait(self, kind, index, seconds=BOUND):
        """Its exit status, at most so many seconds from now."""
        return self.processes[kind, index].wait(seconds)

    def finish(self, kind="worker"):
        """Waits for all processes of the kind; each must have ended well."""
        for k, index in self.processes:
            if k == kind:
                status = self.wait(k, index)
                assert status == 0, f"{k} {index}: exit status {status}\n{self.log(k, index)}"

    def kill(self, kind, index, after, seconds=BOUND):
        """Kills the process once it has printed a line with these words."""
        end = time.monotonic() + seconds
        while after not in self.log(kind, index):
            assert time.monotonic() < end, self.log(kind, index)
            assert self.processes[kind, index].poll() is None, self.log(kind, index)
            time.sleep(0.05)
        self.processes[kind, index].send_signal(signal.SIGKILL)
