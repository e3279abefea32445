"""The gradient of the gradient, against plain TensorFlow and against finite differences."""

import numpy as np
import pytest
import tensorflow as tf

import plain
import tf_center_loss_op as tcl
from tolerances import FINITE_DIFFERENCES

LABELS = tf.constant([2, 0, 2, 1, 2, 0])
WEIGHTS = tf.constant([1.0, 0.5, 0.0, 2.0, 3.0, 1.0], tf.float64)
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def features():
    return tf.random.normal([6, 5], dtype=tf.float64)


@pytest.fixture
def centers():
    return tf.Variable(tf.random.normal([4, 5], dtype=tf.float64), name="centers")


def dense(gradient):
    """A gradient, dense or IndexedSlices, as a NumPy array."""
    return tf.convert_to_tensor(gradient).numpy()


def penalty(loss_function, features, watched):
    """A gradient penalty: first and second derivative, and a nonlinear upstream, in one number."""
    with tf.GradientTape() as inner:
        inner.watch(watched)
        loss = tf.reduce_sum(tf.square(loss_function(features)))
    gradients = inner.gradient(loss, watched)
    return loss + sum(tf.reduce_sum(tf.convert_to_tensor(g) ** 3) for g in gradients)


@pytest.mark.parametrize("options", [dict(update_centers=False), dict(alpha=0.0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_features_against_finite_differences(impl, features, centers, reduction, options):
    def value(x):
        def loss(x):
            return tcl.center_loss(
                x,
                LABELS,
                centers,
                reduction=reduction,
                sample_weight=WEIGHTS,
                ignore_class=1,
                impl=impl,
                **options,
            )

        # The scale keeps the third derivative small, so that differences are within the tolerance.
        return penalty(loss, x, [x]) * 1e-4

    theoretical, numerical = tf.test.compute_gradient(value, [0.1 * features], delta=1e-5)
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("ignore", [None, 0])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_features_and_centers_against_plain_tensorflow(
    impl, features, centers, reduction, traced, ignore
):
    def ours(x):
        return tcl.center_loss(
            x,
            LABELS,
            centers,
            reduction=reduction,
            sample_weight=WEIGHTS,
            ignore_class=ignore,
            update_centers=False,
            impl=impl,
        )

    def theirs(x):
        return plain.loss(
            x,
            LABELS,
            centers,
            reduction=reduction,
            sample_weight=WEIGHTS,
            ignore_class=ignore,
        )

    def derivatives(loss_function):
        def compute(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                value = penalty(loss_function, x, [x, centers])
            return [tf.convert_to_tensor(g) for g in outer.gradient(value, [x, centers])]

        return (tf.function(compute) if traced else compute)(features)

    for actual, expected in zip(derivatives(ours), derivatives(theirs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_centers_against_finite_differences(impl, features, centers, reduction):
    def loss(x):
        return tcl.center_loss(
            x, LABELS, centers, reduction=reduction, update_centers=False, impl=impl
        )

    def value():
        return penalty(loss, features, [features, centers])

    with tf.GradientTape() as outer:
        result = value()
    gradient = dense(outer.gradient(result, centers))
    for j, d in ((0, 0), (1, 3), (2, 4), (3, 2)):
        step = np.zeros([4, 5])
        step[j, d] = 1e-5
        centers.assign_add(step)
        above = value()
        centers.assign_sub(2 * step)
        below = value()
        centers.assign_add(step)
        np.testing.assert_allclose(gradient[j, d], (above - below) / 2e-5, rtol=1e-6, atol=1e-5)


def test_moving_centers_are_constants_of_the_second_derivative(impl, features, centers):
    # The step runs between the forward and the backward pass and must affect neither.
    before = tf.constant(centers)
    with tf.GradientTape() as outer:
        outer.watch(features)
        value = penalty(
            lambda x: tcl.center_loss(x, LABELS, centers, impl=impl), features, [features]
        )
    with tf.GradientTape() as reference:
        reference.watch(features)
        expected = penalty(lambda x: plain.loss(x, LABELS, before), features, [features])
    np.testing.assert_allclose(
        outer.gradient(value, features), reference.gradient(expected, features), rtol=1e-9
    )
    moved = plain.moved_centers(features, LABELS, before)
    np.testing.assert_allclose(centers.numpy(), moved, rtol=1e-12)


def test_hessian_of_the_sum_is_the_identity(impl, centers):
    features = tf.random.normal([2, 5], dtype=tf.float64)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(features)
        with tf.GradientTape() as inner:
            inner.watch(features)
            loss = tcl.center_loss(features, [1, 1], centers, reduction="sum", impl=impl)
        gradient = inner.gradient(loss, features)
    hessian = outer.jacobian(gradient, features, experimental_use_pfor=False)
    np.testing.assert_allclose(np.reshape(hessian, [10, 10]), np.eye(10), atol=1e-12)


def test_mixed_derivative_of_the_sum_is_minus_one(impl, features, centers):
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(features)
            loss = tcl.center_loss(
                features, LABELS, centers, reduction="sum", update_centers=False, impl=impl
            )
        total = tf.reduce_sum(inner.gradient(loss, features))
    # Each sample takes 1 from every number of its center: classes seen 2, 1, 3 and 0 times.
    gradient = dense(outer.gradient(total, centers))
    np.testing.assert_allclose(gradient, -np.array([[2.0], [1.0], [3.0], [0.0]]) * np.ones(5))


@pytest.mark.parametrize("ignored", [1, -1], ids=["a class", "no class"])
@pytest.mark.parametrize("update", [True, False], ids=["moving", "reading"])
@pytest.mark.parametrize("reduction, factor", [("sum", 1.0), ("mean", 0.5), ("none", 3.0)])
def test_an_ignored_sample_has_no_second_derivative(impl, ignored, update, reduction, factor):
    # The outer gradient is not zero at the ignored sample, whose first gradient is.
    features = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], tf.float64)
    centers = tf.Variable(tf.zeros([2, 2], tf.float64))
    outward = tf.constant([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]], tf.float64)
    upstream = tf.constant([3.0, 3.0, 3.0] if reduction == "none" else 1.0, tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(features)
        with tf.GradientTape() as inner:
            inner.watch(features)
            loss = tcl.center_loss(
                features,
                [0, ignored, 0],
                centers,
                reduction=reduction,
                ignore_class=ignored,
                update_centers=update,
                impl=impl,
            )
        total = tf.reduce_sum(outward * inner.gradient(loss, features, upstream))
    to_features, to_centers = outer.gradient(total, [features, centers])
    expected = np.array([[1, 2], [0, 0], [16, 32]]) * factor
    np.testing.assert_allclose(to_features, expected, rtol=1e-12)
    if not update:
        expected = np.array([[-17, -34], [0, 0]]) * factor
        np.testing.assert_allclose(dense(to_centers), expected, rtol=1e-12)
