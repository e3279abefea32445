"""A step compiled by XLA where XLA was used first, or the package was; for test_xla.py.

Argument: "xla" or "package".
"""

import sys

import tensorflow as tf


def use_xla():
    tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros([2]))


if sys.argv[1] == "xla":
    use_xla()
import tf_center_loss_op as tcl

assert tcl.build_info()["xla"]
use_xla()
centers = tf.Variable(tf.zeros([2, 1]))


@tf.function(jit_compile=True)
def step(x):
    return tcl.center_loss(x, [0, 1], centers, rule="mean", impl="native")


assert float(step(tf.constant([[2.0], [4.0]]))) == 5
assert centers.numpy().tolist() == [[1], [2]]
