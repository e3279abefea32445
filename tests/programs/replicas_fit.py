"""Trained layers on two replicas against one replica; for test_distribute.py."""

import keras
import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import D, check_fit
from replicas import copies, mirrored

# TensorFlow's own collective ops do not work in the loop of steps_per_execution.
strategy = mirrored(2, cross_device_ops=tf.distribute.ReductionToOneDevice())

slower = keras.optimizers.schedules.PolynomialDecay(0.5, 5, 0.1)
check_fit(
    strategy,
    [
        {"loss": None, "ignore_class": 3, "rule": "batch_mean"},
        {"deferred_update": True},
        {"sharded": True},
    ],
)
layer = check_fit(strategy, [{"steps": 2, "alpha": slower, "reduction": "sum"}])

# Loading a file or weights writes all copies.
centers, table = layer.centers, copies(strategy, layer.centers.value)
tcl.tables.save(centers, "centers.npy")
centers.assign(tf.zeros_like(centers))
assert not copies(strategy, centers.value).any()
tcl.tables.load(centers, "centers.npy")
assert np.array_equal(copies(strategy, centers.value), table)
with strategy.scope():
    inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
    model = keras.Model([inputs, label], layer([inputs, label]))
model.save_weights("model.weights.h5")
centers.assign(tf.zeros_like(centers))
model.load_weights("model.weights.h5")
assert np.array_equal(copies(strategy, centers.value), table)
