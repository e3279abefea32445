"""Builds the implementations for a case, validates them, and times them in turns."""

import os

from bench import check, measure
from bench.implementations import IMPLEMENTATIONS
from bench.machine import Others
from bench.workload import Runner, Workload


def runner(workload, key):
    """Returns a runner of the implementation with this key on the workload."""
    return Runner(workload, IMPLEMENTATIONS[key].build(workload))


def prepare(case, table, keys, torch=None, status=lambda text: None):
    """Returns the workload of a case and {key: runner}, validated by the oracle on every batch."""
    status(f"{case.name}: inputs and oracle")
    inputs = case.make()
    truth = check.expected(inputs)
    workload = Workload(case, inputs, table)
    runners = {}
    for key in keys:
        status(f"{case.name}: validating {key}")
        runners[key] = runner(workload, key)
        if IMPLEMENTATIONS[key].computes:
            check.validate(f"{case.name}, {key}", runners[key], case.batches, truth)
    if torch:
        status(f"{case.name}: validating PyTorch")
        torch.load(case)
        check.validate(f"{case.name}, PyTorch", torch, case.batches, truth)
        runners["torch"] = torch
    workload.clear()  # the next case may use the same table
    return workload, runners


def measurements(cases, keys, extra_memory, tables, rounds, torch=None, status=lambda text: None):
    """Returns the measurements for `bench.report`; all implementations of all cases take turns."""
    workloads, runners = {}, {}
    for case, table in tables.of(cases).items():
        workloads[case], prepared = prepare(case, table, keys, torch, status)
        runners |= {(case, key): one for key, one in prepared.items()}
    names = ", ".join(case.name for case in cases)
    seconds, cores_of_others = measure.seconds_per_step(
        runners,
        rounds,
        Others(torch.pid) if torch else Others(),
        lambda text: status(f"{names}: {text}"),
    )
    surroundings = {
        "load": round(os.getloadavg()[0], 2),
        "cores_of_others": round(float(cores_of_others.mean()), 2),
    }
    for workload in workloads.values():
        workload.clear()

    def implementation(case, key):
        what, how = (
            ("hand-written PyTorch", "eager") if key == "torch" else IMPLEMENTATIONS[key][:2]
        )
        return {
            "what": what,
            "how": how,
            "seconds": [float(f"{time:.4g}") for time in seconds[case, key]],
            "extra_memory": extra_memory[case][key],
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
            "surroundings": surroundings,
            "implementations": {key: implementation(case, key) for c, key in runners if c == case},
        }
        for case, workload in workloads.items()
    ]
