"""Every implementation on a case: validated, then timed in turns."""

import os

import torch

from bench import machine, measure
from bench.gpu import implementations, reference, tensorflow_steps
from bench.gpu.workload import Calls, LeftOut, Workload

# Device time is steady, and blocks are short: a case takes a second and a half for ten rounds.
BLOCK_SECONDS = 0.01


def measurement(case, table, device, seconds, rounds):
    """What `bench.report` takes, and {key: why it is left out}."""
    workload = Workload(case, table, device)
    truth = reference.expected(workload)
    shown, runners, left_out = {}, {}, {}
    for key, one in implementations.IMPLEMENTATIONS.items():
        if not (usual(case) or one.always):
            continue
        runner = one.runner if device.place == "cuda" else Calls
        try:
            made = runner(workload, one.build(workload), seconds)
            if one.computes:
                reference.validate(f"{case.name}, {key}", made, workload, truth)
        except Exception as reason:  # what others get wrong, or cannot do here, is not timed
            left_out[key] = words(reason)
            continue
        shown[key], runners[key] = one, made
    others = machine.Others()
    # Rounds that others disturbed are not run again: what the device does, they do not disturb.
    times, _ = measure.seconds_per_step(runners, rounds, rest=0, block=BLOCK_SECONDS)
    around = {
        "load": round(os.getloadavg()[0], 2),
        "cores_of_others": round(max(0.0, float(others())), 2),
    }
    workload.clear()
    return {
        "name": case.name,
        "batch": case.batch,
        "dim": case.dim,
        "classes": case.classes,
        "labels": case.labels,
        "dtype": case.dtype,
        "batches": case.batches,
        "bytes": workload.bytes,
        "surroundings": around,
        "implementations": {key: _row(one, times[key]) for key, one in shown.items()},
    }, left_out


def in_tensorflow(case, table, device, place="/GPU:0"):
    """The rows of steps in TensorFlow for a case's measurement, and {key: why one is left out}."""
    try:
        tf = tensorflow_steps.load(place)
    except (LeftOut, ImportError) as reason:
        return {}, {"TensorFlow": words(reason)}
    if device.place == "cuda":
        torch.cuda.empty_cache()  # PyTorch's memory that is free is none for TensorFlow
    workload = Workload(case, table, device)
    found, left_out = tensorflow_steps.measured(tf, workload, reference.expected(workload), place)
    workload.clear()
    rows = {key: _row(one, seconds) for key, (one, seconds) in found.items()}
    return rows, {key: words(reason) for key, reason in left_out.items()}


def usual(case):
    """Whether all implementations run; others are for the kernel, a copy, and one to compare."""
    return case.labels == "uniform" and case.dtype == "float32"


def words(error):
    """The first line of what went wrong."""
    what = "" if isinstance(error, LeftOut) else f"{type(error).__name__}: "
    return what + (str(error).strip().splitlines() or [""])[0]


def _row(one, seconds):
    return {
        "what": one.what,
        "how": one.how,
        "seconds": [float(f"{time:.4g}") for time in seconds],
        "extra_memory": None,
    }
