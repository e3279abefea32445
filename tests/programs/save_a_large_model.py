"""Prints the memory that saving and loading a model takes, in JSON; for test_saving.py.

The table has 512 MiB; a smaller model first warms up HDF5 and TensorFlow.
"""

import json

import keras
import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from measure import forget_peak, memory


def make(classes):
    image, label = keras.Input([256]), keras.Input([], dtype="int32")
    model = keras.Model([image, label], tcl.CenterLoss(classes)(image, label))
    model.compile("sgd")
    return model


def grown(what, *args, **options):
    forget_peak()
    before = memory("VmRSS")
    what(*args, **options)
    return memory("VmHWM") - before


def trained(classes):
    model = make(classes)
    for begin in range(0, classes, 2**16):
        labels = np.arange(begin, min(classes, begin + 2**16))
        model.layers[-1](tf.ones([len(labels), 256]), labels, training=True)
    return model


seen = {}
for classes in 2**17, 2**19:
    model = trained(classes)
    seen["save_weights"] = grown(model.save_weights, "a.weights.h5")
    seen["load_weights"] = grown(model.load_weights, "a.weights.h5")
    seen["save"] = grown(model.save, "folder", zipped=False)
    del model
    seen["load_model"] = grown(keras.models.load_model, "folder")
print(json.dumps(seen))
