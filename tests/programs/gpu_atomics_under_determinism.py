"""Asks for atomics under op determinism, which is refused; for test_gpu_option.py."""

import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from gpu_option import step

tcl.training.set_gpu_atomics(True)
step()
tf.keras.utils.set_random_seed(0)
tf.config.experimental.enable_op_determinism()
with pytest.raises((RuntimeError, ValueError), match="set_gpu_atomics: expected False"):
    step()
with pytest.raises((RuntimeError, ValueError), match="enabled: expected False"):
    tcl.training.set_gpu_atomics(True)
tcl.training.set_gpu_atomics(False)
step()
