"""Calls the package in a given mode and returns all results as NumPy arrays."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import oracle
import plain
import tf_center_loss_op as tcl
from tolerances import assert_near_oracle


class Outcome(NamedTuple):
    """The results of a call: float64 copies and the original dtypes."""

    loss: np.ndarray
    feature_gradient: np.ndarray
    centers: np.ndarray
    loss_dtype: str
    gradient_dtype: str


def wide(tensor):
    """A float64 NumPy copy, bfloat16 included."""
    return tf.cast(tensor, tf.float64).numpy()


def make_variable(centers, holder="tf.Variable"):
    """A table of centers; holder "keras.Variable" wraps it as a layer would."""
    if holder == "keras.Variable":
        return keras.Variable(centers, dtype=centers.dtype.name, trainable=False)
    return tf.Variable(centers, name="centers")


def table_of(centers):
    """The tf.Variable itself."""
    return centers.value if isinstance(centers, keras.Variable) else centers


def run(problem, *, mode="eager", holder="tf.Variable", upstream=None, jit=None, **options):
    """One call of center_loss on a problem; mode: eager, function or unknown (batch size)."""
    centers = make_variable(problem.centers, holder)
    options = dict(
        sample_weight=problem.sample_weight, ignore_class=problem.ignore_class, **options
    )

    def step(features, labels):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(features, labels, centers, **options)
        up = None if upstream is None else tf.constant(upstream, loss.dtype)
        return loss, tape.gradient(loss, features, up)

    features, labels = tf.constant(problem.features), tf.constant(problem.labels)
    if mode == "unknown":
        unknown = [None] * problem.ids.ndim
        ids_given = labels.shape.rank < features.shape.rank
        signature = [
            tf.TensorSpec([*unknown, features.shape[-1]], features.dtype),
            tf.TensorSpec(unknown if ids_given else [*unknown, labels.shape[-1]], labels.dtype),
        ]
        step = tf.function(step, input_signature=signature, jit_compile=jit)
    elif mode == "function":
        step = tf.function(step, jit_compile=jit)
    loss, gradient = step(features, labels)
    return Outcome(
        wide(loss),
        wide(gradient),
        wide(table_of(centers)),
        loss.dtype.name,
        gradient.dtype.name,
    )


def check(problem, outcome, *, dtype, upstream=None, update_centers=True, **options):
    """Compares an outcome with the oracle; the tolerance is plain TensorFlow's error."""
    up = 1.0 if upstream is None else upstream
    alpha, rule = options.pop("alpha", 0.5), options.pop("rule", "paper")
    weighed = dict(
        sample_weight=problem.sample_weight, ignore_class=problem.ignore_class, **options
    )
    truth = oracle.center_loss(
        problem.features,
        problem.ids,
        problem.centers,
        alpha=alpha,
        rule=rule,
        upstream=up,
        **weighed,
    )
    features, centers = tf.constant(problem.features), tf.constant(problem.centers)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = plain.loss(features, tf.constant(problem.ids), centers, **weighed)
    up = tf.broadcast_to(tf.constant(up, loss.dtype), tf.shape(loss))
    gradient = tape.gradient(loss, features, up)

    step = dict(alpha=alpha, rule=rule, ignore_class=problem.ignore_class)
    table_dtype = problem.centers.dtype.name
    assert outcome.loss_dtype == table_dtype
    assert outcome.gradient_dtype == dtype
    terms = problem.ids.size if loss.shape.rank == 0 else 1
    assert_near_oracle(outcome.loss, wide(loss), truth.loss, table_dtype, "loss", terms)
    assert_near_oracle(
        outcome.feature_gradient, wide(gradient), truth.feature_gradient, dtype, "gradient"
    )
    if update_centers:
        moved = [
            wide(formula(features, tf.constant(problem.ids), centers, **step))
            for formula in (plain.moved_centers, plain.centers_moved_by_sums)
        ]
        moved = max(moved, key=lambda table: np.abs(table - truth.centers).max())
        assert_near_oracle(outcome.centers, moved, truth.centers, table_dtype, "centers")
        untouched = np.all(truth.centers == problem.centers, axis=1)
        assert np.array_equal(outcome.centers[untouched], problem.centers[untouched])
    else:
        assert np.array_equal(outcome.centers, problem.centers)
