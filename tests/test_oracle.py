"""The oracle equals plain TensorFlow and its automatic differentiation in float64."""

import numpy as np
import pytest
import tensorflow as tf

import oracle
import plain
import problems

RULES = ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"]
SMALL = [shape for shape in problems.SHAPES if np.prod(shape.leading) * shape.dim < 3_000]


@pytest.mark.parametrize("ignore", [None, "outside", "class"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_loss_and_gradients(shape, reduction, ignore):
    problem = problems.make(shape, "float64", weights=True, ignore=ignore)
    upstream = problem.upstream if reduction == "none" else np.float64(1.7)
    options = dict(
        reduction=reduction,
        sample_weight=problem.sample_weight,
        ignore_class=problem.ignore_class,
    )
    truth = oracle.center_loss(
        problem.features, problem.labels, problem.centers, upstream=upstream, **options
    )
    features, centers = tf.constant(problem.features), tf.constant(problem.centers)
    with tf.GradientTape() as tape:
        tape.watch([features, centers])
        loss = plain.loss(features, tf.constant(problem.labels), centers, **options)
    gradients = tape.gradient(loss, [features, centers], tf.constant(upstream))
    np.testing.assert_allclose(truth.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(truth.feature_gradient, gradients[0], rtol=1e-12)
    centers_gradient = tf.convert_to_tensor(gradients[1])
    np.testing.assert_allclose(truth.centers_gradient, centers_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ignore", [None, "outside", "class"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_moved_centers(shape, rule, ignore):
    problem = problems.make(shape, "float64", ignore=ignore)
    options = dict(alpha=0.3, rule=rule, ignore_class=problem.ignore_class)
    truth = oracle.center_loss(problem.features, problem.labels, problem.centers, **options)
    moved = plain.moved_centers(
        tf.constant(problem.features), problem.labels, tf.constant(problem.centers), **options
    )
    np.testing.assert_allclose(truth.centers, moved, rtol=1e-12, atol=1e-12)


def test_one_hot_rows_are_reduced_to_their_first_maximum():
    rows = [[0.2, 0.4, 0.4], [1, 0, 0], [0, 0, 3]]
    assert oracle.class_ids(rows, 2).tolist() == [1, 0, 2]
    assert oracle.class_ids([2, 1], 2).tolist() == [2, 1]
