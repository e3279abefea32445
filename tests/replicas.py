"""Replicas of programs in tests/programs, and clusters of processes that run one."""

import contextlib
import json
import signal
import socket
import subprocess
import time

import numpy as np

from child import command, environment

# Time limit in seconds; a process takes 10 to 40.
BOUND = 150


def cpu_devices(count):
    """Splits the CPU into logical devices; TensorFlow must not have run an op before."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(cpu, devices)


def mirrored(replicas, **options):
    """A MirroredStrategy over `replicas` logical CPU devices."""
    import tensorflow as tf

    cpu_devices(replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(replicas)], **options)


def spread(strategy, parts):
    """One part for each replica, as an argument of strategy.run."""
    import tensorflow as tf

    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def gather(strategy, value):
    """The values of this process's replicas, concatenated."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def copies(strategy, variable):
    """The table, which must have the same bits on each of this process's replicas."""
    tables = [copy.numpy() for copy in strategy.experimental_local_results(variable)]
    assert all(np.array_equal(tables[0], table) for table in tables)
    return tables[0]


def ports(count):
    """`count` free ports of this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Processes of one program, with a TF_CONFIG each; all end with the `with` block at the latest.

    Cluster("serve_one_table", folder, ps=1, worker=2) has one process of kind ps and two workers.
    """

    def __init__(self, program, folder, **tasks):
        free = iter(ports(sum(tasks.values())))
        cluster = {kind: [f"127.0.0.1:{next(free)}" for _ in range(n)] for kind, n in tasks.items()}
        self.processes, self._logs = {}, {}
        for kind, n in tasks.items():
            for index in range(n):
                task = {"cluster": cluster, "task": {"type": kind, "index": index}}
                log = self._logs[kind, index] = folder / f"{kind}-{index}.log"
                self.processes[kind, index] = subprocess.Popen(
                    command(program),
                    cwd=folder,
                    env=environment(TF_CONFIG=json.dumps(task)),
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
        """The output of the process so far."""
        return self._logs[kind, index].read_text()

    def wait(self, kind, index, seconds=BOUND):
        """Its exit status; raises TimeoutExpired after `seconds`."""
        return self.processes[kind, index].wait(seconds)

    def finish(self, kind="worker"):
        """Waits for all processes of the kind; each must end with status 0."""
        for k, index in self.processes:
            if k == kind:
                status = self.wait(k, index)
                assert status == 0, f"{k} {index}: exit status {status}\n{self.log(k, index)}"

    def kill(self, kind, index, after, seconds=BOUND):
        """Kills the process as soon as its output contains `after`."""
        end = time.monotonic() + seconds
        while after not in self.log(kind, index):
            assert time.monotonic() < end, self.log(kind, index)
            assert self.processes[kind, index].poll() is None, self.log(kind, index)
            time.sleep(0.05)
        self.processes[kind, index].send_signal(signal.SIGKILL)
