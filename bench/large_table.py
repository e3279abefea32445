"""Measures time and memory of operations on a large table: `python -m bench.large_table`.

Creates, trains, saves, loads, checkpoints and restores a table as a variable and in a Keras layer,
by default 10 million x 256 float32 (10 GB). Prints the time of each stage and the peak of the
process's memory in it. Needs disk space for two copies of the table.
"""

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import tf_center_loss_op as tcl
from bench.memory import status

BATCH = 1024


def peak_of(stage):
    """Runs `stage()`; returns (seconds, peak resident bytes, resident bytes afterwards)."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    stage()
    return time.perf_counter() - start, status("VmHWM"), status("VmRSS")


def first_life(classes, dim, steps, folder):
    """Creates, trains and saves a table; returns [(stage, seconds, peak, afterwards)]."""
    rng = np.random.default_rng(0)
    rows = tf.constant(rng.integers(0, classes, BATCH))
    features = tf.constant(rng.standard_normal((BATCH, dim), np.float32))
    centers = None

    def create():
        nonlocal centers
        centers = tcl.tables.create(classes, dim, initializer=tcl.tables.RandomNormal(seed=0))

    @tf.function(autograph=False)
    def step(labels):
        return tcl.center_loss(features, labels, centers)

    def train():
        for _ in range(steps):
            step(tf.constant(rng.integers(0, classes, BATCH)))

    def save():
        tcl.tables.save(centers, f"{folder}/centers.npy")

    def load():
        before = tcl.tables.rows(rows, centers)
        centers.scatter_update(tf.IndexedSlices(tf.zeros_like(before), rows))
        tcl.tables.load(centers, f"{folder}/centers.npy")
        assert np.array_equal(tcl.tables.rows(rows, centers), before), "the numbers have changed"

    def checkpoint():
        os.remove(f"{folder}/centers.npy")
        tf.train.Checkpoint(centers=centers).write(f"{folder}/checkpoint")
        np.save(f"{folder}/rows.npy", tcl.tables.rows(rows, centers))

    def restore():
        tcl.tables.clear(centers)
        tf.train.Checkpoint(centers=centers).read(f"{folder}/checkpoint")
        assert np.array_equal(tcl.tables.rows(rows, centers), np.load(f"{folder}/rows.npy"))

    return [
        ("create, normal random numbers", *peak_of(create)),
        (f"{steps} steps of {BATCH} samples", *peak_of(train)),
        ("tables.save", *peak_of(save)),
        ("tables.load", *peak_of(load)),
        ("tf.train.Checkpoint.write", *peak_of(checkpoint)),
        ("a step after it", *peak_of(lambda: step(rows))),
        ("tables.clear and tf.train.Checkpoint.read", *peak_of(restore)),
        ("the first step after it", *peak_of(lambda: step(rows))),
    ]


def second_life(classes, dim, steps, folder):
    """Restores the table in a new process and continues."""
    rows = tf.constant(np.random.default_rng(0).integers(0, classes, BATCH))
    centers = tcl.tables.create(classes, dim)

    def restore():
        tf.train.Checkpoint(centers=centers).read(f"{folder}/checkpoint")

    def train():
        for _ in range(steps):
            tcl.update_centers(tf.ones([BATCH, dim]), rows, centers)

    stages = [("new process: tf.train.Checkpoint.read", *peak_of(restore))]
    saved = np.load(f"{folder}/rows.npy")
    assert np.array_equal(tcl.tables.rows(rows, centers), saved), "the numbers have changed"
    return [*stages, (f"{steps} steps", *peak_of(train))]


def life_in_a_layer(classes, dim, steps, folder):
    """Saves and loads a model by Keras's own functions."""
    rows = np.random.default_rng(0).integers(0, classes, BATCH)
    model = kept = None

    def table():
        return model.layers[-1].centers

    def create():
        nonlocal model
        features, labels = keras.Input([dim]), keras.Input([], dtype="int32")
        model = keras.Model([features, labels], tcl.CenterLoss(classes)(features, labels))
        model.compile("sgd")

    def train():
        for begin in range(0, classes, 2**16):
            labels = tf.range(begin, min(begin + 2**16, classes))
            model.layers[-1](tf.random.normal([len(labels), dim]), labels, training=True)

    def write(save, path):
        nonlocal kept
        kept = tcl.tables.rows(rows, table())
        save(f"{folder}/{path}")

    def read(load, path):
        load(f"{folder}/{path}")
        assert np.array_equal(tcl.tables.rows(rows, table()), kept), "the numbers have changed"
        os.remove(f"{folder}/{path}")

    def load_model(path):
        nonlocal model
        model = None
        gc.collect()  # the old model holds references to itself
        model = keras.models.load_model(path)

    def load_weights(path):
        model.layers[-1](tf.zeros([BATCH, dim]), rows, training=True)
        model.load_weights(path)

    return [
        ("CenterLoss, zeros", *peak_of(create)),
        ("a step of each class", *peak_of(train)),
        ("model.save_weights", *peak_of(lambda: write(model.save_weights, "a.weights.h5"))),
        ("model.load_weights", *peak_of(lambda: read(load_weights, "a.weights.h5"))),
        ("model.save, .keras", *peak_of(lambda: write(model.save, "a.keras"))),
        ("keras.models.load_model", *peak_of(lambda: read(load_model, "a.keras"))),
    ]


LIVES = {"variable": (first_life, second_life), "layer": (life_in_a_layer,)}


def main():
    """Runs each sequence of stages in a separate process and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.large_table", description=__doc__)
    parser.add_argument("--classes", type=int, default=10**7)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", help="folder for the files (default: a temporary folder)")
    parser.add_argument("--of", choices=LIVES, help="run only one of the two (default: both)")
    arguments = parser.parse_args()
    sizes = arguments.classes, arguments.dim, arguments.steps
    out = Table(
        title=f"{sizes[0]:,} × {sizes[1]} float32, {4e-9 * sizes[0] * sizes[1]:.2f} GB; "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB of memory"
    )
    for name in ("stage", "seconds", "peak GB", "GB afterwards"):
        out.add_column(name, justify="left" if name == "stage" else "right")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for life in [
            life for name in LIVES if arguments.of in (None, name) for life in LIVES[name]
        ]:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                for stage, seconds, peak, after in process.apply(life, (*sizes, folder)):
                    out.add_row(stage, f"{seconds:.2f}", f"{peak / 1e9:.2f}", f"{after / 1e9:.2f}")
    Console(width=100).print(out)


if __name__ == "__main__":
    main()
