"""Prints whether a layer asks for XLA where TensorFlow sees a CPU and a device of a kind.

For test_xla_fallback.py. Argument: the kind.
"""

import sys

import tensorflow as tf

import tf_center_loss_op as tcl

kind = sys.argv[1]
devices = [
    *tf.config.get_visible_devices(),
    tf.config.PhysicalDevice(f"/physical_device:{kind}:0", kind),
]
tf.config.get_visible_devices = lambda: devices
print(tcl.CenterLoss(2).supports_jit)
