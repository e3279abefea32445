"""Centers trained by an optimizer: update_centers=False and the gradient as IndexedSlices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import problems
import tf_center_loss_op as tcl
from tolerances import assert_close

SHAPE = problems.Shape((40,), 6, 9, "uniform", "several samples a class")


def gradient_of(impl, problem, centers, upstream=None, reduction="mean"):
    table = centers.value if isinstance(centers, keras.Variable) else centers
    with tf.GradientTape() as tape:
        tape.watch(table)
        loss = tcl.center_loss(
            problem.features,
            problem.labels,
            centers,
            sample_weight=problem.sample_weight,
            ignore_class=problem.ignore_class,
            reduction=reduction,
            update_centers=False,
            impl=impl,
        )
    return tape.gradient(loss, table, upstream)


@pytest.mark.parametrize("ignore", [None, "outside", "class"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_equals_the_oracle(impl, reduction, dtype, ignore):
    problem = problems.make(SHAPE, dtype, weights=True, ignore=ignore)
    centers = tf.Variable(problem.centers)
    upstream = problem.upstream if reduction == "none" else problem.centers.dtype.type(1.7)
    gradient = gradient_of(impl, problem, centers, tf.constant(upstream), reduction)
    assert isinstance(gradient, tf.IndexedSlices)
    assert gradient.dtype == centers.dtype
    truth = oracle.center_loss(
        problem.features,
        problem.ids,
        problem.centers,
        sample_weight=problem.sample_weight,
        ignore_class=problem.ignore_class,
        reduction=reduction,
        upstream=upstream,
    )
    # Ignored labels such as -1 must not be among the rows to update.
    assert (gradient.indices.numpy() >= 0).all() and (gradient.indices.numpy() < 9).all()
    # Half-precision residuals are exact in the centers' dtype; only sums of them round.
    dense = tf.convert_to_tensor(gradient).numpy()
    assert dense.shape == (9, 6)
    assert_close(dense, truth.centers_gradient, problem.centers.dtype.name, "centers' gradient")
    assert np.array_equal(centers.numpy(), problem.centers)


def test_the_size_of_the_gradient_does_not_depend_on_the_classes(impl):
    problem = problems.make(SHAPE._replace(classes=20_000))
    gradient = gradient_of(impl, problem, tf.Variable(problem.centers))
    assert gradient.values.shape[0] <= 40
    assert tf.convert_to_tensor(gradient.dense_shape).numpy().tolist() == [20_000, 6]


def test_a_variable_that_is_not_trainable_can_be_watched(impl):
    problem = problems.make(SHAPE)
    centers = tf.Variable(problem.centers, trainable=False)
    assert isinstance(gradient_of(impl, problem, centers), tf.IndexedSlices)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("ignore", [None, "outside", "class"])
def test_plain_descent_is_rule_sum(impl, ignore, traced):
    problem = problems.make(SHAPE, ignore=ignore)
    centers = tf.Variable(problem.centers)

    def step():
        gradient = gradient_of(impl, problem, centers, reduction="sum")
        centers.scatter_sub(tf.IndexedSlices(0.25 * gradient.values, gradient.indices))

    (tf.function(step) if traced else step)()
    # Rule "sum" is the same step.
    truth = oracle.center_loss(
        problem.features,
        problem.ids,
        problem.centers,
        alpha=0.25,
        rule="sum",
        ignore_class=problem.ignore_class,
    )
    assert_close(centers.numpy(), truth.centers, "float32", "centers")


# Distinct labels: Keras's Adam applies several slices of a row separately (as with the gradient of
# tf.gather), so the result for duplicates is not defined.
@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam])
@pytest.mark.parametrize("ignore", [None, "outside", "class"])
def test_keras_optimizers_apply_it_as_they_apply_gathers(impl, kind, ignore):
    problem = problems.make(problems.Shape((7,), 6, 9, "distinct", "no duplicates"), ignore=ignore)
    centers = keras.Variable(problem.centers, dtype="float32")
    gradient = gradient_of(impl, problem, centers, reduction="sum")
    truth = oracle.center_loss(
        problem.features,
        problem.ids,
        problem.centers,
        reduction="sum",
        ignore_class=problem.ignore_class,
    ).centers_gradient
    kind(0.25).apply([gradient], [centers])
    moved = keras.ops.convert_to_numpy(centers) - problem.centers
    if kind is keras.optimizers.SGD:
        np.testing.assert_allclose(moved, -0.25 * truth, rtol=1e-4, atol=1e-5)
    else:  # Adam's first step goes against the sign, a learning rate long.
        np.testing.assert_allclose(moved, -0.25 * np.sign(truth), atol=1e-3)


def test_training_the_centers_brings_them_to_the_class_means(impl):
    problem = problems.make(SHAPE)
    centers = keras.Variable(problem.centers, dtype="float32")
    optimizer = keras.optimizers.SGD(0.05)

    @tf.function
    def step():
        gradient = gradient_of(impl, problem, centers, reduction="sum")
        optimizer.apply([gradient], [centers])

    optimizer.build([centers])
    for _ in range(300):
        step()
    means = [problem.features[problem.ids == j].mean(axis=0) for j in range(9)]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(centers), means, atol=1e-3)
