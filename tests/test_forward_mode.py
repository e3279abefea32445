"""Forward-mode derivatives, alone and around or inside other modes: those of plain TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

LABELS = [0, 1, 1, 4]
TYPES = {"float32": "float32", "float64": "float64", "float16": "float32"}


class Problem:
    """Four samples, five classes, and a direction for features and centers."""

    def __init__(self, dtype, impl, **options):
        rng = np.random.default_rng(0)
        self.features = tf.constant(rng.normal(size=(4, 3)).astype(dtype))
        self.direction = tf.constant(rng.normal(size=(4, 3)).astype(dtype))
        self.centers = tf.Variable(rng.normal(size=(5, 3)).astype(TYPES[dtype]))
        self.centers_direction = tf.constant(rng.normal(size=(5, 3)).astype(TYPES[dtype]))
        self.options = dict(impl=impl) | options

    def loss(self, features=None):
        features = self.features if features is None else features
        return tcl.center_loss(features, LABELS, self.centers, **self.options)

    def along(self):
        return tf.autodiff.ForwardAccumulator(self.features, self.direction)


def jvp(p):
    with p.along() as accumulator:
        loss = p.loss()
    return [accumulator.jvp(loss)]


def hessian_times_vector(p):
    with p.along() as accumulator:
        with tf.GradientTape() as tape:
            tape.watch(p.features)
            loss = tf.reduce_sum(p.loss() ** 2)
        gradient = tape.gradient(loss, p.features)
    return [accumulator.jvp(gradient)]


def along_features_and_centers(p):
    primals, tangents = [p.features, p.centers], [p.direction, p.centers_direction]
    with tf.autodiff.ForwardAccumulator(primals, tangents) as accumulator:
        with tf.GradientTape() as tape:
            tape.watch(p.features)
            loss = p.loss()
            total = tf.reduce_sum(loss**2)
        gradients = tape.gradient(total, [p.features, p.centers])
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    return [accumulator.jvp(value) for value in [loss, *gradients]]


def forward_over_forward(p):
    with p.along() as outer:
        with p.along() as inner:
            loss = p.loss()
        tangent = inner.jvp(loss)
    return [outer.jvp(tangent)]


def reverse_over_forward(p):
    with tf.GradientTape() as tape:
        tape.watch(p.features)
        with p.along() as accumulator:
            loss = p.loss()
        tangent = tf.reduce_sum(accumulator.jvp(loss))
    return [tf.convert_to_tensor(g) for g in tape.gradient(tangent, [p.features, p.centers])]


READ_ONLY = [
    jvp,
    hessian_times_vector,
    along_features_and_centers,
    forward_over_forward,
    reverse_over_forward,
]
OPTIONS = {
    "mean": {},
    "sum": dict(reduction="sum", sample_weight=[1.0, 2.0, 0.5, 3.0]),
    "none": dict(reduction="none", ignore_class=1),
    "everything": dict(ignore_class=4, sample_weight=[1.0, 2.0, 0.5, 3.0]),
}


def check(function, dtype, traced, options):
    results = []
    for impl in ("native", "graph"):
        problem = Problem(dtype, impl, **options)
        run = tf.function(function, autograph=False) if traced else function
        values = [tf.convert_to_tensor(value).numpy() for value in run(problem)]
        results.append([value.astype("float64") for value in values])
    tolerance = 1e-2 if dtype == "float16" else 1e-5
    for mine, plain in zip(*results, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(mine, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.native
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("function", READ_ONLY, ids=lambda function: function.__name__)
def test_the_read_only_form(function, dtype, options, traced):
    check(function, dtype, traced, OPTIONS[options] | dict(update_centers=False))


@pytest.mark.native
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "function", [jvp, hessian_times_vector, forward_over_forward], ids=lambda f: f.__name__
)
def test_the_form_that_moves_the_centers(function, options, traced):
    check(function, "float32", traced, OPTIONS[options] | dict(alpha=0.0))


@pytest.mark.parametrize("update_centers", [False, True])
def test_by_hand(impl, update_centers):
    p = Problem("float64", impl, update_centers=update_centers)
    residual = p.features - tf.gather(p.centers, LABELS)
    expected = tf.reduce_sum(residual * p.direction) / 4
    np.testing.assert_allclose(jvp(p)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("update_centers", [False, True])
def test_around_a_function(impl, update_centers):
    p = Problem("float32", impl, update_centers=update_centers, alpha=0.0)
    function = tf.function(p.loss)
    function(p.features)
    with p.along() as accumulator:
        loss = function(p.features)
    np.testing.assert_allclose(accumulator.jvp(loss), jvp(p)[0], rtol=1e-5)


@pytest.mark.parametrize("ignored", [-1, 2**31 - 1])
def test_an_ignored_label_that_is_no_row_of_the_table(impl, ignored):
    x, centers = tf.constant([[3.0], [5.0]]), tf.Variable([[1.0], [0.0]])
    with tf.autodiff.ForwardAccumulator(x, tf.constant([[1.0], [10.0]])) as forward:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tcl.center_loss(
                x,
                [0, ignored],
                centers,
                reduction="sum",
                ignore_class=ignored,
                update_centers=False,
                impl=impl,
            )
        gradient = tape.gradient(loss, x)
    assert forward.jvp(loss) == 2
    assert forward.jvp(gradient).numpy().tolist() == [[1], [0]]
