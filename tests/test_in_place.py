"""The step writes into the variable's own buffer and nowhere else."""

import json

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_python

B, D, C = 32, 16, 4000


def address(variable):
    """Where the variable's numbers lie."""
    # In copy-on-read mode read_value() would be a copy.
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    value = variable.read_value()
    return np.asarray(memoryview(value)).ctypes.data


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


def test_same_buffer(impl, centers):
    before, values = address(centers), centers.numpy()
    steps(impl, centers)
    assert address(centers) == before
    assert not np.array_equal(centers.numpy(), values)


def test_same_buffer_between_gathers_and_checkpoints(impl, centers, tmp_path):
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


def test_no_gigabyte_is_copied(impl, tmp_path):
    # A table of 1 GiB. The peak of the resident memory is read before and after the steps; it can
    # only show a copy if making the table needed no second one, which is checked as well.
    out = run_python(
        f"""
        import json
        import tensorflow as tf
        import tf_center_loss_op as tcl
        from child import memory

        C, D, B = 2**20, 256, 256
        small = tf.Variable(tf.zeros([1000, D]))
        centers = tf.Variable(tf.zeros([C, D]))
        variable = [small]
        features = tf.ones([B, D])

        def loss_and_gradient(labels):
            with tf.GradientTape() as tape:
                tape.watch(features)
                loss = tcl.center_loss(features, labels, variable[0], impl={impl!r})
            return loss, tape.gradient(loss, features)

        def centers_gradient(labels):
            with tf.GradientTape() as tape:
                loss = tcl.center_loss(
                    features, labels, variable[0], update_centers=False, impl={impl!r}
                )
            gradient = tape.gradient(loss, variable[0])
            variable[0].scatter_sub(gradient)

        def loop(labels):
            def body(i):
                tcl.update_centers(features, labels + i, variable[0], impl={impl!r})
                return [i + 1]
            return tf.while_loop(lambda i: i < 5, body, [tf.constant(0, labels.dtype)])

        def run(classes):
            kinds = [loss_and_gradient, centers_gradient, loop]
            kinds += [tf.function(kind) for kind in kinds]
            for kind in kinds:
                for i in range(5):
                    labels = (tf.range(B, dtype=tf.int64) * 3989 + 17 * i) % (classes - 10)
                    kind(labels)
                    tf.gather(variable[0], labels)

        run(1000)  # whatever TensorFlow allocates once
        variable[0] = centers
        before = memory("VmHWM")
        run(C)
        moved = int(tf.math.count_nonzero(tf.gather(centers, tf.range(0, 3989 * 5, 3989))))
        print(json.dumps(dict(before=before, after=memory("VmHWM"), moved=moved)))
        """,
        tmp_path,
    )
    result = json.loads(out)
    gigabyte = 2**30
    assert result["moved"] > 0
    assert result["before"] < 1.8 * gigabyte, "making the table took too much to see a copy"
    assert result["after"] - result["before"] < gigabyte / 16
