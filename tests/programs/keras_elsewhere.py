"""Makes every Keras object of the package where Keras is not that of TensorFlow.

For test_keras_backend.py. Argument: the name of another backend, or "" for the one that runs.
Prints the errors, and the loss that the function gives.
"""

import sys

import keras
import tensorflow as tf

import tf_center_loss_op as tcl

if sys.argv[1]:
    # No other backend is installed: only the answer is another.
    keras.config.backend = keras.backend.backend = lambda: sys.argv[1]

OBJECTS = {
    "CenterLoss": lambda: tcl.CenterLoss(10),
    "GlobalBatchLoss": lambda: tcl.distribute.GlobalBatchLoss("mse"),
    "CentersMonitor": lambda: tcl.training.CentersMonitor(None),
    "AtomicBackup": lambda: tcl.training.AtomicBackup("backup"),
}
for name, make in OBJECTS.items():
    try:
        make()
        print(f"{name}: no error")
    except RuntimeError as error:
        print(error)

# The functions need no Keras.
centers = tf.Variable(tf.zeros([10, 2]), trainable=False)
loss = tcl.center_loss(tf.constant([[1.0, 2.0], [3.0, 4.0]]), [7, 7], centers, alpha=0.6)
tcl.update_centers(tf.ones([1, 2]), [1], centers)
print(float(loss), [round(float(c), 3) for c in centers[7]])
