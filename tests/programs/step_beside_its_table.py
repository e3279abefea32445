"""A model on one device and its table on another, against the oracle.

For test_distribute_placement.py. Two logical CPU devices: the first stands for a GPU with the
model, the second for the host.
"""

import keras
import numpy as np
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from replicas import cpu_devices

cpu_devices(2)
B, C, D = 16, 503, 8
inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
dense = keras.layers.Dense(D)
embedded = dense(inputs)
layer = tcl.CenterLoss(C, name="centers")
with tf.device("CPU:1"):
    embedded = layer([embedded, label])
model = keras.Model([inputs, label], embedded)
assert layer.centers.value.device.endswith("CPU:1")
assert dense.kernel.value.device.endswith("CPU:0")
rng = np.random.default_rng(0)
with tf.device("CPU:0"):
    x = tf.constant(rng.normal(size=(B, D)), tf.float32)
    y = tf.constant(rng.integers(0, C, B), tf.int32)


def step(x, y):
    with tf.device("CPU:0"):
        with tf.GradientTape() as tape:
            model([x, y], training=True)
            loss = model.losses[0]
        return loss, tape.gradient(loss, dense.kernel.value)


# The caller asks for the first device; the op runs on the device of the table.
embedded = dense(x)
assert embedded.device.endswith("CPU:0")
with tf.device("CPU:0"):
    loss = tcl.center_loss(embedded, y, layer.centers, impl="native", alpha=0.0)
assert loss.device.endswith("CPU:1"), loss.device

before = np.zeros([C, D])
for run in (step, tf.function(step)):
    loss, gradient = run(x, y)
    truth = oracle.center_loss(embedded, y, before)
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
    expected = x.numpy().T @ truth.feature_gradient
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    before = layer.centers.numpy()
    np.testing.assert_allclose(before, truth.centers, rtol=1e-5, atol=1e-7)
assert layer.centers.value.device.endswith("CPU:1")
