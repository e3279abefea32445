"""Which launch constants are fastest for a case.

The search knows neither PyTorch nor what a constant means: it tries values and compares times.
"""

import numpy as np
from rich.table import Table

# What is tried for each constant. One that the kernel module does not have is skipped, and a value
# that it refuses is left out.
CANDIDATES = {
    "scan_threads": (64, 128, 256),
    "hash_threads": (128, 256),
    "hash_blocks": (1, 2, 3, 4),
    "lookahead": (0, 1, 2, 3, 4, 6, 8),
    "wait_ns": (0, 20, 50, 100, 200),
}
SIDES = "scan_batch"  # its value decides between two kernels, by the batch
SIDED = range(256, 4097)  # batches for which both are tried
ENOUGH = 0.01  # gained, or a constant stays as it is


def search(batch, defaults, compare, over=lambda: False):
    """The fastest setting found, {name: value} of what differs from the defaults.

    `compare(settings)` times them in turns: an array of seconds, one a round, for each setting,
    None where one is left out. One constant is tried after the other, with the best values of those
    before, on both sides of SIDES; then the best of each side are compared with the defaults.
    """
    found = [{}]
    for start in _sides(batch, defaults):
        best = _descend(start, defaults, compare, over)
        if best not in found:
            found.append(best)
    return found[_fastest(compare(found))] if len(found) > 1 else {}


def _sides(batch, defaults):
    starts = [{}]
    if SIDES in defaults and batch in SIDED:
        scanned = batch <= defaults[SIDES]
        starts.append({SIDES: batch - 1 if scanned else batch})
    return starts


def _descend(best, defaults, compare, over):
    for name, values in CANDIDATES.items():
        if name not in defaults or over():
            continue
        tried = [best]
        for value in values:
            setting = {**best, name: value}
            if value == defaults[name]:
                del setting[name]
            if setting not in tried:
                tried.append(setting)
        best = tried[_fastest(compare(tried))]
    return best


def _fastest(times):
    """Of the settings with these times; the first, unless another gains enough."""
    if times[0] is None:
        times = [np.array([np.inf]) if time is None else time for time in times]
        return int(np.argmin([np.median(time) for time in times]))
    ratios = [np.inf if time is None else np.median(time / times[0]) for time in times]
    best = int(np.argmin(ratios))
    return best if ratios[best] < 1 - ENOUGH else 0


def table(cases):
    """A row a case."""
    out = Table(title="Launch constants: µs a step (median, CUDA graph)")
    for name in ("case", "defaults", "best", "gain", "setting", "bits"):
        right = name in ("defaults", "best", "gain")
        out.add_column(name, justify="right" if right else "left", no_wrap=name == "case")
    for case in cases:
        default, best = case["default_us"], case["best_us"]
        out.add_row(
            case["name"],
            f"{default:.2f}",
            f"{best:.2f}",
            f"{100 * (1 - best / default):.0f} %",
            text(case["setting"]),
            case["bits"],
        )
    return out


def text(setting):
    """The constants in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "the defaults"
