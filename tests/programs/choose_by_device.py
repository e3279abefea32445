"""Prints how steps on centers on a CPU, a GPU and a TPU run, in JSON; for test_fallback.py.

Argument: "xla" for steps that are compiled, or "ops". The graphs are not run, so the devices need
not exist.
"""

import json
import sys
import warnings

import tensorflow as tf

import tf_center_loss_op as tcl


def traced(impl, device):
    """The fused ops of a step in a graph of TensorFlow 1, in which nothing is placed."""
    with tf.Graph().as_default() as graph:
        with tf.device(device):
            centers = tf.compat.v1.get_variable(
                "centers", [3, 2], trainable=False, use_resource=True
            )

        def step():
            return tcl.center_loss(tf.ones([1, 2]), [1], centers, impl=impl)

        if sys.argv[1] == "xla":
            tf.xla.experimental.compile(step)
        else:
            step()
    return sorted({op.type for op in graph.get_operations() if op.type.startswith("Tcl")})


def choice(device):
    """What "auto" and "native" make of the device, with all warnings of "auto"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto = traced("auto", device)
    try:
        native, error = traced("native", device), None
    except RuntimeError as raised:
        native, error = None, str(raised)
    messages = [str(w.message) for w in caught if "center" in str(w.message).lower()]
    return {"auto": auto, "native": native, "error": error, "warnings": messages}


print(json.dumps({kind: choice(f"/device:{kind}:0") for kind in ("CPU", "GPU", "TPU")}))
