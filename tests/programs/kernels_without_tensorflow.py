"""Prints a step of the kernel module, loaded without the package; for test_kernels.py.

Argument: the module's file.
"""

import importlib.util
import sys

import numpy as np

spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
centers = np.zeros([2, 1], np.float32)
loss, _ = kernels.center_loss_step(np.ones([1, 1], np.float32), np.array([1]), centers)
assert "tensorflow" not in sys.modules
print(float(loss), centers.ravel().tolist())
