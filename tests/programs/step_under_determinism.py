"""Prints the error of a step under op determinism; for test_gpu_option.py."""

import tensorflow as tf

from gpu_option import step

tf.keras.utils.set_random_seed(0)
tf.config.experimental.enable_op_determinism()
try:
    step()
except (RuntimeError, ValueError) as error:
    print(error)
