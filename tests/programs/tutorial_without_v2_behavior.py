"""The tutorial's training beside its formula after disable_v2_behavior(); for test_compat_v1.py.

Programs for TensorFlow 1 begin so: a variable is a reference unless a resource is asked for.
"""

import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()

import numpy as np

import tf_center_loss_op as tcl
import tutorial
from tolerances import TRAINING

for order in ("control", "collection"):
    actual = tutorial.train(tcl.compat.v1.center_loss, 0.5, order, 10)
    expected = tutorial.train(tutorial.center_loss, 0.5, order, 10)
    for a, b in zip(actual, expected, strict=True):
        for key in b:
            scale = np.abs(b[key]).max()
            np.testing.assert_allclose(a[key], b[key], atol=TRAINING * scale)
    assert actual[-1]["centers"].any()
