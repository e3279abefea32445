"""Searches for the fastest launch constants of a case.

The search needs neither PyTorch nor the meaning of a constant: it tries values and compares times.
"""

import numpy as np
from rich.table import Table

# The values that are tried for each constant. A constant that the kernel module does not have is
# skipped, and a value that the module refuses is left out.
CANDIDATES = {
    "scan_threads": (64, 128),
    "hash_threads": (64, 128, 256),
    "hash_blocks": (1, 2, 3, 4),
    "wait_ns": (0, 20, 50, 100, 200),
    "overlap": (0, 1),
}
SIDES = "scan_batch"  # the largest batch of the scanned form; larger batches use the hashed form
SIDED = range(256, 4097)  # batches for which both forms are tried
ENOUGH = 0.01  # a constant is changed only if the step gets faster by more than this share


def search(batch, defaults, compare, over=lambda: False):
    """Returns the fastest setting: {name: value} of the constants that differ from the defaults.

    `compare(settings)` times the settings in turns. It returns, for each setting, an array of the
    seconds of each round, or None if the setting is left out. The search tries one constant after
    the other, with the best values of the previous constants, for both kernel forms. At the end it
    compares the best setting of each form with the defaults.
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
    """Returns the index of the fastest setting; 0 unless another setting is faster by ENOUGH."""
    if times[0] is None:
        times = [np.array([np.inf]) if time is None else time for time in times]
        return int(np.argmin([np.median(time) for time in times]))
    ratios = [np.inf if time is None else np.median(time / times[0]) for time in times]
    best = int(np.argmin(ratios))
    return best if ratios[best] < 1 - ENOUGH else 0


def table(cases):
    """Returns the table of the search, with one row per case."""
    out = Table(title="Launch constants: µs per step (median, CUDA graph)")
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
    """Returns the constants in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "the defaults"
