"""Measures the extra memory of a step: results, temporaries, and buffers kept for the next step.

A separate process measures it by the kernel's high-water mark of resident memory (Linux; accurate
to about 0.3 MB). In this process the allocator takes every block of a page or more from the system
and returns it at once. Otherwise memory left over from earlier steps would hide the need of a step.
"""

import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys

from bench.cases import Case
from bench.torch_process import TorchProcess

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}


def extra_memory(build, forget, steps=3):
    """Returns the extra memory of a runner's steps in bytes.

    It is the peak while the runner that `build()` returns runs `steps` steps, minus the memory that
    remains after the runner is deleted and `forget()` has been called.
    """
    runner = build()
    runner.run(1)  # the first step traces, which also takes memory
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the high-water mark to the current resident memory
    runner.run(steps)
    peak = status("VmHWM")
    del runner
    gc.collect()
    forget()
    return max(0, peak - status("VmRSS"))


def of_cases(cases, keys, torch_python=None):
    """Returns {case: {key: bytes}}, measured in child processes."""
    # Few batches suffice, because their number does not affect the memory of a step.
    small = [dataclasses.replace(case, rotation=0) for case in cases]
    request = {"cases": [dataclasses.asdict(case) for case in small], "keys": list(keys)}
    environment = os.environ | ALLOCATOR
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(request)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    found = dict(zip(cases, json.loads(child.stdout), strict=True))
    if torch_python:
        with TorchProcess(torch_python, environment) as torch:
            for case, smaller in zip(cases, small, strict=True):
                found[case]["torch"] = torch.extra_memory(smaller)
    return found


def main():
    """Runs the child process: answers the request on its command line."""
    from tensorflow.python.eager import context

    from bench.together import runner
    from bench.workload import Tables, Workload

    request = json.loads(sys.argv[1])
    tables, answer = Tables(), []
    for fields in request["cases"]:
        case = Case(**fields)
        workload = Workload(case, case.make(), tables.of([case])[case])
        builds = {key: functools.partial(runner, workload, key) for key in request["keys"]}
        # The kernel cache keeps the kernels of eager ops, and these keep their buffers.
        forget = context.context().clear_kernel_cache
        answer.append({key: extra_memory(build, forget) for key, build in builds.items()})
    print(json.dumps(answer))


def status(field):
    """Returns a field of /proc/self/status in bytes, such as VmHWM (the peak)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
