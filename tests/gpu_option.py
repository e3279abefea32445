"""A step, and whether it asks for atomics on a GPU."""

import tensorflow as tf

import tf_center_loss_op as tcl


def step():
    """One step of the native op on a new table; returns its loss."""
    centers = tf.Variable(tf.zeros([3, 2]))
    loss = tcl.center_loss(tf.ones([1, 2]), [1], centers, impl="native")
    tcl.update_centers(tf.ones([1, 2]), [1], centers, impl="native")
    return loss


def traced_atomic():
    """The attribute `atomic` of the ops that a call makes now."""
    centers = tf.Variable(tf.zeros([3, 2]))

    @tf.function
    def traced():
        loss = tcl.center_loss(tf.ones([1, 2]), [1], centers, impl="native")
        tcl.update_centers(tf.ones([1, 2]), [1], centers, impl="native")
        return loss

    ops = traced.get_concrete_function().graph.get_operations()
    values = {op.get_attr("atomic") for op in ops if op.type.startswith("Tcl")}
    assert len(values) == 1
    return values.pop()
