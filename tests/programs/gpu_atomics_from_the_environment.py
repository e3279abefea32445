"""Prints whether a step uses atomics, before and after a call; for test_gpu_option.py."""

import tf_center_loss_op as tcl
from gpu_option import traced_atomic

print(traced_atomic())
tcl.training.set_gpu_atomics(False)
print(traced_atomic())
