"""Prints the memory that each function takes on a table of 1 GiB, in JSON; for test_tables.py.

Argument: the implementation.
"""

import json
import sys

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from measure import forget_peak, memory

impl = sys.argv[1]
C, D = 2**20, 256
start = memory("VmHWM")
centers = tcl.tables.create(C, D, initializer=tcl.tables.RandomNormal(seed=0))
tcl.update_centers(tf.ones([2, D]), [0, C - 1], centers, impl=impl)
seen = dict(made=memory("VmHWM") - start)
for what in "save", "load":  # without the pages of the mapped file
    forget_peak()
    before = memory("RssAnon")
    getattr(tcl.tables, what)(centers, "centers.npy")
    seen[what] = memory("VmHWM") - memory("RssFile") - before
forget_peak()
before = memory("VmHWM")
tcl.tables.rows([5, 7], centers)
seen["rows"] = memory("VmHWM") - before
checkpoint = tf.train.Checkpoint(centers=centers)
checkpoint.write("checkpoint")
tcl.update_centers(tf.ones([2, D]), [0, C - 1], centers, impl=impl)
kept = tcl.tables.rows([5, 7], centers)
forget_peak()
before = memory("VmHWM")
tcl.tables.clear(centers)
checkpoint.read("checkpoint")
seen["clear and read"] = memory("VmHWM") - before
assert np.array_equal(tcl.tables.rows([5, 7], centers), kept)
forget_peak()
before = memory("VmHWM")
larger = tcl.tables.grow(centers, C + 1, initializer=tcl.tables.RandomNormal(seed=0))
seen["grow"] = memory("VmHWM") - before
assert np.array_equal(tcl.tables.rows([5, 7], larger), kept)
print(json.dumps(seen))
