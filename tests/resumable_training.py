"""A training of 32 steps for the programs of test_resume.py.

Its state: dropout (random), Adam (an optimizer's variables), a schedule, a metric and shuffling.
"""

import time

import keras
import numpy as np

import tf_center_loss_op as tcl


def begin():
    """The compiled model, its inputs and its labels."""
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 256).astype("int32")
    inputs = rng.normal(size=(256, 16)).astype("float32")
    image, label = keras.Input([16]), keras.Input([], dtype="int32")
    x = keras.layers.Dropout(0.1, seed=1)(keras.layers.Dense(8)(image))
    warm_up = keras.optimizers.schedules.PolynomialDecay(0.01, 20, 0.1)
    x = tcl.CenterLoss(50, loss_weight=warm_up, name="centers")([x, label])
    model = keras.Model([image, label], keras.layers.Dense(50)(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, inputs, labels


def rest():
    """Makes a step long enough that a signal can arrive in it."""
    time.sleep(0.05)


def end(model):
    """Writes all variables to end.npz."""
    np.savez("end.npz", *[variable.numpy() for variable in model.variables])
