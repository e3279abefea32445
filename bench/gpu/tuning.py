"""`--tune` and `--phases`: the fused kernel alone, on a case."""

import numpy as np
import torch
from rich.table import Table

from bench import measure
from bench.gpu import implementations, reference, tune
from bench.gpu.compare import words
from bench.gpu.workload import Calls, Graph, LeftOut, Workload

ROUNDS, LAST_ROUNDS = 5, 10
BLOCK_SECONDS = 0.005
LAUNCHES = 12  # that phases are medians of


class Settings:
    """Times settings of a workload's kernel, each validated the first time."""

    def __init__(self, workload, seconds):
        self._workload, self._seconds = workload, seconds
        self._truth = reference.expected(workload)
        self._outcome = None  # of the defaults
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
                    raise  # the defaults have to be right
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
        # Another order of sums gives other bits, and has to be right nevertheless.
        name = f"{workload.case.name}, {tune.text(setting)}"
        reference.judge(name, outcome, self._truth, workload.start)
        if self._outcome is None:
            self._outcome = outcome
            return runner, "equal"
        return runner, "differ"


def tuned(case, table, device, seconds, over):
    """The best setting for the case, and all that was tried."""
    workload = Workload(case, table, device)
    settings = Settings(workload, seconds)
    defaults = device.tuning()
    settings.compare([{}], rounds=1)  # validates the defaults, and their bits are known
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
    """When the first and the last block pass each point of a launch; medians over launches."""
    workload = Workload(case, table, device)
    step = device.workspace(case.batch, case.dim, phases=True)
    launch = implementations.launches(workload, step)
    workload.reset()
    names, times = [], []
    for k in range(-2, LAUNCHES):  # the first two load and warm up what is loaded once
        launch(k % case.batches)
        if device.place == "cuda":
            torch.cuda.synchronize()
        points = step.phases()
        if k >= 0:
            names = [name for name, *_ in points]
            times.append([[first, last] for _, first, last in points])
    workload.clear()
    if not names:
        raise LeftOut("the kernel module takes no times")
    rows = np.median(times, axis=0).tolist()
    return {
        "name": case.name,
        "phases": [
            {"name": name, "first_us": first, "last_us": last}
            for name, (first, last) in zip(names, rows, strict=True)
        ],
    }


def phase_table(case):
    """A row a point of the launch."""
    out = Table(title=f"{case['name']}: µs after the first block began, median of {LAUNCHES}")
    for name in ("a block has passed", "first", "last", "last, less the point before"):
        out.add_column(name, justify="left" if name == "a block has passed" else "right")
    before = 0.0
    for point in case["phases"]:
        first, last = point["first_us"], point["last_us"]
        out.add_row(point["name"], f"{first:.2f}", f"{last:.2f}", f"{last - before:.2f}")
        before = last
    return out
