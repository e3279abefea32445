"""The tutorial's function in TensorFlow 1 graphs, beside its formula in plain TensorFlow."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
import tutorial
from child import run_program, run_pytest
from messages import with_words
from tolerances import TRAINING

tf1 = tf.compat.v1
ours = tcl.compat.v1.center_loss
STEPS = 40


@pytest.fixture
def session():
    with tf.Graph().as_default(), tf1.Session() as session:
        yield session


def initialise(session):
    session.run(tf1.global_variables_initializer())


@pytest.mark.parametrize("batch", [tutorial.BATCH, None], ids=["static", "unknown"])
@pytest.mark.parametrize("order", ["control", "collection", "fetch"])
def test_training_beside_the_formula(order, batch):
    actual = tutorial.train(ours, 0.5, order, STEPS, batch)
    # The formula reads before it writes in every order of the ops.
    expected = tutorial.train(tutorial.center_loss, 0.5, order, STEPS, batch)
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for key in b:
            scale = np.abs(b[key]).max()
            np.testing.assert_allclose(
                a[key], b[key], atol=TRAINING * scale, rtol=0, err_msg=f"{key}, step {step}"
            )
    assert actual[-1]["centers"].any()
    assert actual[-1]["total"] < actual[0]["total"]


def test_the_default_alpha_moves_nothing():
    history = tutorial.train(lambda x, y, alpha: ours(x, y), None, "control", 3)
    assert not history[-1]["centers"].any()
    assert history[-1]["loss"] > 0


def test_results_by_hand(session):
    features = tf.constant([[2.0, 4.0], [4.0, 8.0], [0.0, 6.0]])
    label = tf.constant([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    loss, centers, update = ours(features, label, alpha=0.5)
    initialise(session)
    assert session.run(loss) == 68.0
    assert session.run(loss) == 68.0
    # The loss alone moves nothing; the update moves by 1/2 * 1/2 over 1 + count.
    assert not session.run(centers).any()
    assert session.run(update) is None  # an operation, not a copy of the table
    np.testing.assert_allclose(session.run(centers), [[0.5, 1], [0, 0], [0, 0.75]], rtol=1e-6)
    # The step uses the residual of the same run, not of an earlier one.
    session.run(update)
    second = [[0.5 + (6 - 2 * 0.5) / 12, 1 + (12 - 2 * 1) / 12], [0, 0], [0, 0.75 + 5.25 / 8]]
    np.testing.assert_allclose(session.run(centers), second, rtol=1e-6)


def test_loss_and_update_of_one_run_see_the_same_centers(session):
    features = tf.random.normal([64, 8], seed=1)
    label = tf.one_hot(tf.random.uniform([64], 0, 5, tf.int32, seed=2), 5)
    loss, centers, update = ours(features, label, alpha=0.5)
    gradient = tf1.gradients(loss, features)[0]
    with tf.control_dependencies([update]):
        late_loss, late_gradient = tf.identity(loss), tf.identity(gradient)
    initialise(session)
    for _ in range(20):
        before = session.run(centers)
        x, y, values, gradients, _ = session.run(
            [features, label, [loss, late_loss], [gradient, late_gradient], update]
        )
        residual = x - before[y.argmax(1)]
        np.testing.assert_allclose(values, np.square(residual).sum() / 2, rtol=1e-5)
        np.testing.assert_allclose(gradients, [residual] * 2, rtol=1e-5, atol=1e-6)


def test_gradient_made_behind_the_update_uses_the_centers_before_it(session):
    # Under control_dependencies, `minimize` runs all ops of the gradient after the step.
    features = tf.constant([[2.0], [6.0]])
    loss, _, update = ours(features, tf.constant([[1.0, 0.0], [1.0, 0.0]]), alpha=0.5)
    with tf.control_dependencies([update]):
        gradient = tf1.gradients(loss, features)[0]
    initialise(session)
    assert session.run(gradient).tolist() == [[2.0], [6.0]]


@pytest.mark.parametrize("fetched", ["loss", "gradient", "update"])
def test_a_fetched_result_of_center_loss_moves_the_centers(session, impl, fetched):
    # Nothing but the fetched tensor keeps the step in a graph of TensorFlow 1.
    centers = tf.Variable(tf.zeros([2, 2]), trainable=False)
    features = tf.constant([[2.0, 4.0]])
    if fetched == "update":
        result = tcl.update_centers(features, [1], centers, impl=impl)
    else:
        result = tcl.center_loss(features, [1], centers, impl=impl)
    if fetched == "gradient":
        result = tf1.gradients(result, features)[0]
    initialise(session)
    value = session.run(result)
    if fetched == "update":
        assert value is None
    else:
        assert np.array_equal(value, 10 if fetched == "loss" else [[2, 4]])
    assert session.run(centers).tolist() == [[0, 0], [0.5, 1]]


def test_the_variable_is_that_of_the_tutorial(session):
    features, label = tf1.placeholder(tf.float32, [None, 8]), tf1.placeholder(tf.float32, [None, 5])
    _, centers, _ = ours(features, label)
    (variable,) = tf1.global_variables()
    assert variable.op.name == "doc_centers"
    assert variable.shape == (5, 8) and variable.dtype.base_dtype == tf.float32
    assert tf1.trainable_variables() == []
    initialise(session)
    assert not session.run(centers).any()


def test_the_variable_is_reused(session):
    features, label = tf.ones([2, 3]), tf.constant([[1.0, 0.0], [0.0, 1.0]])
    _, _, update = ours(features, label, alpha=0.5)
    with tf1.variable_scope(tf1.get_variable_scope(), reuse=tf1.AUTO_REUSE):
        loss, _, _ = ours(features, label, alpha=0.5)
    with tf1.variable_scope(tf1.get_variable_scope(), reuse=True):
        existing = tf1.get_variable("doc_centers")
    again, _, _ = ours(features, label, alpha=0.5)
    assert [variable.op.name for variable in tf1.global_variables()] == ["doc_centers"]
    initialise(session)
    session.run(update)
    np.testing.assert_allclose(session.run(existing), np.full([2, 3], 0.125))
    assert session.run(loss) == session.run(again) == 6 * 0.875**2 / 2


def test_uninitialised_centers_are_an_error(session):
    loss, _, update = ours(tf.ones([1, 2]), tf.constant([[1.0, 0.0]]), alpha=0.5)
    for fetch in (loss, update):
        with pytest.raises(tf.errors.FailedPreconditionError, match="doc_centers"):
            session.run(fetch)


def test_a_saver_restores_the_centers(session, tmp_path):
    _, centers, update = ours(tf.ones([1, 2]), tf.constant([[1.0, 0.0]]), alpha=0.5)
    saver = tf1.train.Saver()
    initialise(session)
    session.run(update)
    path = saver.save(session, str(tmp_path / "model"))
    saved = session.run(centers)
    session.run(update)
    saver.restore(session, path)
    assert saved.any() and np.array_equal(session.run(centers), saved)


@pytest.mark.parametrize(
    "features, label, words",
    [
        ([2, 3], [3, 5], "features label"),
        ([2, 3], [2], "label"),
        ([2, None], [2, 5], "features"),
        ([2, 3], [2, None], "label"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(session, features, label, words):
    with pytest.raises((ValueError, TypeError), match=with_words(*words.split())):
        ours(tf1.placeholder(tf.float32, features), tf1.placeholder(tf.float32, label), 0.5)


@pytest.mark.parametrize("bad", [-0.5, np.nan, np.inf])
@pytest.mark.parametrize("impl", [pytest.param("native", marks=pytest.mark.native), "graph"])
def test_a_bad_alpha_that_is_fed_is_an_error_of_the_update(session, monkeypatch, impl, bad):
    monkeypatch.setenv("TF_CENTER_LOSS_IMPL", impl)
    alpha = tf1.placeholder(tf.float32, [])
    loss, centers, update = ours(tf.ones([1, 2]), tf.constant([[1.0, 0.0]]), alpha)
    initialise(session)
    with pytest.raises(tf.errors.InvalidArgumentError, match="alpha: expected a finite number"):
        session.run(update, {alpha: bad})
    assert not session.run(centers).any()
    assert session.run(loss) == 1
    session.run(update, {alpha: 0.5})
    assert session.run(centers).tolist() == [[0.125, 0.125], [0, 0]]


def test_with_version_2_behaviour_switched_off(tmp_path):
    run_program("tutorial_without_v2_behavior", cwd=tmp_path)


def test_all_of_this_without_the_native_op():
    # The function has no argument for it; the environment variable has.
    chosen = "not unknown and not without_the_native_op and not switched_off"
    run_pytest(Path(__file__), "--tb=line", "-k", chosen, TF_CENTER_LOSS_IMPL="graph")


def compiled_by(how, step):
    if how == "compile":
        return lambda *inputs: tf.xla.experimental.compile(step, inputs)
    return tf.function(step, jit_compile=True, autograph=False)


@pytest.mark.parametrize("how", ["compile", "function"])
@pytest.mark.parametrize("impl", [pytest.param("native", marks=pytest.mark.native), "graph"])
def test_results_under_xla(session, monkeypatch, how, impl):
    monkeypatch.setenv("TF_CENTER_LOSS_IMPL", impl)
    features = tf.constant([[2.0, 4.0], [4.0, 8.0], [0.0, 6.0]])
    label = tf.constant([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])

    def step(features, label):
        loss, _, update = ours(features, label, alpha=0.5)
        gradient = tf1.gradients(loss, features)[0]
        with tf.control_dependencies([update]):
            return tf.identity(loss), tf.identity(gradient)

    run = compiled_by(how, step)(features, label)
    (centers,) = tf1.global_variables()
    initialise(session)
    loss, gradient = session.run(run)
    assert loss == 68.0
    np.testing.assert_array_equal(gradient, [[2, 4], [4, 8], [0, 6]])
    np.testing.assert_allclose(session.run(centers), [[0.5, 1], [0, 0], [0, 0.75]], rtol=1e-6)
    _, gradient = session.run(run)
    np.testing.assert_allclose(gradient, [[1.5, 3], [3.5, 7], [0, 5.25]], rtol=1e-6)


def test_in_a_compiled_function_of_tensorflow_2():
    @tf.function(jit_compile=True, autograph=False)
    def step(features):
        loss, centers, update = ours(features, tf.one_hot([1], 2), alpha=0.5)
        with tf.control_dependencies([update]):
            return tf.identity(loss), centers.read_value()

    with tf1.variable_scope("in_a_compiled_function"):
        assert step(tf.constant([[2.0, 4.0]]))[0] == 10
        loss, centers = step(tf.constant([[2.0, 4.0]]))
    assert loss == (1.75**2 + 3.5**2) / 2
    np.testing.assert_allclose(centers, [[0, 0], [0.25 + 1.75 / 8, 0.5 + 3.5 / 8]], rtol=1e-6)
