"""Prints by how much predictions raise the peak of the memory, in JSON; for test_nearest.py.

The table has 2^20 x 64 numbers, 256 MiB; the scores of all samples and classes have as many. What
matrix products allocate depends on the processor, and malloc keeps freed memory; with a block of
1 MiB both are small on every processor.
"""

import json
import threading

import numpy as np
import psutil
import tensorflow as tf

import tf_center_loss_op as tcl

C, D, B = 2**20, 64, 64
ROWS = 2**14
rng = np.random.default_rng(0)
file = np.lib.format.open_memmap("centers.npy", "w+", "f", (C, D))
variable = tf.Variable(tf.zeros([C, D]))
for i in range(0, C, ROWS):
    file[i : i + ROWS] = rng.random((ROWS, D), np.float32)
    variable.scatter_update(tf.IndexedSlices(file[i : i + ROWS], tf.range(i, i + ROWS)))
labels = rng.integers(0, C, B)
features = file[labels] + rng.random((B, D), np.float32) / 100
# A step sets copy-on-read mode, in which a dense read copies.
tcl.update_centers(features[:1], labels[:1], variable, alpha=1e-9)
for table in (file[:1000], tf.Variable(file[:1000])):  # for what TensorFlow allocates once
    tcl.nearest.predict(features, table)
process = psutil.Process()


def anonymous():  # without the pages of a mapped file
    return process.memory_info().rss - process.memory_info().shared


before, highest, done = anonymous(), 0, threading.Event()


def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())


def nearest(table):
    return tcl.nearest.predict(features, table, block=2**12)[0]


watcher = threading.Thread(target=watch)
watcher.start()
found = [nearest(file), nearest(variable), tf.function(nearest)(variable)]
own = tcl.nearest.distance_to_center(features, labels, variable)
done.set()
watcher.join()
good = all(np.array_equal(f, labels) for f in found)
print(json.dumps(dict(good=good, grown=highest - before)))
