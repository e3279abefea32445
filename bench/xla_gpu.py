"""Times the fused op and plain TensorFlow ops in a loop that XLA compiles for a GPU.

The time of an empty loop, which only takes the batches, is subtracted.

python -m bench.xla_gpu results.json
python -m bench.xla_gpu --device CPU:0 --batches 64 --classes 1000   checks this program

The number of steps is a constant of the program, so that XLA does not wait for the device between
steps. `python -m bench.gpu` times the bare kernel. XLA_FLAGS selects what XLA puts into CUDA
graphs.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from bench import check
from bench.check import Outcome
from bench.gpu.cases import GpuCase
from bench.implementations import empty, fused, graph
from bench.measure import seconds_per_step

STEPS = {"fused": fused, "graph": graph, "empty": empty}
LEAST_STEPS = 50  # per call of a program


class Loop:
    """A compiled loop of steps over the batches, a runner for `measure` and `check`."""

    def __init__(self, step, inputs, table, steps):
        self._inputs, self._table = inputs, table
        all_features, all_labels = tf.constant(inputs.features), tf.constant(inputs.labels)

        # The loop carries the last gradient and labels, so that XLA cannot remove any work. The
        # empty loop makes the same copies.
        def body(i, loss, gradient, labels):
            k = i % len(inputs.labels)
            loss, gradient = step(all_features[k], all_labels[k], table)
            return i + 1, loss, gradient, all_labels[k]

        @tf.function(autograph=False, jit_compile=True)
        def call():
            first = tf.constant(0), tf.constant(0.0), all_features[0], all_labels[0]
            return tf.while_loop(lambda i, *_: i < steps, body, first)[1:3]

        self._call = call

    def reset(self):
        self._table.scatter_update(tf.IndexedSlices(self._inputs.start, self._inputs.rows))

    def run(self, calls):
        start = time.perf_counter()
        for _ in range(calls):
            self._last = self._call()
        self._last[0].numpy()
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
    """Validates the steps by the oracle; returns {key: [rounds] seconds per step}."""
    inputs, batches = case.make(), case.batches
    table = tf.Variable(tf.zeros([case.classes, case.dim]), trainable=False)
    truth = check.expected(inputs)
    for key in ("fused", "graph"):
        check.validate(f"{case.name}, {key}", Loop(STEPS[key], inputs, table, batches), 1, truth)
    steps = batches * -(-LEAST_STEPS // batches)
    loops = {key: Loop(step, inputs, table, steps) for key, step in STEPS.items()}
    return {key: calls / steps for key, calls in seconds_per_step(loops, rounds)[0].items()}


def row(case, seconds):
    """Returns medians in µs; the two implementations without the empty loop of the same round."""
    net = {key: (seconds[key] - seconds["empty"]) * 1e6 for key in ("fused", "graph")}
    return {
        "case": case.name,
        "fused_us": round(float(np.median(net["fused"])), 2),
        "graph_us": round(float(np.median(net["graph"])), 2),
        "empty_us": round(float(np.median(seconds["empty"])) * 1e6, 2),
        "graph_over_fused": round(float(np.median(net["graph"] / net["fused"])), 2),
        "seconds": {key: list(map(float, one)) for key, one in seconds.items()},
    }


def main():
    """Times the cases of the command line, prints them, and writes the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, help="JSON file for the results")
    parser.add_argument("--device", default="GPU:0")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096, 65536])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rotation", type=int, default=2**27, help="bytes of features in rotation")
    given = parser.parse_args()
    gpus = tf.config.list_physical_devices("GPU")
    if "GPU" in given.device and not gpus:
        parser.error(f"--device: expected a device that TensorFlow finds, got {given.device}")

    result = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpu": tf.config.experimental.get_device_details(gpus[0]) if gpus else None,
        "device": given.device,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "tensorflow": tf.__version__,
        "cuda": tcl.build_info()["cuda"],
        "rows": [],
    }
    print(f"{'B×D×C':>16} {'fused op':>10} {'graph':>10} {'empty loop':>10}  µs per step, net")
    with tf.device(given.device):
        for batch in given.batches:
            case = GpuCase(batch, given.dim, given.classes, rotation=given.rotation)
            result["rows"].append(one := row(case, times(case, given.rounds)))
            numbers = (f"{one[key]:10.2f}" for key in ("fused_us", "graph_us", "empty_us"))
            ratio = one["graph_over_fused"]
            print(f"{case.name:>16} {' '.join(numbers)}  graph / fused {ratio}", flush=True)
            if given.path:  # after each row, so that an interrupted run leaves its rows
                given.path.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
