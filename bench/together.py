"""Sets implementations up on a case, validates them, and times them in turns."""

import gc

from bench import check, machine, measure
from bench.implementations import IMPLEMENTATIONS
from bench.workload import Runner, Table, Workload


class Tables:
    """The tables of centers, kept for as long as the cases that follow need them."""

    def __init__(self):
        self._tables = {}

    def of(self, cases):
        """{case: its table}; cases of the same sizes share one."""
        wanted = {(case.classes, case.dim) for case in cases}
        for sizes in self._tables.keys() - wanted:
            del self._tables[sizes]
        gc.collect()  # before the new ones: there may not be room for both
        for sizes in wanted - self._tables.keys():
            self._tables[sizes] = Table(*sizes)
        return {case: self._tables[case.classes, case.dim] for case in cases}


def prepare(case, table, keys, torch=None, status=lambda text: None):
    """The case's workload and {key: runner}, each held against the oracle on every batch."""
    status(f"{case.name}: inputs and oracle")
    inputs = case.make()
    truth = check.expected(inputs)
    workload = Workload(case, inputs, table)
    runners = {}
    for key in keys:
        status(f"{case.name}: validating {key}")
        runners[key] = Runner(workload, IMPLEMENTATIONS[key].build(workload))
        if IMPLEMENTATIONS[key].computes:
            check.validate(f"{case.name}, {key}", runners[key], case.batches, truth)
    if torch:
        status(f"{case.name}: validating PyTorch")
        torch.load(case)
        check.validate(f"{case.name}, PyTorch", torch, case.batches, truth)
        runners["torch"] = torch
    return workload, runners


def measurements(cases, keys, tables, rounds, torch=None, status=lambda text: None):
    """What `bench.report` takes, for cases whose implementations all take turns with each other."""
    workloads, runners = {}, {}
    for case, table in tables.of(cases).items():
        workloads[case], prepared = prepare(case, table, keys, torch, status)
        runners |= {(case, key): runner for key, runner in prepared.items()}
    extra_memory = {}
    for (case, key), runner in runners.items():
        status(f"{case.name}: memory of {key}")
        extra_memory[case, key] = runner.extra_memory()
    with machine.surroundings([torch.pid] if torch else []) as around:
        names = ", ".join(case.name for case in cases)
        seconds = measure.seconds_per_step(
            runners, rounds, lambda turn: status(f"{names}: round {turn + 1} of {rounds}")
        )
    for workload in workloads.values():
        workload.clear()

    def implementation(case, key):
        what, how = ("PyTorch by hand", "eager") if key == "torch" else IMPLEMENTATIONS[key][:2]
        return {
            "what": what,
            "how": how,
            "seconds": [float(f"{time:.4g}") for time in seconds[case, key]],
            "extra_memory": extra_memory[case, key],
        }

    return [
        {
            "name": case.name,
            "batch": case.batch,
            "dim": case.dim,
            "classes": case.classes,
            "labels": case.labels,
            "batches": case.batches,
            "bytes": workload.bytes,
            "surroundings": around,
            "implementations": {key: implementation(case, key) for c, key in runners if c == case},
        }
        for case, workload in workloads.items()
    ]
