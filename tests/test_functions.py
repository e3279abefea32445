"""Inside tf.function: program order, loops, branches, retracing, schedules of alpha."""

import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl

C, D = 5, 4


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 6, D)).astype("f"), rng.integers(0, C, (7, 6)).astype(np.int32)


def expected_steps(batches, **options):
    """Losses and tables of consecutive steps."""
    table, losses, tables = np.zeros([C, D]), [], []
    for features, labels in zip(*batches, strict=True):
        truth = oracle.center_loss(features, labels, table, **options)
        table = truth.centers
        losses.append(truth.loss)
        tables.append(table)
    return losses, tables


def test_program_order_of_calls_and_reads(impl, batches):
    centers = tf.Variable(tf.zeros([C, D]))
    (x0, x1, x2, *_), (y0, y1, y2, *_) = batches

    @tf.function
    def program():
        read0 = centers.read_value()
        loss0 = tcl.center_loss(x0, y0, centers, impl=impl)
        read1 = tf.gather(centers, tf.range(C))
        loss1 = tcl.center_loss(x1, y1, centers, impl=impl)
        tcl.update_centers(x2, y2, centers, impl=impl)
        read3 = centers.read_value()
        centers.assign(tf.zeros([C, D]))
        loss_again = tcl.center_loss(x0, y0, centers, update_centers=False, impl=impl)
        return read0, loss0, read1, loss1, read3, loss_again

    losses, tables = expected_steps(batches)
    expected = [np.zeros([C, D]), losses[0], tables[0], losses[1], tables[2], losses[0]]
    for _ in range(2):  # the program begins and ends with zeros
        for actual, truth in zip(program(), expected, strict=True):
            np.testing.assert_allclose(actual, truth, rtol=1e-5, atol=1e-6)


def test_an_update_with_an_unused_result_still_happens(impl, batches):
    centers = tf.Variable(tf.zeros([C, D]))

    @tf.function
    def program():
        tcl.update_centers(batches[0][0], batches[1][0], centers, impl=impl)
        tcl.center_loss(batches[0][1], batches[1][1], centers, impl=impl)

    program()
    np.testing.assert_allclose(centers.numpy(), expected_steps(batches)[1][1], rtol=1e-5, atol=1e-6)


def test_steps_in_a_while_loop(impl, batches):
    centers = tf.Variable(tf.zeros([C, D]))
    features, labels = tf.constant(batches[0]), tf.constant(batches[1])

    @tf.function
    def program():
        losses = tf.TensorArray(tf.float32, 7)
        for i in tf.range(7):
            losses = losses.write(i, tcl.center_loss(features[i], labels[i], centers, impl=impl))
        return losses.stack()

    losses, tables = expected_steps(batches)
    np.testing.assert_allclose(program(), losses, rtol=1e-5)
    np.testing.assert_allclose(centers.numpy(), tables[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", [True, False])
def test_gradient_through_a_while_loop(impl, batches, update):
    centers = tf.Variable(tf.zeros([C, D]))
    features, labels = tf.constant(batches[0]), tf.constant(batches[1])

    @tf.function
    def program():
        with tf.GradientTape() as tape:
            tape.watch(features)
            total = tf.constant(0.0)
            for i in tf.range(7):
                total += tcl.center_loss(
                    features[i], labels[i], centers, update_centers=update, impl=impl
                )
        return tape.gradient(total, features)

    tables = [np.zeros([C, D]), *expected_steps(batches)[1]] if update else [np.zeros([C, D])] * 7
    expected = [
        oracle.center_loss(x, y, table).feature_gradient
        for x, y, table in zip(*batches, tables, strict=False)
    ]
    np.testing.assert_allclose(program(), expected, rtol=1e-5, atol=1e-6)


def test_steps_in_branches(impl, batches):
    centers = tf.Variable(tf.zeros([C, D]))

    @tf.function
    def program(move):
        if move:
            loss = tcl.center_loss(batches[0][0], batches[1][0], centers, impl=impl)
        else:
            loss = tf.constant(0.0)
        return loss

    assert program(tf.constant(False)) == 0
    assert not centers.numpy().any()
    losses, tables = expected_steps(batches)
    np.testing.assert_allclose(program(tf.constant(True)), losses[0], rtol=1e-5)
    np.testing.assert_allclose(centers.numpy(), tables[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_trace_for_every_batch_size(impl, reduction, one_hot):
    centers = tf.Variable(tf.zeros([C, D]))
    traces = []

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, D]),
            tf.TensorSpec([None, C] if one_hot else [None], tf.float32 if one_hot else tf.int64),
        ]
    )
    def step(features, labels):
        traces.append(1)
        return tcl.center_loss(features, labels, centers, reduction=reduction, impl=impl)

    rng, table = np.random.default_rng(0), np.zeros([C, D])
    for batch in (3, 0, 1, 64, 7):
        features = rng.normal(size=(batch, D)).astype("f")
        labels = rng.integers(0, C, batch)
        loss = step(features, np.eye(C, dtype="f")[labels] if one_hot else labels)
        truth = oracle.center_loss(features, labels, table, reduction=reduction)
        table = truth.centers
        assert loss.shape == truth.loss.shape
        np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
        np.testing.assert_allclose(centers.numpy(), table, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "shape, reduction, expected",
    [
        ([None, D], "mean", []),
        ([None, D], "none", [None]),
        ([8, D], "none", [8]),
        ([None, 3, D], "none", [None, 3]),
        ([None, None, D], "sum", []),
    ],
)
def test_results_have_static_shapes(impl, shape, reduction, expected):
    centers = tf.Variable(tf.zeros([C, D]))
    step = tf.function(
        lambda features, labels: tcl.center_loss(
            features, labels, centers, reduction=reduction, impl=impl
        )
    ).get_concrete_function(tf.TensorSpec(shape), tf.TensorSpec(shape[:-1], tf.int32))
    assert step.output_shapes.as_list() == expected
    assert step.output_dtypes == tf.float32


def test_the_gradient_knows_its_static_shape(impl):
    centers = tf.Variable(tf.zeros([C, D]))

    @tf.function
    def gradient(features, labels):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(features, labels, centers, impl=impl)
        return tape.gradient(loss, features)

    step = gradient.get_concrete_function(
        tf.TensorSpec([None, D], tf.float16), tf.TensorSpec([None], tf.int32)
    )
    assert step.output_shapes.as_list() == [None, D]
    assert step.output_dtypes == tf.float16


def test_alpha_follows_a_schedule_without_retracing(impl):
    centers, alpha = tf.Variable([[0.0]]), tf.Variable(0.5)
    traces = []

    @tf.function
    def step(rate):
        traces.append(1)
        tcl.center_loss([[1.0]], [0], centers, alpha=alpha, rule="sum", impl=impl)
        tcl.center_loss([[1.0]], [0], centers, alpha=rate, rule="sum", impl=impl)

    step(tf.constant(0.0))
    assert centers.numpy() == 0.5
    alpha.assign(0.25)
    step(tf.constant(0.0))
    assert centers.numpy() == 0.625
    alpha.assign(0.0)
    step(tf.constant(1.0))
    assert centers.numpy() == 1.0
    assert len(traces) == 1


def test_two_variables_in_one_function(impl, batches):
    first, second = tf.Variable(tf.zeros([C, D])), tf.Variable(tf.zeros([C, D]))

    @tf.function
    def program():
        for i in range(7):
            tcl.update_centers(batches[0][i], batches[1][i], first, impl=impl)
            tcl.update_centers(batches[0][i], batches[1][i], second, impl=impl)

    program()
    expected = expected_steps(batches)[1][-1]
    for centers in (first, second):
        np.testing.assert_allclose(centers.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_variable_as_an_argument_of_the_function(impl):
    step = tf.function(lambda centers: tcl.update_centers([[1.0]], [0], centers, impl=impl))
    tables = [tf.Variable([[0.0]]), tf.Variable([[0.0], [0.0]])]
    for centers in tables:
        step(centers)
        assert centers.numpy()[0] == 0.25


def test_steps_inside_map_fn(impl, batches):
    # tf.map_fn traces its body again, as a loop of its own.
    centers = tf.Variable(tf.zeros([C, D]))
    losses = tf.function(
        lambda: tf.map_fn(
            lambda pair: tcl.center_loss(*pair, centers, update_centers=False, impl=impl),
            (tf.constant(batches[0]), tf.constant(batches[1])),
            fn_output_signature=tf.float32,
        )
    )()
    expected = [
        oracle.center_loss(x, y, np.zeros([C, D])).loss for x, y in zip(*batches, strict=True)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
