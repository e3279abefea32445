"""Steps on a table of 1 GiB: prints the peak of the memory before and after; for test_in_place.py.

Argument: the implementation.
"""

import json
import sys

import tensorflow as tf

import tf_center_loss_op as tcl
from measure import memory

impl = sys.argv[1]
C, D, B = 2**20, 256, 256
small = tf.Variable(tf.zeros([1000, D]))
centers = tf.Variable(tf.zeros([C, D]))
variable = [small]
features = tf.ones([B, D])


def loss_and_gradient(labels):
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, labels, variable[0], impl=impl)
    return loss, tape.gradient(loss, features)


def centers_gradient(labels):
    with tf.GradientTape() as tape:
        loss = tcl.center_loss(features, labels, variable[0], update_centers=False, impl=impl)
    gradient = tape.gradient(loss, variable[0])
    variable[0].scatter_sub(gradient)


def loop(labels):
    def body(i):
        tcl.update_centers(features, labels + i, variable[0], impl=impl)
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


run(1000)  # for what TensorFlow allocates once
variable[0] = centers
before = memory("VmHWM")
run(C)
moved = int(tf.math.count_nonzero(tf.gather(centers, tf.range(0, 3989 * 5, 3989))))
print(json.dumps(dict(before=before, after=memory("VmHWM"), moved=moved)))
