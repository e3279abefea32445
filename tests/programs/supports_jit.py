"""Prints whether a layer asks for XLA where TensorFlow sees a CPU and another device.

For test_xla_fallback.py. Arguments: the kinds of the other device. Prints JSON.
"""

import json
import sys

import tensorflow as tf

import tf_center_loss_op as tcl

visible = tf.config.get_visible_devices()


def supports_jit(kind):
    other = tf.config.PhysicalDevice(f"/physical_device:{kind}:0", kind)
    tf.config.get_visible_devices = lambda: [*visible, other]
    return tcl.CenterLoss(2).supports_jit


print(json.dumps({kind: supports_jit(kind) for kind in sys.argv[1:]}))
