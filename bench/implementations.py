"""The implementations that the benchmark times; each runs steps over a workload's batches.

One step computes the loss (sum form), its gradient with respect to the features with upstream
gradient 1, and the step of the centers by the paper's rule.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from bench import compiled, xla
from bench.cases import ALPHA
from bench.machine import THREADS
from bench.training import training
from tf_center_loss_op import _kernels


def fused(features, labels, centers):
    """The package's native op."""
    return _package(features, labels, centers, "native")


def graph(features, labels, centers):
    """The package's path of plain TensorFlow ops, including all checks of the arguments."""
    return _package(features, labels, centers, "graph")


def tutorial(features, labels, centers):
    """The tutorial's function, op by op, without checks."""
    with tf.GradientTape() as tape:
        tape.watch(features)
        labels = tf.reshape(labels, [-1])
        centers_batch = tf.gather(centers, labels)
        diff = centers_batch - features
        _, unique_idx, unique_count = tf.unique_with_counts(labels)
        appear_times = tf.reshape(tf.gather(unique_count, unique_idx), [-1, 1])
        diff = diff / tf.cast(1 + appear_times, tf.float32)
        diff = ALPHA * diff
        centers.scatter_sub(tf.IndexedSlices(diff, labels))
        loss = tf.nn.l2_loss(features - centers_batch)
    return loss, tape.gradient(loss, features)


def tuned(features, labels, centers):
    """The tutorial's function, rewritten with as few ops as possible."""
    with tf.GradientTape() as tape:
        tape.watch(features)
        residual = features - tf.stop_gradient(tf.gather(centers, labels))
        loss = tf.nn.l2_loss(residual)
    gradient = tape.gradient(loss, features)
    _, index, counts = tf.unique_with_counts(labels)
    n = tf.cast(tf.gather(counts, index), tf.float32)[:, tf.newaxis]
    centers.scatter_add(tf.IndexedSlices(ALPHA / (1 + n) * residual, labels))
    return loss, gradient


def empty(features, labels, centers):
    """Takes the batch and computes nothing."""
    return tf.constant(0.0), features


def eager(step):
    """Calls the step eagerly, op by op."""

    def build(workload):
        centers = workload.table.variable
        return workload.each_batch(lambda features, labels: step(features, labels, centers))

    return build


def function(step):
    """Makes the step a `tf.function`, called from Python for each batch."""

    def build(workload):
        centers = workload.table.variable

        @tf.function(autograph=False)
        def call(features, labels):
            return step(features, labels, centers)

        return workload.each_batch(call)

    return build


def while_loop(step, jit_compile=None):
    """Runs the steps in a `tf.while_loop` within one `tf.function`, one after the other.

    Taking a batch creates a view. Under XLA it makes a copy, in the empty loop as well. XLA may
    fuse this copy into a step of plain ops. The subtracted time still contains the copy, which
    favors the plain ops over the fused op. The loop carries the last gradient and the last labels,
    so that no work can be removed from it, not even in the empty loop.
    """

    def build(workload):
        all_features, all_labels = workload.features, workload.labels
        centers, batches = workload.table.variable, workload.batches

        @tf.function(autograph=False, jit_compile=jit_compile)
        def loop(first, end):
            def body(i, loss, gradient, labels):
                # A side effect, in every loop. TensorFlow removes parts of a loop without one, so
                # the empty loop would take less time than the overhead of the other loops.
                if not jit_compile:
                    tf.timestamp()
                features, labels = all_features[i % batches], all_labels[i % batches]
                loss, gradient = step(features, labels, centers)
                return i + 1, loss, gradient, labels

            carried = first, tf.constant(0.0), all_features[0], all_labels[0]
            return tf.while_loop(lambda i, *_: i < end, body, carried, parallel_iterations=1)

        def steps(first, count):
            _, loss, gradient, _ = loop(tf.constant(first), tf.constant(first + count))
            return loss, gradient

        return steps

    return build


def bare_kernel(workload):
    """Calls the C++ kernel on arrays, through its Python binding."""
    table = workload.table.array

    def step(k):
        return _kernels.center_loss_step(
            workload.feature_arrays[k],
            workload.label_arrays[k],
            table,
            alpha=ALPHA,
            reduction="sum",
            threads=THREADS,
        )

    return workload.each_index(step)


def moved_rows(workload):
    """Calls the hand-written loop of rows.cc; the labels are grouped before the clock starts."""
    move = compiled.library().MoveRows
    gradient = np.zeros(workload.feature_arrays[0].shape, np.float32)

    def arguments(features, labels):
        distinct, counts = np.unique(labels, return_counts=True)
        groups = distinct, np.append(0, np.cumsum(counts)), np.argsort(labels, kind="stable")
        read = [compiled.pointer(a) for a in (features, *groups)]
        written = [compiled.pointer(a) for a in (workload.table.array, gradient)]
        return *read, len(distinct), workload.case.dim, ALPHA, *written, THREADS

    batches = zip(workload.feature_arrays, workload.label_arrays, strict=True)
    calls = [arguments(*batch) for batch in batches]

    def step(k):
        move(*calls[k])
        return None, gradient

    return workload.each_index(step)


def copied_bytes(workload):
    """Copies as many bytes as a step must move, between buffers that are not in the cache."""
    copy = compiled.library().Copy
    source = np.asarray(memoryview(workload.features))
    target = np.asarray(memoryview(tf.zeros_like(workload.features)))
    size = int(workload.bytes / 2)
    places = source.nbytes // size

    def step(k):
        offset = k % places * size
        copy(source.ctypes.data + offset, target.ctypes.data + offset, size, THREADS)
        return None, None

    return workload.each_index(step)


class Implementation(NamedTuple):
    """`build(workload)` returns `steps(first, count)`, see `bench.workload.Runner`."""

    what: str
    how: str
    build: Callable
    computes: bool = True  # whether the oracle can validate it


TRAININGS = {"native": "fused op", "graph": 'impl="graph"', None: "no center loss"}
IMPLEMENTATIONS = {
    "fused loop": Implementation("fused op", "tf.while_loop", while_loop(fused)),
    "fused function": Implementation("fused op", "tf.function", function(fused)),
    "fused eager": Implementation("fused op", "eager", eager(fused)),
    "tutorial loop": Implementation("tutorial's ops", "tf.while_loop", while_loop(tutorial)),
    "tutorial function": Implementation("tutorial's ops", "tf.function", function(tutorial)),
    "tutorial eager": Implementation("tutorial's ops", "eager", eager(tutorial)),
    "tuned loop": Implementation("tuned TensorFlow ops", "tf.while_loop", while_loop(tuned)),
    "tuned function": Implementation("tuned TensorFlow ops", "tf.function", function(tuned)),
    "tuned eager": Implementation("tuned TensorFlow ops", "eager", eager(tuned)),
    "graph loop": Implementation('impl="graph"', "tf.while_loop", while_loop(graph)),
    "graph function": Implementation('impl="graph"', "tf.function", function(graph)),
    "graph eager": Implementation('impl="graph"', "eager", eager(graph)),
    "kernel": Implementation("bare kernel", "C++", bare_kernel),
    "rows": Implementation("hand-written row loop", "C++", moved_rows),
    "copy": Implementation("copy of the same bytes", "C++", copied_bytes, computes=False),
    "empty loop": Implementation("empty loop", "tf.while_loop", while_loop(empty), computes=False),
    "fused xla": Implementation("fused op", "XLA loop", while_loop(fused, True)),
    "graph xla": Implementation('impl="graph"', "XLA loop", while_loop(graph, True)),
    **{
        f"{key} xla": Implementation(
            f"TensorFlow ops, {xla.TITLES[key]}",
            "XLA loop",
            while_loop(xla.with_counts(count), True),
        )
        for key, count in xla.COUNTS.items()
    },
    "empty xla": Implementation("empty loop", "XLA loop", while_loop(empty, True), computes=False),
    **{
        f"training {impl}{' xla' if jit else ''}": Implementation(
            f"training, {what}", "XLA" if jit else "tf.function", training(impl, jit), False
        )
        for impl, what in TRAININGS.items()
        for jit in (True, None)
    },
}


def _package(features, labels, centers, impl):
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, labels, centers, alpha=ALPHA, reduction="sum", impl=impl)
    return loss, tape.gradient(loss, features)
