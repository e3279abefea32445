"""Examples small enough to check by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

# Two classes in the plane. Class 0 sits at (0, 0) and gets two samples, class 1 sits at (10, 10)
# and gets one:
#   x0 = (2, 4)    d0 = (2, 4)    half of |d0|^2 = 10
#   x1 = (4, 8)    d1 = (4, 8)    half of |d1|^2 = 40
#   x2 = (10, 16)  d2 = (0, 6)    half of |d2|^2 = 18
# The residuals of class 0 sum to (6, 12), those of class 1 to (0, 6). N = 3.
FEATURES = [[2.0, 4.0], [4.0, 8.0], [10.0, 16.0]]
LABELS = [0, 0, 1]
CENTERS = [[0.0, 0.0], [10.0, 10.0]]
RESIDUALS = np.array([[2.0, 4.0], [4.0, 8.0], [0.0, 6.0]])

MOVED = {
    # alpha = 1/2: class 0 by 1/2 / (1+2) = 1/6 of (6, 12), class 1 by 1/2 / (1+1) = 1/4 of (0, 6).
    "paper": [[1.0, 2.0], [10.0, 11.5]],
    # 1/2 / 2 = 1/4 and 1/2 / 1 = 1/2.
    "mean": [[1.5, 3.0], [10.0, 13.0]],
    # 1/2 of the sums.
    "sum": [[3.0, 6.0], [10.0, 13.0]],
    # 1/2 / 3 = 1/6 of the sums.
    "batch_mean": [[1.0, 2.0], [10.0, 11.0]],
    # 1/2 / (3 * 3) = 1/18 and 1/2 / (2 * 3) = 1/12.
    "paper_batch_mean": [[1 / 3, 2 / 3], [10.0, 10.5]],
    # 1/2 * 1/2 / 3 = 1/12 and 1/4 / 2 = 1/8.
    "tutorial": [[0.5, 1.0], [10.0, 10.75]],
}


@pytest.fixture(params=["eager", "function"])
def call(request, impl):
    """center_loss in eager mode and traced."""

    def center_loss(*args, **kwargs):
        def step():
            return tcl.center_loss(*args, impl=impl, **kwargs)

        return (tf.function(step) if request.param == "function" else step)()

    return center_loss


@pytest.mark.parametrize("rule", MOVED)
def test_rules(call, rule):
    centers = tf.Variable(CENTERS)
    loss = call(FEATURES, LABELS, centers, alpha=0.5, rule=rule, reduction="sum")
    assert loss.numpy() == 68.0
    np.testing.assert_allclose(centers.numpy(), MOVED[rule], rtol=1e-6)


def test_defaults_are_alpha_one_half_paper_and_mean(call):
    centers = tf.Variable(CENTERS)
    loss = call(FEATURES, LABELS, centers)
    np.testing.assert_allclose(loss, 68 / 3, rtol=1e-6)
    np.testing.assert_allclose(centers.numpy(), MOVED["paper"], rtol=1e-6)


@pytest.mark.parametrize(
    "reduction, expected", [("sum", 68.0), ("mean", 68 / 3), ("none", [10.0, 40.0, 18.0])]
)
def test_reductions(call, reduction, expected):
    loss = call(FEATURES, LABELS, tf.Variable(CENTERS), reduction=reduction)
    assert loss.dtype == tf.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("reduction, factor", [("sum", 1), ("mean", 1 / 3), ("none", 1)])
def test_gradient_is_the_residual(impl, reduction, factor):
    features, centers = tf.constant(FEATURES), tf.Variable(CENTERS)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, LABELS, centers, reduction=reduction, impl=impl)
    np.testing.assert_allclose(tape.gradient(loss, features), RESIDUALS * factor, rtol=1e-6)


def test_sample_weight_scales_loss_and_gradient_but_no_step(impl):
    features, centers = tf.constant(FEATURES), tf.Variable(CENTERS)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(
            features, LABELS, centers, sample_weight=[1.0, 0.0, 2.0], reduction="mean", impl=impl
        )
    # 10 * 1 + 40 * 0 + 18 * 2 = 46, over the three samples: weights are not counted.
    np.testing.assert_allclose(loss, 46 / 3, rtol=1e-6)
    weighed = RESIDUALS * [[1], [0], [2]] / 3
    np.testing.assert_allclose(tape.gradient(loss, features), weighed, rtol=1e-6)
    np.testing.assert_allclose(centers.numpy(), MOVED["paper"], rtol=1e-6)


@pytest.mark.parametrize("ignored", [-1, 7, -(2**31)])
def test_ignored_samples_count_nowhere(impl, ignored):
    features, centers = tf.constant(FEATURES), tf.Variable(CENTERS)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(
            features, [0, ignored, 1], centers, ignore_class=ignored, impl=impl, reduction="mean"
        )
    # N = 2, and class 0 has one member: half of (2, 4) over 1 + 1.
    np.testing.assert_allclose(loss, 28 / 2, rtol=1e-6)
    gradient = tape.gradient(loss, features)
    np.testing.assert_allclose(gradient, [[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(centers.numpy(), [[0.5, 1.0], [10.0, 11.5]], rtol=1e-6)


def test_an_ignored_class_keeps_its_center(impl):
    centers = tf.Variable(CENTERS)
    loss = tcl.center_loss(FEATURES, LABELS, centers, ignore_class=0, reduction="none", impl=impl)
    assert loss.numpy().tolist() == [0.0, 0.0, 18.0]
    np.testing.assert_allclose(centers.numpy(), [[0.0, 0.0], [10.0, 11.5]], rtol=1e-6)


@pytest.mark.parametrize("reduction, expected", [("mean", 0.0), ("sum", 0.0), ("none", [0.0] * 3)])
def test_all_samples_ignored(impl, reduction, expected):
    features, centers = tf.constant(FEATURES), tf.Variable(CENTERS)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(
            features, [5, 5, 5], centers, ignore_class=5, reduction=reduction, impl=impl
        )
    assert loss.numpy().tolist() == expected
    assert not tape.gradient(loss, features).numpy().any()
    assert centers.numpy().tolist() == CENTERS


@pytest.mark.parametrize("rule", MOVED)
@pytest.mark.parametrize("reduction, expected", [("mean", 0.0), ("sum", 0.0), ("none", [])])
def test_empty_batch(call, rule, reduction, expected):
    centers = tf.Variable(CENTERS)
    features, labels = tf.zeros([0, 2]), tf.zeros([0], tf.int64)
    loss = call(features, labels, centers, rule=rule, reduction=reduction)
    assert loss.numpy().tolist() == expected
    assert centers.numpy().tolist() == CENTERS


def test_one_hot_and_probability_rows(impl):
    for rows in ([[1, 0], [1, 0], [0, 1]], [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]):
        centers = tf.Variable(CENTERS)
        loss = tcl.center_loss(FEATURES, rows, centers, reduction="sum", impl=impl)
        assert loss.numpy() == 68.0
        np.testing.assert_allclose(centers.numpy(), MOVED["paper"], rtol=1e-6)


def test_the_first_of_equal_maxima_is_the_label(impl):
    loss = tcl.center_loss(
        [[2.0, 4.0]], [[0.5, 0.5]], tf.Variable(CENTERS), reduction="none", impl=impl
    )
    assert loss.numpy().tolist() == [10.0]


def test_features_of_rank_three(impl):
    # The same three samples, and one that is ignored, as a [2, 2, 2] block.
    features = [[FEATURES[0], FEATURES[1]], [FEATURES[2], [99.0, 99.0]]]
    centers = tf.Variable(CENTERS)
    loss = tcl.center_loss(
        features, [[0, 0], [1, -1]], centers, ignore_class=-1, reduction="none", impl=impl
    )
    assert loss.numpy().tolist() == [[10.0, 40.0], [18.0, 0.0]]
    np.testing.assert_allclose(centers.numpy(), MOVED["paper"], rtol=1e-6)


def test_without_update_nothing_moves(call):
    centers = tf.Variable(CENTERS)
    loss = call(FEATURES, LABELS, centers, reduction="sum", update_centers=False)
    assert loss.numpy() == 68.0
    assert centers.numpy().tolist() == CENTERS


@pytest.mark.parametrize("rule", MOVED)
def test_update_centers_moves_the_same_way(impl, rule):
    centers = tf.Variable(CENTERS)
    tcl.update_centers(FEATURES, LABELS, centers, alpha=0.5, rule=rule, impl=impl)
    np.testing.assert_allclose(centers.numpy(), MOVED[rule], rtol=1e-6)


def test_update_centers_ignores(impl):
    centers = tf.Variable(CENTERS)
    tcl.update_centers(FEATURES, [0, -1, 1], centers, ignore_class=-1, impl=impl)
    np.testing.assert_allclose(centers.numpy(), [[0.5, 1.0], [10.0, 11.5]], rtol=1e-6)


def test_the_tutorials_default_alpha_never_moves_a_center(impl):
    for alpha in (0.0, 1.0):
        centers = tf.Variable(CENTERS)
        tcl.update_centers(FEATURES, LABELS, centers, alpha=alpha, rule="tutorial", impl=impl)
        assert centers.numpy().tolist() == CENTERS


@pytest.mark.parametrize(
    "alpha",
    [
        lambda: 0.5,
        lambda: np.float32(0.5),
        lambda: np.float64(0.5),
        lambda: tf.constant(0.5),
        lambda: tf.constant(0.5, tf.float64),
        lambda: tf.Variable(0.5),
        lambda: tf.Variable(0.5, dtype=tf.float64),
        lambda: keras.Variable(0.5),
    ],
    ids=["float", "f32", "f64", "tensor", "tensor64", "variable", "variable64", "keras"],
)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_kinds_of_alpha(impl, alpha, dtype):
    centers = tf.Variable(CENTERS, dtype=dtype)
    tcl.center_loss(tf.constant(FEATURES, dtype), LABELS, centers, alpha=alpha(), impl=impl)
    np.testing.assert_allclose(centers.numpy(), MOVED["paper"], rtol=1e-6)


def test_alpha_may_be_an_integer_or_pass_one(impl):
    for alpha, moved in ((1, [[3.0, 6.0], [10.0, 16.0]]), (2, [[6.0, 12.0], [10.0, 22.0]])):
        centers = tf.Variable(CENTERS)
        tcl.update_centers(FEATURES, LABELS, centers, alpha=alpha, rule="mean", impl=impl)
        np.testing.assert_allclose(centers.numpy(), moved, rtol=1e-6)


@pytest.mark.parametrize("make", [float, np.float64, lambda a: tf.constant(a, tf.float64)])
def test_float64_centers_keep_alpha_in_float64(impl, make):
    # float32(0.1) is off by 1.5e-9.
    centers = tf.Variable([[0.0]], dtype=tf.float64)
    one = tf.constant([[1.0]], tf.float64)
    tcl.center_loss(one, [0], centers, alpha=make(0.1), rule="sum", impl=impl)
    assert abs(centers.numpy()[0, 0] - 0.1) < 1e-16


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_features_round_once(impl, dtype):
    # 2049 samples of 1 for one class: a float16 or bfloat16 sum would stop at 2048 or at 256.
    centers = tf.Variable([[0.0]])
    features = tf.ones([2049, 1], dtype)
    loss = tcl.center_loss(
        features, tf.zeros([2049], tf.int32), centers, rule="sum", reduction="sum", impl=impl
    )
    assert loss.dtype == tf.float32
    assert loss.numpy() == 2049 / 2
    assert centers.numpy().tolist() == [[2049 / 2]]


def test_numpy_inputs(impl):
    centers = tf.Variable(CENTERS)
    loss = tcl.center_loss(
        np.array(FEATURES, np.float32), np.array(LABELS), centers, reduction="sum", impl=impl
    )
    assert loss.numpy() == 68.0


def test_the_name_is_accepted(impl):
    loss = tcl.center_loss(
        FEATURES, LABELS, tf.Variable(CENTERS), reduction="sum", impl=impl, name="documents"
    )
    assert loss.numpy() == 68.0


@pytest.mark.parametrize("kind", ["number", "tensor", "variable"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_alpha_keeps_the_precision_of_float64_centers(impl, traced, kind):
    # 0.1 is no float32: the fused op has attributes of this type.
    make = tf.Variable if kind == "variable" else tf.constant
    alpha = 0.1 if kind == "number" else make(0.1, dtype=tf.float64)
    centers = tf.Variable(tf.zeros([1, 1], tf.float64))

    def call():
        tcl.center_loss(
            tf.ones([1, 1], tf.float64), [0], centers, alpha=alpha, rule="sum", impl=impl
        )

    (tf.function(call) if traced else call)()
    assert centers.numpy()[0, 0] == 0.1
