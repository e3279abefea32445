"""Validates every implementation on a case, then times them in turns."""

import os

import torch

from bench import machine, measure
from bench.gpu import implementations, reference, tensorflow_steps
from bench.gpu.workload import Calls, LeftOut, Workload

# Device time varies little, so blocks can be short: ten rounds of a case take a second and a half.
BLOCK_SECONDS = 0.01


def measurement(case, table, device, seconds, rounds):
    """Returns the measurement for `bench.report`, and {key: reason} of what is left out."""
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
        except Exception as reason:  # a wrong or unsupported implementation is not timed
            left_out[key] = words(reason)
            continue
        shown[key], runners[key] = one, made
    others = machine.Others()
    # Disturbed rounds are not repeated, because other processes do not disturb the device.
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
    """Returns the rows of steps in TensorFlow, and {key: reason} of what is left out."""
    try:
        tf = tensorflow_steps.load(place)
    except (LeftOut, ImportError) as reason:
        return {}, {"TensorFlow": words(reason)}
    if device.place == "cuda":
        torch.cuda.empty_cache()  # releases PyTorch's free memory to TensorFlow
    workload = Workload(case, table, device)
    found, left_out = tensorflow_steps.measured(tf, workload, reference.expected(workload), place)
    workload.clear()
    rows = {key: _row(one, seconds) for key, (one, seconds) in found.items()}
    return rows, {key: words(reason) for key, reason in left_out.items()}


def usual(case):
    """Returns whether all implementations run on the case, and not only those marked `always`."""
    return case.labels == "uniform" and case.dtype == "float32"


def words(error):
    """Returns the first line of an error."""
    what = "" if isinstance(error, LeftOut) else f"{type(error).__name__}: "
    return what + (str(error).strip().splitlines() or [""])[0]


def _row(one, seconds):
    return {
        "what": one.what,
        "how": one.how,
        "seconds": [float(f"{time:.4g}") for time in seconds],
        "extra_memory": None,
    }
