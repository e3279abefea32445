"""Prints where a large table lies after its first step, in JSON; for test_huge_pages.py.

Argument, optional: "read-first" reads a row before the step.
"""

import json
import sys

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from measure import address


def on_huge_pages(begin, size):
    """Bytes on huge pages, in the mappings that overlap; a large array has mappings of its own."""
    found, overlaps = 0, False
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            overlaps = low < begin + size and high > begin
        elif overlaps and first == "AnonHugePages:":
            found += 1024 * int(line.split()[1])
    return found


numbers = np.arange(2**25, dtype=np.float32).reshape(-1, 64)
centers = tf.Variable(numbers, trainable=False)
place = address(centers)
before = on_huge_pages(place, numbers.nbytes)
if "read-first" in sys.argv:
    tcl.tables.rows([5], centers)
tcl.center_loss(tf.ones([1, 64]), [3], centers)
after = on_huge_pages(place, numbers.nbytes)
numbers[3] += 0.5 / 2 * (1 - numbers[3])
print(
    json.dumps(
        {
            "share": after / numbers.nbytes,
            "grown": (after - before) / numbers.nbytes,
            "moved": address(centers) != place,
            "right": bool((centers.numpy() == numbers).all()),
        }
    )
)
