"""Several threads step on one variable: no step is lost, no snapshot shows half a step."""

import os
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program

# Only the native op promises this: the plain TensorFlow path is several ops, others run between.
pytestmark = pytest.mark.native

C, D = 3000, 64


def run_threads(*targets):
    """Runs the targets in parallel threads; the first error of any is raised."""
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_two_threads_lose_no_step(native_library, traced):
    # Rule "sum" with alpha = 1/2 halves the distance to x; from 0, k steps end at x - x / 2^k,
    # exactly, in any order. A lost step or a row moved from an old value changes the result.
    steps, x = 20, 2.0**42
    labels = tf.range(C)
    features = tf.fill([C, D], tf.constant(x, tf.float64))

    def call(centers):
        tcl.update_centers(features, labels, centers, rule="sum", impl="native")

    for _ in range(5):
        centers = tf.Variable(tf.zeros([C, D], tf.float64))
        step = tf.function(call) if traced else call
        start = threading.Barrier(2)

        def work(step=step, centers=centers, start=start):
            start.wait()
            for _ in range(steps):
                step(centers)

        run_threads(work, work)
        assert np.unique(centers.numpy()).tolist() == [x - x / 2.0 ** (2 * steps)]


@pytest.mark.parametrize("reader", ["checkpoint", "read_value", "gather"])
def test_snapshots_are_never_torn(native_library, tmp_path, reader):
    # Rule "sum" with alpha = 1 sets every row to x, so that all numbers of the table are equal
    # after every step. A snapshot with two values was taken during a step.
    centers = tf.Variable(tf.zeros([C, D]))
    restored = tf.Variable(tf.zeros([C, D]))
    labels = tf.range(C)
    done = threading.Event()
    seen = []

    @tf.function
    def step(x):
        features = tf.fill([C, D], x)
        tcl.update_centers(features, labels, centers, alpha=1.0, rule="sum", impl="native")

    def enough():
        return len(seen) > 10 and len({values[0] for values in seen}) > 5

    def write():
        x = 0
        while not done.is_set():
            x += 1
            step(tf.constant(float(x % 4096)))

    def read():
        start = time.monotonic()
        try:
            # Three seconds, and as long as it takes on a slow machine to see several steps.
            while time.monotonic() - start < 3 or not enough():
                if time.monotonic() - start > 120:
                    break
                if reader == "checkpoint":
                    path = tf.train.Checkpoint(centers=centers).write(str(tmp_path / "snapshot"))
                    tf.train.Checkpoint(centers=restored).read(path).assert_consumed()
                    values = restored.numpy()
                elif reader == "read_value":
                    values = centers.numpy()
                else:
                    values = tf.gather(centers, labels).numpy()
                seen.append(np.unique(values).tolist())
        finally:
            done.set()

    run_threads(write, read)
    assert [values for values in seen if len(values) != 1] == []
    assert enough(), "the steps did not run beside the reader"


def test_steps_of_different_variables_run_at_once(native_library):
    tables = [tf.Variable(tf.zeros([C, D])) for _ in range(4)]
    features, labels = tf.ones([C, D]), tf.range(C)

    def work(centers):
        for _ in range(20):
            tcl.center_loss(features, labels, centers, impl="native")

    run_threads(*[lambda centers=centers: work(centers) for centers in tables])
    expected = tables[0].numpy()
    assert all(np.array_equal(centers.numpy(), expected) for centers in tables)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
@pytest.mark.parametrize(
    "threads",
    [(), (1,)],
    ids=["as it is", "one thread for ops"],
)
def test_a_large_step_runs_on_several_threads(native_library, tmp_path, threads):
    out = run_program("time_of_two_threads", *threads, cwd=tmp_path)
    least, most = map(int, out.split())
    assert least > most / 5, f"processor time of two threads: {least} and {most} hundredths"
