"""Validates every implementation against the oracle on a GPU, times them in turns, draws.

python -m bench.gpu                      all cases, until `--minutes` are over
python -m bench.gpu --cases 4096x512     some cases
python -m bench.gpu --tune               the fastest launch constants for each case
python -m bench.gpu --phases             the time of each phase of a launch
python -m bench.gpu --draw FILE.json     the plot of existing results, without a GPU
python -m bench.gpu --stand-in           tiny cases on the emulator: checks this program
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console

from bench import machine
from bench.gpu import report, tune
from bench.gpu.keys import OWN
from bench.report import summary, table

RESULTS = Path(__file__).parent.parent / "results"
MINUTES = {"": 3.5, "tune": 1.5, "phases": 0.5}  # default time limit of each mode


def main():
    """Runs what the command line selects; returns whether a kernel of this package was left out."""
    arguments = parse()
    if arguments.draw:
        results = json.loads(arguments.draw.read_text())
        return report.draw(results, arguments.draw.with_suffix(".png"))
    return Session(arguments).run()


class Session:
    """A run of the benchmark with its device, cases and results so far."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.console = Console()
        self.console.width = max(self.console.width, 120)
        self.device, self.seconds, self.conditions, self.cases = set_up(arguments)
        self.console.print(self.conditions)
        self.results = {"conditions": self.conditions, "cases": [], "left_out": {}}
        self._tables = {}

    def run(self):
        """Runs all cases; returns whether a kernel of this package was left out."""
        modes = {"": self.compare, "tune": self.tune, "phases": self.phases}
        modes[self.arguments.mode]()
        self.save()  # includes what was left out after the last case
        self.console.print("Left out:", self.results["left_out"])
        return any(what.endswith(OWN) for what in self.results["left_out"])

    def compare(self):
        """Times all implementations on all cases, then steps in TensorFlow on some cases."""
        from bench.gpu import compare, tensorflow_steps

        measured = {}
        for case in self.each(self.cases):
            one, left_out = compare.measurement(
                case, self.table(case), self.device, self.seconds, self.arguments.rounds
            )
            measured[case] = one
            self.results["cases"].append(one)
            self.console.print(table(one))
            self.leave_out(case, left_out)
            self.save_comparison()
        for case in self.each(filter(compare.usual, measured), ", TensorFlow"):
            if case.batch not in tensorflow_steps.BATCHES:
                continue
            rows, left_out = compare.in_tensorflow(case, self.table(case), self.device)
            measured[case]["implementations"] |= rows
            if rows:
                self.console.print(table(measured[case]))
            self.leave_out(case, left_out)
            self.save_comparison()
        if not self.arguments.stand_in:  # the times of the emulator mean nothing
            self.console.print(summary(report.figures(self.results["cases"])))

    def tune(self):
        """Searches for the fastest launch constants of each case."""
        from bench.gpu import cases, tuning

        for case in self.each(cases.tuned(self.cases)):
            found = tuning.tuned(case, self.table(case), self.device, self.seconds, self.over)
            self.results["cases"].append(found)
            times = f"{found['default_us']:.2f} µs with the defaults, {found['best_us']:.2f} with"
            self.console.print(f"{case.name}: {times} {tune.text(found['setting'])}")
            self.save()
        self.console.print(tune.table(self.results["cases"]))

    def phases(self):
        """Measures the time of each phase of a launch."""
        from bench.gpu import compare, tuning

        for case in self.each(self.cases):
            try:
                found = tuning.phases(case, self.table(case), self.device)
            except Exception as reason:  # for example an older kernel module
                self.leave_out(case, {"phases": compare.words(reason)})
                continue
            self.results["cases"].append(found)
            self.console.print(tuning.phase_table(found))
            self.save()

    def each(self, cases, what=""):
        """Yields the selected cases until the time limit; notes the others as left out."""
        for case in cases:
            if not any(part in case.name.replace("×", "x") for part in self.arguments.cases):
                continue
            if self.over():
                why = f"the {self.arguments.minutes:g} minutes were over"
                self.results["left_out"][case.name + what] = why
                continue
            yield case

    def over(self):
        """Returns whether the time limit has passed."""
        return time.monotonic() > self.ends

    def table(self, case):
        """Returns zeros [C, D] on the device, which are kept until a case has other sizes."""
        import torch

        sizes = case.classes, case.dim
        if sizes not in self._tables:
            self._tables.clear()
            self._tables[sizes] = torch.zeros(sizes, device=self.device.place)
        return self._tables[sizes]

    def leave_out(self, case, why):
        """Adds {key: reason} to what is left out."""
        self.results["left_out"] |= {f"{case.name}, {key}": text for key, text in why.items()}

    def save_comparison(self):
        """Writes the results and the plot."""
        figures = report.figures(self.results["cases"])
        self.results["figures"] = [f._asdict() | {"met": bool(f.met)} for f in figures]
        path = self.save()
        if path and importlib.util.find_spec("matplotlib"):
            report.draw(self.results, path.with_suffix(".png"))

    def save(self):
        """Writes the results so far and returns the path.

        The file is replaced as a whole, so that an interrupted run leaves the previous results.
        With the stand-in, results are written only if a path is given.
        """
        path = self.arguments.json
        if path is None:
            if self.arguments.stand_in:
                return None
            name = re.sub("[^a-z0-9]+", "-", self.conditions["gpu"].lower())
            mode = self.arguments.mode
            path = RESULTS / f"{name}{mode and '-'}{mode}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, path)
        return path


def set_up(arguments):
    """Returns the device, its clock, the conditions and the cases."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("bench.gpu: expected PyTorch in this Python, found none")
    # The device and the stand-in are modules of the tests.
    sys.path += [str(Path(__file__).parents[2] / "tests" / part) for part in ("", "gpu")]
    import torch

    from bench.gpu import cases, workload

    conditions = {"date": arguments.date, "rounds": arguments.rounds, **machine.describe()}
    conditions |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if arguments.stand_in:
        import stand_in

        device, seconds = workload.gpu.Device(stand_in, "cpu"), workload.wall_seconds
        conditions["gpu"], size, chosen = "none: the emulator", 2**20, cases.STAND_IN
    else:
        if reason := workload.gpu.why_not():
            sys.exit(f"bench.gpu: {reason}")
        device = workload.gpu.Device(workload.gpu.load_kernels())
        seconds, properties = workload.event_seconds, torch.cuda.get_device_properties(0)
        conditions |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cache_mb": round(properties.L2_cache_size / 1e6, 1),
            "driver_and_clocks": _driver(),
        }
        size, chosen = 2**29, cases.cases(properties.L2_cache_size)
    conditions["copy_gb_per_s"] = round(workload.copy_speed(device, seconds, size) / 1e9, 1)
    return device, seconds, conditions, chosen


def _driver():
    if not shutil.which("nvidia-smi"):
        return None
    asked = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,persistence_mode"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def parse():
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PART",
        default=[""],
        help="run only cases whose name contains one of these, such as 1024x512 or power-law",
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"start no case after this time (default: {MINUTES['']}; "
        f"--tune {MINUTES['tune']}; --phases {MINUTES['phases']})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="file for the results, next to the plot (default: bench/results/GPU.json)",
    )
    for mode, what in (
        ("tune", "search for the fastest launch constants of the fused kernel"),
        ("phases", "show the time of each phase of a launch"),
    ):
        parser.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, default="", help=what
        )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw these results")
    parser.add_argument(
        "--stand-in",
        action="store_true",
        help="use the emulator in place of a GPU; write results only to the file of --json",
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    parser.add_argument("--date", default=f"{now:%Y-%m-%d %H:%M} UTC", help="(default: now)")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = MINUTES[arguments.mode]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
