"""Clock and memory. NumPy only, so that the PyTorch script can use it.

The machine may be busy with other things. So all runners of a case take turns in short blocks, in
an order drawn anew in every round, and are compared within the round: the median of the rounds'
ratios is what the summary quotes.
"""

import ctypes
import math

import numpy as np

# Long enough to make the clock and the start of a block small beside it.
BLOCK_SECONDS = 0.03


def seconds_per_step(runners, rounds, status=lambda turn: None):
    """{key: [rounds] seconds a step}, for runners with `run(count) -> seconds`."""
    rng = np.random.default_rng(0)
    keys = list(runners)
    counts = {key: _steps_per_block(runners[key]) for key in keys}
    times = {key: np.empty(rounds) for key in keys}
    for turn in range(rounds):
        status(turn)
        for k in rng.permutation(len(keys)):
            key = keys[k]
            # Untimed: threads of the runner before may still spin, caches hold its rows.
            runners[key].run(math.ceil(counts[key] / 10))
            times[key][turn] = runners[key].run(counts[key]) / counts[key]
    return times


def extra_memory(runner, steps=3):
    """Bytes by which these steps raise the process's resident memory at their peak.

    What the allocator keeps for reuse is given back before, so that it counts; tables and batches
    are there already and do not. The kernel's own high-water mark, reset before (Linux).
    """
    runner.run(1)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _resident("VmRSS")
    runner.run(steps)
    return max(0, _resident("VmHWM") - before)


def _steps_per_block(runner):
    runner.run(1)
    count = 1
    while (seconds := runner.run(count)) < BLOCK_SECONDS / 3:
        count *= 2
    return math.ceil(count * BLOCK_SECONDS / seconds)


def _resident(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
