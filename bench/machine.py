"""Describes the machine, and measures how busy other processes keep it."""

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
    """Returns the machine and the versions."""
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
        **{name: _version(name) for name in versions},
    }


class Others:
    """Returns, when called, how many cores other processes kept busy since the last call."""

    def __init__(self, *pids):
        """`pids`: further processes whose time does not count as that of others."""
        self._processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self._last = self._now()

    def __call__(self):
        (time_before, before), (time_now, now) = self._last, self._now()
        self._last = time_now, now
        return (now - before) / (time_now - time_before)

    def _now(self):
        own = [process.cpu_times() for process in self._processes]
        every = psutil.cpu_times()
        busy = every.user + every.system + every.nice + every.irq + every.softirq + every.steal
        return time.monotonic(), busy - sum(times.user + times.system for times in own)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu():
    with open("/proc/cpuinfo") as file:
        names = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def _first_line(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
        0
    ]
