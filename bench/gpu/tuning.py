"""`--tune` and `--phases`: measurements of the fused kernel alone, on one case."""

import numpy as np
import torch
from rich.table import Table

from bench import measure
from bench.gpu import implementations, reference, tune
from bench.gpu.compare import words
from bench.gpu.workload import Calls, Graph, LeftOut, Workload

ROUNDS, LAST_ROUNDS = 5, 10
BLOCK_SECONDS = 0.005
LAUNCHES = 12  # the times of phases are medians over this many launches


class Settings:
    """Times settings of the kernel on a workload; validates each setting before timing it."""

    def __init__(self, workload, seconds):
        self._workload, self._seconds = workload, seconds
        self._truth = reference.expected(workload)
        self._outcome = None  # the outcome of the default setting
        self.tried = []  # {"setting", "us" or "left_out", "bits"}

    def compare(self, settings, rounds=ROUNDS):
        """See `tune.search`."""
        runners, tried = {}, {}
        for k, setting in enumerate(settings):
            tried[k] = {"setting": setting}
            try:
                runners[k], tried[k]["bits"] = self._runner(setting)
            except Exception as reason:
                if not setting:
                    raise  # the default setting has to be correct
                tried[k]["left_out"] = words(reason)
        times, _ = measure.seconds_per_step(runners, rounds, rest=0, block=BLOCK_SECONDS)
        for k in times:
            tried[k]["us"] = float(f"{1e6 * np.median(times[k]):.4g}")
        self.tried += tried.values()
        return [times.get(k) for k in range(len(settings))]

    def _runner(self, setting):
        workload = self._workload
        kind = Graph if workload.device.place == "cuda" else Calls
        step = implementations.fused(tuning=setting)(workload)
        runner = kind(workload, step, self._seconds)
        workload.unwrite()
        runner.reset()
        runner.run(workload.case.batches)
        outcome = runner.outcome()
        if self._outcome is not None and reference.same_bits(outcome, self._outcome):
            return runner, "equal"
        # Another order of sums may give other bits; the result has to be correct all the same.
        name = f"{workload.case.name}, {tune.text(setting)}"
        reference.judge(name, outcome, self._truth, workload.start)
        if self._outcome is None:
            self._outcome = outcome
            return runner, "equal"
        return runner, "differ"


def tuned(case, table, device, seconds, over):
    """Returns the best setting for the case, and all settings that were tried."""
    workload = Workload(case, table, device)
    settings = Settings(workload, seconds)
    defaults = device.tuning()
    settings.compare([{}], rounds=1)  # validates the defaults and stores their bits
    best = tune.search(case.batch, defaults, settings.compare, over)
    both = settings.compare([{}, best] if best else [{}], LAST_ROUNDS)
    microseconds = [float(f"{1e6 * np.median(times):.4g}") for times in both]
    workload.clear()
    return {
        "name": case.name,
        "default_us": microseconds[0],
        "best_us": microseconds[-1],
        "setting": best,
        "bits": settings.tried[-1]["bits"],
        "defaults": defaults,
        "tried": settings.tried,
    }


def phases(case, table, device):
    """Returns when the first and last block pass each point of a launch, as medians of launches."""
    workload = Workload(case, table, device)
    step = device.workspace(case.batch, case.dim, phases=True)
    launch = implementations.launches(workload, step)
    workload.reset()
    names, times = [], []
    for k in range(-2, LAUNCHES):  # the first two launches load the kernel and warm up
        launch(k % case.batches)
        if device.place == "cuda":
            torch.cuda.synchronize()
        points = step.phases()
        if k >= 0:
            names = [name for name, *_ in points]
            times.append([[first, last] for _, first, last in points])
    workload.clear()
    if not names:
        raise LeftOut("the kernel module takes no times: it has no phase clock")
    rows = np.median(times, axis=0).tolist()
    return {
        "name": case.name,
        "phases": [
            {"name": name, "first_us": first, "last_us": last}
            for name, (first, last) in zip(names, rows, strict=True)
        ],
    }


def phase_table(case):
    """Returns the table of a launch, with one row per point."""
    title = f"{case['name']}: µs after the start of the first block, median of {LAUNCHES}"
    out = Table(title=title)
    for name in ("point", "first block", "last block", "last block, since the previous point"):
        out.add_column(name, justify="left" if name == "point" else "right")
    before = 0.0
    for point in case["phases"]:
        first, last = point["first_us"], point["last_us"]
        out.add_row(point["name"], f"{first:.2f}", f"{last:.2f}", f"{last - before:.2f}")
        before = last
    return out
