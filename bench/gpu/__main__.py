"""Validates every implementation against the oracle on a GPU, times them in turns, draws.

python -m bench.gpu                      everything, for `--minutes`
python -m bench.gpu --cases 4096x512     some cases
python -m bench.gpu --draw FILE.json     the plot of results that are there, without a GPU
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

from bench import check, machine, measure
from bench.gpu import report
from bench.gpu.keys import OWN
from bench.report import summary, table

RESULTS = Path(__file__).parent.parent / "results"


def main():
    """Runs what the command line asks for; true where a kernel of our own had to be left out."""
    arguments = parse()
    if arguments.draw:
        results = json.loads(arguments.draw.read_text())
        return report.draw(results, arguments.draw.with_suffix(".png"))
    device, seconds, conditions, cases = set_up(arguments)
    console = Console()
    console.width = max(console.width, 120)
    console.print(conditions)
    ends = time.monotonic() + 60 * arguments.minutes
    results = {"conditions": conditions, "cases": [], "left_out": {}}
    tables = {}
    for case in cases:
        if not any(part in case.name.replace("×", "x") for part in arguments.cases):
            continue
        if time.monotonic() > ends:
            results["left_out"][case.name] = f"the {arguments.minutes:g} minutes were over"
            continue
        measured, left_out = measurement(case, tables, device, seconds, arguments.rounds)
        results["cases"].append(measured)
        results["left_out"] |= {f"{case.name}, {key}": why for key, why in left_out.items()}
        console.print(table(measured))
    figures = report.figures(results["cases"], conditions["copy_gb_per_s"] * 1e9)
    results["figures"] = [f._asdict() | {"met": bool(f.met)} for f in figures]
    if not arguments.stand_in:  # which has no times
        console.print(summary(figures))
    console.print("Left out:", results["left_out"])
    wrong = [what for what in results["left_out"] if what.endswith(OWN)]
    if arguments.stand_in:
        return bool(wrong)
    path = (
        arguments.json or RESULTS / f"{re.sub('[^a-z0-9]+', '-', conditions['gpu'].lower())}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if importlib.util.find_spec("matplotlib"):
        report.draw(results, path.with_suffix(".png"))
    else:
        console.print(f"No matplotlib: python -m bench.gpu --draw {path} draws it elsewhere")
    return bool(wrong)


def set_up(arguments):
    """The device, its clock, the conditions and the cases."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("bench.gpu: no PyTorch")
    # The tests' common modules, which the device and the stand-in are made of.
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


def measurement(case, tables, device, seconds, rounds):
    """What `bench.report` takes, and {key: why it is left out}."""
    import torch

    from bench.gpu import tensorflow_steps, workload
    from bench.gpu.implementations import IMPLEMENTATIONS, Calls

    inputs = case.make()
    truth = check.expected(inputs)
    if (case.classes, case.dim) not in tables:
        tables.clear()
        tables[case.classes, case.dim] = torch.zeros([case.classes, case.dim], device=device.place)
    work = workload.Workload(case, inputs, tables[case.classes, case.dim], device)
    shown, runners, left_out = {}, {}, {}
    usual = case.labels == "uniform" and case.dtype == "float32"
    for key, one in IMPLEMENTATIONS.items():
        if not (usual or one.always):
            continue
        runner = one.runner if device.place == "cuda" else Calls
        try:
            made = runner(work, one.build(work), seconds)
            if one.computes:
                check.validate(f"{case.name}, {key}", made, case.batches, truth)
        except Exception as reason:  # what others get wrong, or cannot do here, is not timed
            left_out[key] = _words(reason)
            continue
        shown[key], runners[key] = one, made
    if usual:
        try:
            more, made = tensorflow_steps.build(case, inputs)
            for key in more:
                if more[key].computes:
                    check.validate(f"{case.name}, {key}", made[key], case.batches, truth)
            shown, runners = shown | more, runners | made
        except Exception as reason:
            left_out["TensorFlow"] = _words(reason)
    times, cores = measure.seconds_per_step(runners, rounds, machine.Others(), rest=0)
    around = {
        "load": round(os.getloadavg()[0], 2),
        "cores_of_others": round(float(cores.mean()), 2),
    }
    work.clear()
    return {
        "name": case.name,
        "batch": case.batch,
        "dim": case.dim,
        "classes": case.classes,
        "labels": case.labels,
        "dtype": case.dtype,
        "batches": case.batches,
        "bytes": case.bytes(inputs.labels),
        "surroundings": around,
        "implementations": {
            key: {
                "what": one.what,
                "how": one.how,
                "seconds": [float(f"{time:.4g}") for time in times[key]],
                "extra_memory": None,
            }
            for key, one in shown.items()
        },
    }, left_out


def _words(error):
    """The first line of what went wrong."""
    what = "" if type(error).__name__ == "LeftOut" else f"{type(error).__name__}: "
    return what + (str(error).strip().splitlines() or [""])[0]


def _driver():
    if not shutil.which("nvidia-smi"):
        return None
    asked = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,persistence_mode"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def parse():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PART",
        default=[""],
        help="only cases whose name holds one of these, such as 1024x512 or power-law",
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=4,
        help="no case begins after these (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="for the results; the plot goes beside it (default: bench/results/GPU.json)",
    )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw what is there")
    parser.add_argument(
        "--stand-in", action="store_true", help="the emulator in the GPU's place, nothing written"
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    parser.add_argument("--date", default=f"{now:%Y-%m-%d %H:%M} UTC", help="(default: now)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
