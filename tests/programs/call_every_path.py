"""Prints what three calls of "auto", a layer and a call of "native" give; for test_fallback.py.

Arguments: features and labels, in JSON. Prints JSON, with all warnings.
"""

import json
import sys
import warnings

features, labels = map(json.loads, sys.argv[1:])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np
    import tensorflow as tf

    import tf_center_loss_op as tcl

    centers = tf.Variable(tf.zeros([2, 2]))
    loss = tcl.center_loss(features, labels, centers)
    tables = [centers.numpy().tolist()]
    for _ in range(2):
        tcl.center_loss(features, labels, centers)
        tcl.update_centers(features, labels, centers)
    tcl.CenterLoss(2)(np.array(features, "f"), np.array(labels), training=True)
    try:
        tcl.center_loss(features, labels, centers, impl="native")
        error = None
    except Exception as e:
        error = str(e)

graph = (
    tf.function(lambda: tcl.center_loss(features, labels, centers))
    .get_concrete_function()
    .graph.as_graph_def()
)
nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
functions = {f.signature.name for f in graph.library.function}
own_ops = {node.op for node in nodes} - functions - set(dir(tf.raw_ops))

print(
    json.dumps(
        dict(
            file=tcl.__file__,
            loss=float(loss),
            centers=tables[0],
            error=error,
            info=tcl.build_info(),
            own_ops=sorted(own_ops),
            warnings=[str(w.message) for w in caught if "center" in str(w.message).lower()],
        )
    )
)
