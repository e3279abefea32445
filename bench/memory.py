"""How much more memory a step takes while it runs, its results included.

Measured in a process of its own, by the kernel's high-water mark of resident memory (Linux; good to
about 0.3 MB). Its allocator takes every block of a page or more from the system and gives it back
at once: otherwise memory left over from earlier steps would hide what a step needs.
"""

import dataclasses
import json
import os
import subprocess
import sys

from bench.cases import Case
from bench.torch_process import TorchProcess

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}


def extra_memory(runner, steps=3):
    """Bytes by which these steps raise the process's resident memory at their peak."""
    runner.run(1)
    runner.reset()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark is what is resident now
    before = _status("VmRSS")
    runner.run(steps)
    return max(0, _status("VmHWM") - before)


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
                torch.load(smaller)
                found[case]["torch"] = torch.extra_memory()
    return found


def main():
    """The child: answers the request on its command line."""
    from bench.implementations import IMPLEMENTATIONS
    from bench.workload import Runner, Tables, Workload

    request = json.loads(sys.argv[1])
    tables, answer = Tables(), []
    for fields in request["cases"]:
        case = Case(**fields)
        workload = Workload(case, case.make(), tables.of([case])[case])
        runners = {k: Runner(workload, IMPLEMENTATIONS[k].build(workload)) for k in request["keys"]}
        answer.append({key: extra_memory(runner) for key, runner in runners.items()})
        workload.clear()
    print(json.dumps(answer))


def _status(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
