"""Runs the saved models in the working folder, and says which could be; for test_saved_model.py.

Arguments: "with" or "without" the package, then folders. Reads x.npy and labels.npy, writes
<folder>.npy.
"""

import sys

import numpy as np
import tensorflow as tf

if sys.argv[1] == "with":
    import tf_center_loss_op  # noqa: F401
else:
    sys.modules["tf_center_loss_op"] = None  # an import of it raises

x, labels = np.load("x.npy"), np.load("labels.npy")
for folder in sys.argv[2:]:
    served = tf.saved_model.load(folder).signatures["serving_default"]
    keywords = served.structured_input_signature[1]
    given = {name: x if spec.dtype == tf.float32 else labels for name, spec in keywords.items()}
    (out,) = served(**given).values()
    np.save(f"{folder}.npy", out)
