"""Prints how a step on centers on a device runs; for test_fallback.py.

Arguments: the device, and "xla" for a step that is compiled or "ops". Prints JSON, with all
warnings. The graphs are not run, so the device need not exist.
"""

import json
import sys
import warnings

import tensorflow as tf

import tf_center_loss_op as tcl

device, how = sys.argv[1:]
tf1 = tf.compat.v1


def traced(impl):
    """The fused ops of a step in a graph of TensorFlow 1, in which nothing is placed."""
    with tf.Graph().as_default() as graph:
        with tf.device(device):
            centers = tf1.get_variable("centers", [3, 2], trainable=False, use_resource=True)

        def step():
            return tcl.center_loss(tf.ones([1, 2]), [1], centers, impl=impl)

        if how == "xla":
            tf.xla.experimental.compile(step)
        else:
            step()
    return sorted({op.type for op in graph.get_operations() if op.type.startswith("Tcl")})


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    auto = traced("auto")
try:
    native, error = traced("native"), None
except RuntimeError as raised:
    native, error = None, str(raised)
print(
    json.dumps(
        {
            "auto": auto,
            "native": native,
            "error": error,
            "warnings": [str(w.message) for w in caught if "center" in str(w.message).lower()],
        }
    )
)
