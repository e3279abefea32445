"""A label outside the table raises an error that names it, and nothing is written."""

import re

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from messages import with_words

BAD = [10, -1, 2**31 - 1, -(2**31)]
# Truncated to 32 bits these would be valid classes.
BAD_LONG = [2**32, 2**32 + 3, -(2**32), 2**63 - 1, -(2**63)]


@pytest.fixture
def centers():
    return tf.Variable(tf.zeros([10, 3]), name="centers")


def refused(call, centers, position, value):
    """The call raises, naming position, value and range, and writes nothing."""
    words = with_words(f"labels[{position}] = {value} is outside [0, 10)")
    with pytest.raises((ValueError, tf.errors.OpError), match=words) as caught:
        call()
    assert not centers.numpy().any()
    return caught.value


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize(
    "dtype, value",
    [("int32", v) for v in BAD] + [("int64", v) for v in BAD + BAD_LONG],
)
def test_a_label_out_of_range_is_refused(impl, centers, dtype, value, traced, update):
    labels = tf.constant([0, 1, 2, value], dtype)

    def call(labels):
        return tcl.center_loss(tf.ones([4, 3]), labels, centers, update_centers=update, impl=impl)

    step = tf.function(call) if traced else call
    error = refused(lambda: step(labels), centers, 3, value)
    if traced:
        assert isinstance(error, tf.errors.InvalidArgumentError)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_update_centers_refuses_it(impl, centers, traced):
    def call(labels):
        tcl.update_centers(tf.ones([4, 3]), labels, centers, impl=impl)

    step = tf.function(call) if traced else call
    refused(lambda: step(tf.constant([0, 10, 2, 3])), centers, 1, 10)


def test_position_is_counted_over_the_flattened_labels(impl, centers):
    labels = [[0, 1, 2], [3, -7, 5]]
    refused(lambda: tcl.center_loss(tf.ones([2, 3, 3]), labels, centers, impl=impl), centers, 4, -7)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_the_first_of_several_is_named(impl, centers, traced):
    def call(labels):
        return tcl.center_loss(tf.ones([5, 3]), labels, centers, impl=impl)

    step = tf.function(call) if traced else call
    refused(lambda: step(tf.constant([0, 12, -3, 1, 11])), centers, 1, 12)


@pytest.mark.parametrize("position", [0, 4321, 4999])
def test_a_large_batch_names_the_position(impl, centers, position):
    labels = np.arange(5000) % 10
    labels[position] = 10
    refused(
        lambda: tcl.center_loss(tf.ones([5000, 3]), labels, centers, impl=impl),
        centers,
        position,
        10,
    )


def test_only_the_ignored_label_may_be_outside(impl, centers):
    def call(labels):
        return tcl.center_loss(tf.ones([3, 3]), labels, centers, ignore_class=-1, impl=impl)

    refused(lambda: call([0, -1, -2]), centers, 2, -2)
    refused(lambda: call([-1, 10, 0]), centers, 1, 10)
    assert call([0, -1, 9]) == 1.5


@pytest.mark.parametrize("ignored", [-1, 255, -100, 2**31 - 1])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ignored_labels_may_be_outside(impl, centers, dtype, ignored):
    labels = tf.constant([ignored, 3, ignored], dtype)
    loss = tcl.center_loss(
        tf.ones([3, 3]), labels, centers, ignore_class=ignored, reduction="none", impl=impl
    )
    assert loss.numpy().tolist() == [0.0, 1.5, 0.0]


def test_the_next_call_works(impl, centers):
    step = tf.function(
        lambda labels: tcl.center_loss(tf.ones([2, 3]), labels, centers, impl=impl),
        input_signature=[tf.TensorSpec([None], tf.int64)],
    )
    refused(lambda: step([0, 10]), centers, 1, 10)
    assert step([0, 9]) == 1.5
    assert np.flatnonzero(centers.numpy().any(axis=1)).tolist() == [0, 9]


def test_a_bad_label_beside_a_bad_row_is_still_refused(impl, centers):
    features = [[np.nan] * 3, [1.0] * 3]
    refused(lambda: tcl.center_loss(features, [10, 0], centers, impl=impl), centers, 0, 10)


def test_every_path_says_the_same(implementations, centers):
    texts = set()
    for impl in implementations:
        errors = (ValueError, tf.errors.OpError)
        with pytest.raises(errors, match=r"labels\[1\] = 12 is outside") as caught:
            tcl.center_loss(tf.ones([2, 3]), [3, 12], centers, impl=impl)
        # TensorFlow adds the node's name to an op's message.
        texts.update(re.findall(r"labels\[1\] = 12 is outside \[0, 10\)", str(caught.value)))
    assert len(texts) == 1
