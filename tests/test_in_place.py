"""The step writes into the variable's own buffer and nowhere else."""

import json

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from measure import address

B, D, C = 32, 16, 4000


@pytest.fixture
def centers():
    return tf.Variable(tf.random.normal([C, D]))


def steps(impl, centers):
    features = tf.random.normal([B, D])
    traced = tf.function(tcl.center_loss)
    for i in range(3):
        labels = (tf.range(B, dtype=tf.int64) * 7 + i) % C
        tcl.center_loss(features, labels, centers, impl=impl)
        tcl.update_centers(features, labels, centers, impl=impl)
        traced(features, labels, centers, impl=impl)


def test_the_helper_sees_a_new_buffer(centers):
    before = address(centers)
    assert address(centers) == before
    held = centers.read_value()
    centers.scatter_add(tf.IndexedSlices(tf.ones([1, D]), [0]))
    assert address(centers) != before
    del held


def test_steps_keep_the_buffer(impl, centers):
    before, values = address(centers), centers.numpy()
    steps(impl, centers)
    assert address(centers) == before
    assert not np.array_equal(centers.numpy(), values)


def test_gathers_and_checkpoints_keep_the_buffer(impl, centers, tmp_path):
    before = address(centers)
    for _ in range(3):
        tf.gather(centers, [1, 2, 3])
        steps(impl, centers)
        tf.train.Checkpoint(centers=centers).write(str(tmp_path / "checkpoint"))
        steps(impl, centers)
    assert address(centers) == before


def test_a_value_read_earlier_keeps_its_numbers(impl, centers):
    held = centers.read_value()
    copy = np.array(held)
    steps(impl, centers)
    assert np.array_equal(held, copy)
    assert not np.array_equal(centers.numpy(), copy)
    # One copy was needed; the steps after it are in place again.
    after = address(centers)
    steps(impl, centers)
    assert address(centers) == after


def test_rows_of_other_classes_keep_their_bits(impl, centers):
    before = centers.numpy()
    labels = [5, 3999, 0, 5]
    tcl.center_loss(tf.random.normal([4, D]), labels, centers, impl=impl)
    changed = (centers.numpy() != before).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [0, 5, 3999]


def test_a_step_after_assign_uses_the_new_values(impl, centers):
    steps(impl, centers)
    centers.assign(tf.zeros([C, D]))
    tcl.update_centers(tf.ones([1, D]), [7], centers, rule="mean", impl=impl)
    expected = np.zeros([C, D])
    expected[7] = 0.5
    assert np.array_equal(centers.numpy(), expected)


def test_a_table_of_a_gigabyte_is_not_copied(impl, tmp_path):
    # A table of 1 GiB. The peak of the resident memory is read before and after the steps; it can
    # only show a copy if making the table needed no second one, which is checked as well.
    out = run_program("steps_on_a_gigabyte", impl, cwd=tmp_path)
    result = json.loads(out)
    gigabyte = 2**30
    assert result["moved"] > 0
    assert result["before"] < 1.8 * gigabyte, "making the table took too much to see a copy"
    assert result["after"] - result["before"] < gigabyte / 16
