"""Validates every implementation against the oracle, times them in turns, prints and draws.

python -m bench
python -m bench --torch PYTHON_WITH_TORCH --json bench/results/NAME.json
python -m bench --cases 1024x512 --labels ""
python -m bench --rows xla training --labels ""
python -m bench --cases --labels 10,1000,100000,10000000
"""

import argparse
import contextlib
import datetime
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console

from bench import machine, memory, report
from bench.cases import CASES, label_sweep
from bench.implementations import IMPLEMENTATIONS
from bench.together import measurements
from bench.torch_process import TorchProcess
from bench.workload import Tables

SWEPT = (
    *("fused loop", "tutorial loop", "fused xla", "kernel", "rows"),
    *report.EMPTY_OF.values(),
)


def main():
    """Runs the benchmarks that the command line selects."""
    arguments = parse()
    console = Console()
    console.width = max(console.width, 120)
    conditions = {"date": arguments.date, "rounds": arguments.rounds, **machine.describe()}
    with contextlib.ExitStack() as stack:
        torch = stack.enter_context(TorchProcess(arguments.torch)) if arguments.torch else None
        conditions["torch"] = torch and torch.version
        console.print(conditions)
        status = stack.enter_context(console.status("")).update
        status("memory")
        swept, tables, cases, sweep = label_sweep(arguments.labels), Tables(), [], []
        extra = memory.of_cases(arguments.cases, arguments.rows, arguments.torch)
        extra |= memory.of_cases(swept, SWEPT)
        for case in arguments.cases:
            cases += measurements(
                [case], arguments.rows, extra, tables, arguments.rounds, torch, status
            )
            console.print(report.table(cases[-1]))
        if swept:
            # One call for all tables, so that each round times all of them.
            sweep = measurements(swept, SWEPT, extra, tables, arguments.rounds, status=status)
            console.print(report.sweep_table(sweep))
    figures = report.figures(cases, sweep)
    console.print(report.summary(figures))

    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results = {"conditions": conditions, "figures": [f._asdict() | {"met": f.met} for f in figures]}
    results |= {"cases": cases, "label_sweep": sweep}
    arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if cases:
        report.draw_cases(cases, arguments.json.with_suffix(".png"))
    if sweep:
        report.draw_sweep(sweep, arguments.json.with_name(f"{arguments.json.stem}-labels.png"))


def parse():
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="*",
        metavar="PART",
        default=[""],
        help="run only cases whose name contains one of these, such as 1024x512 or power-law; "
        "without a PART, run no case",
    )
    parser.add_argument(
        "--rows",
        nargs="*",
        metavar="PART",
        default=[""],
        help="run only implementations whose key in bench/implementations.py contains one of these",
    )
    parser.add_argument(
        "--labels",
        metavar="N,N,...",
        default="10,1000,10000,100000,1000000,10000000",
        help='numbers of labels for the label sweep; "" for none (default: %(default)s)',
    )
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--torch", metavar="PYTHON", help="also time PyTorch, in this Python")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).parent / "results" / "latest.json",
        help="file for the results, next to the plots (default: bench/results/latest.json)",
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    parser.add_argument(
        "--date", default=f"{now:%Y-%m-%d %H:%M} UTC", help="stored with the results (default: now)"
    )
    arguments = parser.parse_args()
    arguments.cases = [
        case
        for case in CASES
        if any(part in case.name.replace("×", "x") for part in arguments.cases)
    ]
    arguments.rows = [
        key
        for key in IMPLEMENTATIONS
        if key in report.EMPTY_OF.values() or any(part in key for part in arguments.rows)
    ]
    arguments.labels = [int(number) for number in arguments.labels.split(",") if number]
    return arguments


if __name__ == "__main__":
    main()
