"""Times runners in turns. Uses NumPy only, so that the PyTorch process can import it.

Other processes may disturb the machine. All runners therefore take turns in short blocks, in a new
random order in every round, and are compared within a round: the summary shows the median of the
rounds' ratios. Disturbed rounds are repeated, up to a limit.
"""

import math
import time

import numpy as np

# Long compared with the resolution of the clock and the start of a block.
BLOCK_SECONDS = 0.03

# Long enough for the threads of the previous runner to go to sleep. OpenMP's threads spin for
# milliseconds after their last step, on a core that the next runner needs.
REST_SECONDS = 0.02

QUIET = 0.1  # a round is quiet if other processes kept at most this many cores busy
MOST_ROUNDS = 3  # limit of all rounds, as a multiple of the requested rounds


def seconds_per_step(
    runners,
    rounds,
    disturbance=None,
    status=lambda text: None,
    rest=REST_SECONDS,
    block=BLOCK_SECONDS,
):
    """Times the runners; returns the results of the `rounds` quietest rounds.

    Args:
      runners: {key: an object with `run(count) -> seconds`}.
      rounds: the number of rounds to return.
      disturbance: returns the number of cores that other processes kept busy since its last call;
        None: no round is repeated.
      status: receives a line about the progress.
      rest: seconds before each turn.
      block: seconds that a turn takes, approximately.

    Returns:
      {key: [rounds] seconds per step}, and [rounds] cores that other processes kept busy.
    """
    rng = np.random.default_rng(0)
    counts = {key: _steps_per_block(runner, block) for key, runner in runners.items()}
    keys, turns, cores = list(runners), [], []
    while len(turns) < rounds or (
        np.sum(np.array(cores) <= QUIET) < rounds and len(turns) < MOST_ROUNDS * rounds
    ):
        status(f"round {len(turns) + 1}, {rounds} quiet rounds wanted")
        if disturbance:
            disturbance()
        turn = {}
        for k in rng.permutation(len(keys)):
            key = keys[k]
            time.sleep(rest)
            # Untimed steps wake up the runner's threads and replace the cached rows of the previous
            # runner.
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
