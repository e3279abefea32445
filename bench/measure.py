"""The clock. NumPy only, so that the PyTorch script can use it.

The machine may be busy with other things. So all runners take turns in short blocks, in an order
drawn anew in every round, and are compared within the round: the median of the rounds' ratios is
what the summary quotes. Rounds that others disturbed are run again, up to a limit.
"""

import math
import time

import numpy as np

# Long enough to make the clock and the start of a block small beside it.
BLOCK_SECONDS = 0.03

# Until the threads of the runner before have gone to sleep: OpenMP's spin for milliseconds after
# their last step, on a core that the next one needs.
REST_SECONDS = 0.02

# Cores that other processes kept busy during a round.
QUIET = 0.1
MOST_ROUNDS = 3  # times the rounds asked for


def seconds_per_step(
    runners,
    rounds,
    disturbance=None,
    status=lambda text: None,
    rest=REST_SECONDS,
    block=BLOCK_SECONDS,
):
    """{key: [rounds] seconds a step} and [rounds] cores of others, in the `rounds` quietest rounds.

    Runners have `run(count) -> seconds`. `disturbance()` says how many cores were busy for others
    since it was called last; None: no round is run again. Turns begin after `rest` seconds and take
    about `block` seconds.
    """
    rng = np.random.default_rng(0)
    counts = {key: _steps_per_block(runner, block) for key, runner in runners.items()}
    keys, turns, cores = list(runners), [], []
    while len(turns) < rounds or (
        np.sum(np.array(cores) <= QUIET) < rounds and len(turns) < MOST_ROUNDS * rounds
    ):
        status(f"round {len(turns) + 1}, {rounds} quiet ones wanted")
        if disturbance:
            disturbance()
        turn = {}
        for k in rng.permutation(len(keys)):
            key = keys[k]
            time.sleep(rest)
            # Untimed: its own threads wake up, and caches hold the rows of the one before.
            runners[key].run(math.ceil(counts[key] / 10))
            turn[key] = runners[key].run(counts[key]) / counts[key]
        turns.append(turn)
        cores.append(disturbance() if disturbance else 0.0)
    kept = np.sort(np.argsort(cores, kind="stable")[:rounds])
    seconds = {key: np.array([turns[k][key] for k in kept]) for key in runners}
    return seconds, np.array(cores)[kept]


def _steps_per_block(runner, block):
    runner.run(1)
    count = 1
    while (seconds := runner.run(count)) < block / 3:
        count *= 2
    return math.ceil(count * block / seconds)
