"""First derivatives equal numerical ones, with upstream gradients and with tapes in every place."""

import numpy as np
import pytest
import tensorflow as tf

import plain
import tf_center_loss_op as tcl
from tolerances import FINITE_DIFFERENCES

LABELS = [2, 0, 2, 1, 2, 0]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def features():
    return tf.random.normal([6, 5], dtype=tf.float64)


@pytest.fixture
def centers():
    return tf.Variable(tf.random.normal([4, 5], dtype=tf.float64), name="centers")


# alpha = 0 with update_centers=True is the training path, and no center moves between differences.
@pytest.mark.parametrize("options", [dict(update_centers=False), dict(alpha=0.0)], ids=str)
@pytest.mark.parametrize("ignore", [None, 0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0, 2.0, 3.0, 1.0]], ids=["w1", "w"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_feature_gradient_is_the_numerical_one(
    impl, features, centers, reduction, weights, ignore, options
):
    def loss(x):
        return tcl.center_loss(
            x,
            LABELS,
            centers,
            reduction=reduction,
            sample_weight=weights,
            ignore_class=ignore,
            impl=impl,
            **options,
        )

    theoretical, numerical = tf.test.compute_gradient(loss, [features])
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=FINITE_DIFFERENCES)


def test_numerical_gradient_of_rank_three(impl, centers):
    def loss(x):
        labels = [[0, 1, 2], [3, 3, 0]]
        return tcl.center_loss(
            x, labels, centers, reduction="none", update_centers=False, impl=impl
        )

    features = tf.random.normal([2, 3, 5], dtype=tf.float64)
    theoretical, numerical = tf.test.compute_gradient(loss, [features])
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=FINITE_DIFFERENCES)


def test_numerical_gradient_in_float32(impl):
    centers = tf.Variable(tf.random.normal([4, 5]))

    def loss(x):
        return tcl.center_loss(x, LABELS, centers, update_centers=False, impl=impl)

    theoretical, numerical = tf.test.compute_gradient(loss, [tf.random.normal([6, 5])])
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=2e-3)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_upstream_gradient_is_applied(impl, features, centers, reduction, update):
    # A nonlinear function of the loss: the upstream gradient is neither 1 nor constant.
    before = tf.constant(centers)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        loss = tcl.center_loss(
            features, LABELS, centers, reduction=reduction, update_centers=update, impl=impl
        )
        value = tf.reduce_sum(tf.sin(loss))
        expected = tf.reduce_sum(
            tf.sin(plain.loss(features, tf.constant(LABELS), before, reduction=reduction))
        )
    np.testing.assert_allclose(
        tape.gradient(value, features), tape.gradient(expected, features), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("upstream", [[1.0, 3.0], [1.0, 1.0], [2.0, 2.0]], ids=str)
@pytest.mark.parametrize("update", [True, False])
def test_an_upstream_gradient_that_tracing_knows(impl, update, upstream):
    centers = tf.Variable(tf.zeros([2, 2]))

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tcl.center_loss(
                x, [0, 1], centers, reduction="none", update_centers=update, impl=impl
            )
        return tape.gradient(loss, x, tf.constant(upstream))

    x = tf.constant([[1.0, 2.0], [4.0, 5.0]])
    np.testing.assert_allclose(gradient(x), x.numpy() * np.array(upstream)[:, np.newaxis])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_loss_scaling_reaches_half_precision_gradients(impl, dtype):
    # A loss-scaling optimizer does this: 1/3 and 1/7 of a small residual would round to zero.
    features = tf.constant([[2.0**-10, 0.0], [0.0, 2.0**-9]], dtype)
    centers = tf.Variable(tf.zeros([2, 2]))
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = 1024 * tcl.center_loss(features, [0, 1], centers, reduction="sum", impl=impl)
    gradient = tape.gradient(loss, features)
    assert gradient.dtype == dtype
    assert tf.cast(gradient, tf.float32).numpy().tolist() == [[1.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("update", [True, False])
def test_persistent_tape_gives_the_same_twice(impl, features, centers, update):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, LABELS, centers, update_centers=update, impl=impl)
    moved = centers.numpy()
    first, second = tape.gradient(loss, features), tape.gradient(loss, features)
    assert np.array_equal(first, second)
    tripled = tape.gradient(loss, features, tf.constant(3.0, tf.float64))
    np.testing.assert_allclose(tripled, 3 * first, rtol=1e-12)
    # A gradient moves no center.
    assert np.array_equal(centers.numpy(), moved)


@pytest.mark.parametrize("place", ["tape in function", "tape around function", "tf.gradients"])
def test_tapes_and_functions_nest_in_any_order(impl, features, centers, place):
    before = tf.constant(centers)
    labels = tf.constant(LABELS)

    def loss(x):
        return tcl.center_loss(x, labels, centers, impl=impl)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.function(loss)(x) if place == "tape around function" else loss(x)
        return tape.gradient(value, x)

    if place == "tape in function":
        result = tf.function(gradient)(features)
    elif place == "tf.gradients":
        result = tf.function(lambda x: tf.gradients(loss(x), x)[0])(features)
    else:
        result = gradient(features)
    residual = features - tf.gather(before, labels)
    np.testing.assert_allclose(result, residual / 6, rtol=1e-12)
    moved = plain.moved_centers(features, labels, before)
    np.testing.assert_allclose(centers.numpy(), moved, rtol=1e-12)


def test_gradient_uses_the_centers_before_the_step_even_if_they_move_again(impl, features, centers):
    residual = features - tf.gather(centers, LABELS)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, LABELS, centers, reduction="sum", impl=impl)
        tcl.update_centers(features, LABELS, centers, impl=impl)
    centers.assign(tf.zeros_like(centers))
    np.testing.assert_allclose(tape.gradient(loss, features), residual, rtol=1e-12)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_not_overwritten_by_later_steps(impl, reduction, traced):
    # Results of a step are kept while later steps run; some gradients are computed only then.
    centers = tf.Variable(tf.random.normal([4, 5], dtype=tf.float64), name="centers")

    def call(x):
        return tcl.center_loss(x, LABELS, centers, reduction=reduction, impl=impl)

    step = tf.function(call) if traced else call
    batches = [tf.random.normal([6, 5], dtype=tf.float64) for _ in range(4)]
    tapes, losses, residuals = [], [], []
    for x in batches:
        residuals.append(x - tf.gather(centers, LABELS))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            losses.append(step(x))
        tapes.append(tape)
        early = tape.gradient(losses[-1], x)
        views = (early, np.asarray(memoryview(early)))
        residuals[-1] = residuals[-1] / (6 if reduction == "mean" else 1), *views
    for x, tape, loss, (expected, early, view) in zip(
        batches, tapes, losses, residuals, strict=True
    ):
        for gradient in (early, view, tape.gradient(loss, x)):
            np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_to_moving_centers_and_to_weights(impl, features, centers, reduction):
    for update in (True, False):
        weights = tf.ones([6], tf.float64)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([features, weights])
            loss = tcl.center_loss(
                features,
                LABELS,
                centers,
                sample_weight=weights,
                reduction=reduction,
                update_centers=update,
                impl=impl,
            )
        assert tape.gradient(loss, weights) is None
        if update:
            assert tape.gradient(loss, centers) is None


def test_gradient_flows_through_what_made_the_features(impl, centers):
    kernel = tf.Variable(tf.random.normal([3, 5], dtype=tf.float64))
    inputs = tf.random.normal([6, 3], dtype=tf.float64)
    residual = inputs @ kernel - tf.gather(centers, LABELS)
    with tf.GradientTape() as tape:
        loss = tcl.center_loss(inputs @ kernel, LABELS, centers, reduction="sum", impl=impl)
    expected = tf.transpose(inputs) @ residual
    np.testing.assert_allclose(tape.gradient(loss, kernel), expected, rtol=1e-9, atol=1e-12)


def test_gradient_of_an_empty_batch(impl, centers):
    features = tf.zeros([0, 5], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, tf.zeros([0], tf.int32), centers, impl=impl)
    assert tape.gradient(loss, features).shape == [0, 5]
