"""The op under XLA, and whole training steps: `python -m bench.xla` times them in turns.

One row a way to run the same steps: compiled (`jit_compile=True`) or not, with the fused op, the
package's pure-TensorFlow path, and the plain TensorFlow that XLA can compile.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from bench.cases import ALPHA, CASES, Case
from bench.check import expected, validate
from bench.implementations import Implementation, fused, graph
from bench.workload import Runner, Table, Workload

CLASSES, WIDTH, RATE = 10, 256, 0.01  # of the training step's softmax, hidden layer, optimizer
BLOCK_SECONDS = 0.05


def with_counts(counts):
    """Plain TensorFlow as a user writes it for XLA; nothing is checked."""

    def step(features, labels, centers):
        with tf.GradientTape() as tape:
            tape.watch(features)
            residual = features - tf.stop_gradient(tf.gather(centers, labels))
            loss = tf.nn.l2_loss(residual)
        gradient = tape.gradient(loss, features)
        n = counts(labels)[:, tf.newaxis]
        centers.scatter_add(tf.IndexedSlices(ALPHA / (1 + n) * residual, labels))
        return loss, gradient

    return step


def counts_by_matrix(labels):
    """How often each label occurs, by comparing all with all."""
    return tf.reduce_sum(tf.cast(labels[:, tf.newaxis] == labels, tf.float32), axis=1)


def counts_by_sorting(labels):
    """The same by sorting and counting runs."""
    order = tf.argsort(labels)
    ordered = tf.gather(labels, order)
    begins = tf.concat([[False], ordered[1:] != ordered[:-1]], 0)
    run = tf.cumsum(tf.cast(begins, tf.int32))
    n = tf.math.unsorted_segment_sum(tf.ones_like(ordered, tf.float32), run, tf.size(labels))
    return tf.scatter_nd(order[:, tf.newaxis], tf.gather(n, run), tf.shape(labels))


def nothing(features, labels, centers):
    """What a call costs."""
    return tf.constant(0.0), labels


def function(step, jit):
    """The step as a `tf.function`, called from Python for each batch."""

    def build(workload):
        centers = workload.table.variable

        @tf.function(autograph=False, jit_compile=jit)
        def call(features, labels):
            return step(features, labels, centers)

        return workload.each_batch(call)

    return build


def training(impl, jit):
    """Two dense layers, softmax and center loss, and a step of plain gradient descent."""

    def build(workload):
        case = workload.case
        initial = tf.random.Generator.from_seed(0)
        shapes = [[case.dim, WIDTH], [WIDTH, case.dim], [case.dim, CLASSES]]
        weights = [tf.Variable(0.02 * initial.normal(shape)) for shape in shapes]

        @tf.function(autograph=False, jit_compile=jit)
        def call(features, labels):
            with tf.GradientTape() as tape:
                embedding = tf.nn.relu(features @ weights[0]) @ weights[1]
                softmax = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    labels % CLASSES, embedding @ weights[2]
                )
                centers = workload.table.variable
                loss = tf.reduce_mean(softmax)
                if impl:
                    loss += 0.01 * tcl.center_loss(
                        embedding, labels, centers, alpha=ALPHA, impl=impl
                    )
            for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
                weight.assign_sub(RATE * gradient)
            return loss, weights[0][:1]

        return workload.each_batch(call)

    return build


IMPLEMENTATIONS = {
    "call xla": Implementation("nothing", "XLA", function(nothing, True), False),
    "call": Implementation("nothing", "tf.function", function(nothing, False), False),
    "fused xla": Implementation("fused op", "XLA", function(fused, True)),
    "graph xla": Implementation('impl="graph"', "XLA", function(graph, True)),
    "matrix xla": Implementation(
        "plain TensorFlow, B×B", "XLA", function(with_counts(counts_by_matrix), True)
    ),
    "sorting xla": Implementation(
        "plain TensorFlow, sorted", "XLA", function(with_counts(counts_by_sorting), True)
    ),
    "fused function": Implementation("fused op", "tf.function", function(fused, False)),
    "training fused xla": Implementation(
        "training, fused op", "XLA", training("native", True), False
    ),
    "training fused": Implementation(
        "training, fused op", "tf.function", training("native", False), False
    ),
    "training none xla": Implementation(
        "training, no center loss", "XLA", training(None, True), False
    ),
    "training none": Implementation(
        "training, no center loss", "tf.function", training(None, False), False
    ),
    "training graph xla": Implementation(
        'training, impl="graph"', "XLA", training("graph", True), False
    ),
    "training graph": Implementation(
        'training, impl="graph"', "tf.function", training("graph", False), False
    ),
}
PLAIN = ("graph xla", "matrix xla", "sorting xla")


def seconds(case, table, keys, rounds):
    """{key: [rounds] seconds a step}; each row held against the oracle first."""
    inputs = case.make()
    workload = Workload(case, inputs, table)
    truth = expected(inputs)
    runners, counts = {}, {}
    for key in keys:
        runner = runners[key] = Runner(workload, IMPLEMENTATIONS[key].build(workload))
        if IMPLEMENTATIONS[key].computes:
            validate(f"{case.name}, {key}", runner, case.batches, truth)
        runner.run(2)
        counts[key] = max(1, round(BLOCK_SECONDS / (runner.run(4) / 4)))
    rng = np.random.default_rng(0)
    times = {key: np.empty(rounds) for key in keys}
    for turn in range(rounds):
        for k in rng.permutation(len(keys)):
            runner, count = runners[keys[k]], counts[keys[k]]
            runner.run(-(-count // 10))
            times[keys[k]][turn] = runner.run(count) / count
    workload.clear()
    return times


def main():
    """Prints a table a case, and the ratios within a round that the figures to reach are of."""
    parser = argparse.ArgumentParser(prog="python -m bench.xla", description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[""], metavar="PART")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results, tables = [], {}

    def measure(case, keys):
        if (case.classes, case.dim) not in tables:
            tables.clear()
            tables[case.classes, case.dim] = Table(case.classes, case.dim)
        times = seconds(case, tables[case.classes, case.dim], keys, arguments.rounds)
        load = os.getloadavg()[0]
        print(f"\n{case.name}, load average {load:.1f}")
        for key, values in times.items():
            what, how, *_ = IMPLEMENTATIONS[key]
            low, middle, high = 1e6 * np.quantile(values, [0.1, 0.5, 0.9])
            print(f"  {what:26s}{how:14s}{middle:10.1f} µs   10 % {low:9.1f}   90 % {high:9.1f}")
        results.append(
            {"name": case.name, "load": load, "seconds": {k: list(v) for k, v in times.items()}}
        )
        return times

    for case in CASES:
        if any(part in case.name.replace("×", "x") for part in arguments.cases):
            times = measure(case, list(IMPLEMENTATIONS))
            best = min(PLAIN, key=lambda key: np.median(times[key]))
            call = times["call xla"]
            gain = np.median((times[best] - call) / (times["fused xla"] - call))
            cost = np.median(times["training fused xla"] / times["training fused"])
            without = np.median(times["training none xla"] / times["training none"])
            print(f"  {best} / fused xla, net of the call: {gain:.2f} (to reach: >= 2)")
            print(f"  training step, compiled / not, fused: {cost:.2f} (to reach: <= 1)")
            print(f"  the same without a center loss: {without:.2f}")
    for classes in (10**4, 10**6):
        measure(Case(1024, 64, classes, rotation=2**25), ["fused xla", "fused function"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
