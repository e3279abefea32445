"""Steps in a loop that XLA compiles for a GPU: the fused op and plain TensorFlow ops, each less a
loop that only picks the batches.

python -m bench.xla_gpu results.json
python -m bench.xla_gpu --device CPU:0 --batches 64 --classes 1000   checks this program

`python -m bench.gpu` times the bare kernel. XLA_FLAGS decides what XLA puts into CUDA graphs.
"""

import argparse
import json
import os
import time
import types
from pathlib import Path

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from bench import check
from bench.check import Outcome
from bench.gpu.cases import GpuCase
from bench.implementations import IMPLEMENTATIONS
from bench.measure import seconds_per_step

KEYS = ("fused xla", "graph xla", "empty xla")


class Runner:
    """Runs a loop's steps to the end of the device's work, as `measure` and `check` ask for."""

    def __init__(self, inputs, table, steps, batches):
        self._inputs, self._table, self._steps, self._batches = inputs, table, steps, batches
        self.reset()

    def reset(self):
        self._table.scatter_update(tf.IndexedSlices(self._inputs.start, self._inputs.rows))
        self._next, self._last = 0, None

    def run(self, count):
        start = time.perf_counter()
        self._last = self._steps(self._next, count)
        self._last[0].numpy()
        self._next = (self._next + count) % self._batches
        return time.perf_counter() - start

    def outcome(self):
        rows = self._inputs.rows
        others = np.setdiff1d((rows + 1) % self._table.shape[0], rows)
        return Outcome(
            *(array.numpy() for array in self._last),
            tf.gather(self._table, rows).numpy(),
            bool(tf.reduce_any(tf.gather(self._table, others) != 0)),
        )


def times(case, rounds):
    """{key: [rounds] seconds a step}, of results that are held against the oracle first."""
    inputs = case.make()
    table = tf.Variable(tf.zeros([case.classes, case.dim]), trainable=False)
    workload = types.SimpleNamespace(
        features=tf.constant(inputs.features),
        labels=tf.constant(inputs.labels),
        table=types.SimpleNamespace(variable=table),
        batches=case.batches,
    )
    truth = check.expected(inputs)
    runners = {}
    for key in KEYS:
        steps = IMPLEMENTATIONS[key].build(workload)
        runners[key] = Runner(inputs, table, steps, case.batches)
        if IMPLEMENTATIONS[key].computes:
            check.validate(f"{case.name}, {key}", runners[key], case.batches, truth)
    return seconds_per_step(runners, rounds)[0]


def row(case, seconds):
    """Medians in microseconds, the two implementations less the empty loop of the same round."""
    net = {key: np.median(seconds[key] - seconds["empty xla"]) * 1e6 for key in KEYS[:2]}
    ratios = (seconds["graph xla"] - seconds["empty xla"]) / (
        seconds["fused xla"] - seconds["empty xla"]
    )
    return {
        "case": case.name,
        "fused_us": round(float(net["fused xla"]), 2),
        "graph_us": round(float(net["graph xla"]), 2),
        "empty_us": round(float(np.median(seconds["empty xla"])) * 1e6, 2),
        "graph_over_fused": round(float(np.median(ratios)), 2),
        "seconds": {key: list(map(float, seconds[key])) for key in KEYS},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, help="JSON is written here")
    parser.add_argument("--device", default="GPU:0")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096, 65536])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rotation", type=int, default=2**27, help="bytes of features in turns")
    given = parser.parse_args()

    rows = []
    print(f"{'B×D×C':>16} {'fused op':>10} {'graph':>10} {'empty loop':>10}  µs a step, net")
    with tf.device(given.device):
        for batch in given.batches:
            case = GpuCase(batch, given.dim, given.classes, rotation=given.rotation)
            rows.append(one := row(case, times(case, given.rounds)))
            numbers = (f"{one[key]:10.2f}" for key in ("fused_us", "graph_us", "empty_us"))
            ratio = one["graph_over_fused"]
            print(f"{case.name:>16} {' '.join(numbers)}  graph / fused {ratio}", flush=True)
    if given.path:
        gpus = tf.config.list_physical_devices("GPU")
        result = {
            "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "gpu": tf.config.experimental.get_device_details(gpus[0]) if gpus else None,
            "device": given.device,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "tensorflow": tf.__version__,
            "cuda": tcl.build_info()["cuda"],
            "rows": rows,
        }
        given.path.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
