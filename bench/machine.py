"""What the numbers were measured on, and what else went on meanwhile."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import psutil

from bench import compiled

THREADS = len(os.sched_getaffinity(0))


def describe():
    """The machine and the versions."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    versions = ("tf_center_loss_op", "tensorflow", "numpy")
    return {
        "cpu": _cpu(),
        "cores": THREADS,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "compiler": _first_line([compiled.COMPILER, "--version"]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in versions},
    }


@contextlib.contextmanager
def surroundings(pids=()):
    """Gives a dict; at the end it holds the load average, and how many cores were busy with
    processes other than this one and `pids`."""
    around = {}
    processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
    start, busy, own = time.monotonic(), _busy_seconds(), _own_seconds(processes)
    yield around
    others = (_busy_seconds() - busy) - (_own_seconds(processes) - own)
    around["load"] = round(os.getloadavg()[0], 2)
    around["cores_of_others"] = round(max(0.0, others / (time.monotonic() - start)), 2)


def _busy_seconds():
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq + times.steal


def _own_seconds(processes):
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def _cpu():
    with open("/proc/cpuinfo") as file:
        names = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def _first_line(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
        0
    ]
