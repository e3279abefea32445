"""Prints what a step compiled by XLA gives; for test_xla_fallback.py.

Arguments: features and labels, in JSON. Prints JSON, with all warnings.
"""

import json
import sys
import warnings

features, labels = map(json.loads, sys.argv[1:])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tensorflow as tf

    import tf_center_loss_op as tcl

    centers = tf.Variable(tf.zeros([2, 2]))

    def step(features, impl="auto"):
        return tcl.center_loss(features, labels, centers, impl=impl)

    features = tf.constant(features)
    loss = float(tf.function(step, jit_compile=True)(features))
    table = centers.numpy().tolist()
    try:
        tf.function(step, jit_compile=True)(features, "native")
        error = None
    except RuntimeError as e:
        error = str(e)
    if tcl.build_info()["native"]:
        step(features, "native")
        tf.function(step)(features, "native")
print(
    json.dumps(
        dict(
            loss=loss,
            centers=table,
            error=error,
            info=tcl.build_info(),
            supports_jit=tcl.CenterLoss(2).supports_jit,
            warnings=[str(w.message) for w in caught if "center" in str(w.message).lower()],
        )
    )
)
