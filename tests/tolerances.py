"""Every tolerance of the suite, in one place.

An implementation may be twice as far from the oracle as plain TensorFlow is in the same dtype,
plus a few units in the last place, because plain TensorFlow can be right by luck: sqrt(n) units,
what rounding at random amounts to, for a sum of n terms that comes out as a single number.
"""

import numpy as np

# Distance from 1 to the next number.
EPSILON = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
}

UNITS = 4

# Numerical differentiation, float64, step 1/1024: the loss is quadratic, so only rounding is left.
FINITE_DIFFERENCES = 1e-6

# Two float32 programs that train side by side for tens of steps, each rounding in its own order.
TRAINING = 2e-4


def assert_near_oracle(actual, plain, truth, dtype, what, terms=1):
    """Error of `actual` <= 2 x error of `plain` + a few units in the last place of the largest."""
    actual, plain, truth = (np.asarray(a).astype(np.float64) for a in (actual, plain, truth))
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    if not truth.size:
        return
    units = max(UNITS, terms**0.5)
    error, yardstick = np.abs(actual - truth).max(), np.abs(plain - truth).max()
    bound = 2 * yardstick + units * EPSILON[dtype] * np.abs(truth).max()
    assert error <= bound, f"{what}: error {error:.3g} > {bound:.3g} (plain TF: {yardstick:.3g})"


def assert_close(actual, truth, dtype, what=""):
    """Equal to a known value within a few units in the last place of the largest element."""
    assert_near_oracle(actual, truth, truth, dtype, what)
