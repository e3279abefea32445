"""Prints the modules that the import adds to TensorFlow's and Keras's; for test_typing.py."""

import json
import sys

import h5py  # noqa: F401
import keras  # noqa: F401
import numpy  # noqa: F401
import tensorflow  # noqa: F401

before = set(sys.modules)
import tf_center_loss_op  # noqa: E402, F401

print(json.dumps(sorted(set(sys.modules) - before)))
