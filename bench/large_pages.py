"""Measures what large memory pages save: `python -m bench.large_pages`.

One process holds two tables of the same numbers, one on 2 MB pages and one on 4 KB pages. The bare
kernel and the hand-written row loop work on them in turns, in a new random order in each round, so
that other processes disturb both tables alike. Needs Linux with transparent huge pages set to
`madvise` or `always`.
"""

import argparse
import datetime
import json
import mmap
import os
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import machine, measure
from bench.cases import CASES, Case
from bench.implementations import bare_kernel, moved_rows
from bench.report import RENAMED

WHAT = {"bare kernel": bare_kernel, "hand-written row loop": moved_rows}
ADVICE = {"large": mmap.MADV_HUGEPAGE, "small": mmap.MADV_NOHUGEPAGE}
TABLES = [case for case in CASES if case.classes >= 10**6]
TABLES += [Case(1024, 64, 10**7), Case(1024, 64, 10**7, "power-law")]


class Workload:
    """A case's batches, and a table on pages of one kind."""

    def __init__(self, case, inputs, pages):
        self.case, self.batches = case, case.batches
        self.feature_arrays, self.label_arrays = list(inputs.features), list(inputs.labels)
        # Two megabytes more than needed, so that the table can start on a large page.
        size = 4 * case.classes * case.dim + 2**21
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(ADVICE[pages])
        numbers = np.frombuffer(self._memory, np.float32)
        first = -numbers.ctypes.data % 2**21 // 4
        numbers = numbers[first : first + case.classes * case.dim]
        self.table = SimpleNamespace(array=numbers.reshape(case.classes, case.dim))
        self.table.array.fill(0)
        self.table.array[inputs.rows] = inputs.start

    def each_index(self, step):
        """See `bench.workload.Workload.each_index`."""
        for k in range(self.batches):
            step(k)
        return step


class Runner:
    """Runs steps; takes the batches in turn."""

    def __init__(self, workload, step):
        self._step, self._batches, self._next = step, workload.batches, 0

    def run(self, count):
        """Returns the seconds of `count` steps."""
        start = time.perf_counter()
        for k in range(self._next, self._next + count):
            self._step(k % self._batches)
        self._next = (self._next + count) % self._batches
        return time.perf_counter() - start


def large_bytes():
    """Returns the bytes of this process on large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def of_case(case, rounds):
    """Returns the measurement of one case, as in the JSON file."""
    inputs, runners, before = case.make(), {}, large_bytes()
    for pages in ADVICE:
        workload = Workload(case, inputs, pages)
        for what, build in WHAT.items():
            runners[what, pages] = Runner(workload, build(workload))
    share = (large_bytes() - before) / (4 * case.classes * case.dim)
    if not 0.9 < share < 1.1:
        raise SystemExit(f"expected one of the two tables on large pages, got {share:.2f}")
    seconds, cores_of_others = measure.seconds_per_step(runners, rounds, machine.Others())
    return {
        "name": case.name,
        "tables_on_large_pages": round(share, 3),
        "cores_of_others": round(float(cores_of_others.mean()), 2),
        "seconds": {
            what: {pages: [float(f"{one:.4g}") for one in seconds[what, pages]] for pages in ADVICE}
            for what in WHAT
        },
    }


def report(measurements):
    """Returns the table: median µs per step, and the median and quartiles of the time saved."""
    out = Table(title="large pages against small pages, compared within each round")
    for name in ("case", "", "large pages, µs", "small pages, µs", "time saved", "quartiles"):
        out.add_column(name, justify="left" if name in ("case", "") else "right")
    for one in measurements:
        for what, seconds in one["seconds"].items():
            large, small = (np.array(seconds[pages]) for pages in ADVICE)
            low, middle, high = 100 * np.quantile(1 - large / small, (0.25, 0.5, 0.75))
            out.add_row(
                one["name"],
                RENAMED.get(what, what),
                *(f"{1e6 * np.median(times):.0f}" for times in (large, small)),
                f"{middle:.0f} %",
                f"{low:.0f} to {high:.0f} %",
            )
    return out


def main():
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.large_pages", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "large-pages.json"
    )
    arguments = parser.parse_args()
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    conditions = {"date": date, "rounds": arguments.rounds, **machine.describe()}
    console = Console(width=110)
    console.print(conditions)
    measurements = []
    for case in TABLES:
        measurements.append(of_case(case, arguments.rounds))
        console.print(case.name, measurements[-1]["tables_on_large_pages"])
    console.print(report(measurements))
    results = {"conditions": conditions, "cases": measurements}
    arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
