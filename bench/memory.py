"""How much more memory a step takes: its results, its temporaries, what it keeps for the next one.

Measured in a process of its own, by the kernel's high-water mark of resident memory (Linux; good to
about 0.3 MB). Its allocator takes every block of a page or more from the system and gives it back
at once: otherwise memory left over from earlier steps would hide what a step needs.
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
    """Bytes: the peak while the runner that `build()` makes runs some steps, beyond what is left
    when it is gone and `forget()` has been called."""
    runner = build()
    runner.run(1)  # tracing takes memory, too
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark is what is resident now
    runner.run(steps)
    peak = status("VmHWM")
    del runner
    gc.collect()
    forget()
    return max(0, peak - status("VmRSS"))


def of_cases(cases, keys, torch_python=None):
    """{case: {key: bytes}}, from child processes."""
    # Few batches: they take part in no step's memory.
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
    """The child: answers the request on its command line."""
    from tensorflow.python.eager import context

    from bench.together import runner
    from bench.workload import Tables, Workload

    request = json.loads(sys.argv[1])
    tables, answer = Tables(), []
    for fields in request["cases"]:
        case = Case(**fields)
        workload = Workload(case, case.make(), tables.of([case])[case])
        builds = {key: functools.partial(runner, workload, key) for key in request["keys"]}
        # The kernel cache keeps the kernels of eager ops, and with them what they keep.
        forget = context.context().clear_kernel_cache
        answer.append({key: extra_memory(build, forget) for key, build in builds.items()})
    print(json.dumps(answer))


def status(field):
    """A size of this process by its name in /proc, such as VmHWM (the peak), in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
