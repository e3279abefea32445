"""After its first step a large table lies on large pages: same place, same numbers."""

import json
import os
from pathlib import Path

import pytest

from child import run_python

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import json
import numpy as np
import tensorflow as tf
import tf_center_loss_op as tcl

def address(variable):
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    return np.asarray(memoryview(variable.read_value())).ctypes.data

def on_huge_pages(begin, size):
    # Bytes of the mappings that overlap it; a large array has mappings of its own.
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
tcl.center_loss(tf.ones([1, 64]), [3], centers)
after = on_huge_pages(place, numbers.nbytes)
numbers[3] += 0.5 / 2 * (1 - numbers[3])
print(json.dumps({
    "share": after / numbers.nbytes,
    "grown": (after - before) / numbers.nbytes,
    "moved": address(centers) != place,
    "right": bool((centers.numpy() == numbers).all()),
}))
"""

# Collapsing has to be there, too: it came with Linux 6.1.
OFFERED = (
    SETTING.exists()
    and "[never]" not in SETTING.read_text()
    and tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 1)
)


pytestmark = pytest.mark.native


@pytest.mark.skipif(not OFFERED, reason=f"{SETTING} says never, or Linux before 6.1")
def test_a_large_table_moves_to_large_pages_in_its_place(tmp_path):
    seen = json.loads(run_python(PROGRAM, tmp_path))
    assert seen["right"] and not seen["moved"]
    assert seen["share"] > 0.9


@pytest.mark.skipif(not OFFERED, reason=f"{SETTING} says never, or Linux before 6.1")
def test_a_table_that_was_read_before_its_first_step(tmp_path):
    gather = PROGRAM.replace(
        "tcl.center_loss(", "tcl.tables.rows([5], centers)\ntcl.center_loss(", 1
    )
    seen = json.loads(run_python(gather, tmp_path))
    assert seen["right"] and not seen["moved"]
    assert seen["share"] > 0.9


def test_it_can_be_switched_off(tmp_path):
    seen = json.loads(run_python(PROGRAM, tmp_path, TF_CENTER_LOSS_HUGE_PAGES="0"))
    assert seen["right"] and not seen["moved"]
    assert seen["grown"] == 0
