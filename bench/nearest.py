"""Times `tcl.nearest.predict` beside the plain formula: `python -m bench.nearest`.

The plain formula is the k smallest of |x|^2 - 2 x.c + |c|^2 in float32, with the matrix of all
scores, in NumPy and in TensorFlow. Every row must find the labels of float64 before it is timed.
All rows of a case take turns, in a new random order in each round, and ratios are compared within a
round, so that other processes disturb them alike.
"""

import argparse
import datetime
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import tf_center_loss_op as tcl
from bench import machine, measure
from bench.cases import short

CASES = {(256, 512, 100_000): 1, (256, 128, 10_000): 3, (16, 64, 1_000): 3}  # rounds, as a factor
PREDICT = "predict eager", "predict compiled"
PLAIN = "NumPy", "TensorFlow eager", "TensorFlow compiled"


class Runner:
    """Calls a function and waits for its result."""

    def __init__(self, function):
        self._function = function

    def run(self, count):
        """Returns the seconds of `count` calls."""
        start = time.perf_counter()
        for _ in range(count):
            np.asarray(self._function())
        return time.perf_counter() - start


def problem(batch, dim, classes):
    """Centers, and samples near to some of them."""
    rng = np.random.default_rng([batch, dim, classes])
    centers = rng.standard_normal((classes, dim), np.float32)
    noise = rng.standard_normal((batch, dim), np.float32)
    return centers[rng.integers(0, classes, batch)] + noise / 2, centers


def expected(features, centers, k):
    """The labels of the k nearest, by the formula in float64."""
    x, found = features.astype(np.float64), []
    for start in range(0, len(centers), 4096):
        c = centers[start : start + 4096].astype(np.float64)
        found.append((c * c).sum(1) - 2 * (x @ c.T))
    return np.argsort(np.concatenate(found, 1), axis=1, kind="stable")[:, :k]


def functions(features, centers, k):
    """The rows: {name: a function that returns the labels}."""
    x, table = tf.constant(features), tf.Variable(centers)

    def numpy_formula():
        scores = (features * features).sum(1)[:, None] - 2 * (features @ centers.T)
        scores += (centers * centers).sum(1)
        if k == 1:
            return scores.argmin(1)
        some = np.argpartition(scores, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(scores, some, 1).argsort(1)
        return np.take_along_axis(some, order, 1)

    def formula():
        scores = tf.reduce_sum(tf.square(x), 1)[:, None] - 2 * tf.matmul(x, table, transpose_b=True)
        scores += tf.reduce_sum(tf.square(table), 1)
        return tf.argmin(scores, 1) if k == 1 else tf.math.top_k(-scores, k).indices

    def predict():
        return tcl.nearest.predict(x, table, k=k)[0]

    rows = predict, tf.function(predict), numpy_formula, formula, tf.function(formula)
    return dict(zip(PREDICT + PLAIN, rows, strict=True))


def of_case(case, k, rounds):
    """Returns {row: [rounds] seconds} of one case; ends the program where a row is wrong."""
    features, centers = problem(*case)
    rows, labels = functions(features, centers, k), expected(features, centers, k)
    for name, function in rows.items():
        if not np.array_equal(np.asarray(function()).reshape(-1, k), labels):
            raise SystemExit(f"{name}, {case}, k = {k}: wrong labels")
    runners = {name: Runner(function) for name, function in rows.items()}
    return measure.seconds_per_step(runners, rounds)[0]


def main():
    """Validates, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.nearest", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    console, others = Console(width=140), machine.Others()
    out = Table(title="ms per call, medians; ratios within a round, medians")
    for name in ("B × D × C", "k", *PREDICT, *PLAIN, "eager / compiled", "eager / best plain"):
        out.add_column(name, justify="right")
    for case, factor in CASES.items():
        for k in (1, 5):
            seconds = of_case(case, k, rounds * factor)
            eager, compiled = (seconds[name] for name in PREDICT)
            plain = np.min([seconds[name] for name in PLAIN], axis=0)
            cells = [
                f"{case[0]} × {case[1]} × {short(case[2])}",
                str(k),
                *(f"{1e3 * np.median(seconds[name]):.3g}" for name in PREDICT + PLAIN),
                *(f"{np.median(eager / other):.2f}" for other in (compiled, plain)),
            ]
            out.add_row(*cells)
            console.print(*cells)  # a long run shows what it has
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    busy = f"{others():.1f} cores busy with other processes, load {os.getloadavg()[0]:.1f}"
    console.print({"date": date, "rounds": rounds, "others": busy, **machine.describe()})
    console.print(out)


if __name__ == "__main__":
    main()
