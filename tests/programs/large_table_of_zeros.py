"""Prints the memory that a step on a layer's table of 4 GiB of zeros takes; for test_tables.py."""

import tensorflow as tf

import tf_center_loss_op as tcl
from measure import memory

layer = tcl.CenterLoss(2**22)  # 4 GiB
tcl.update_centers(tf.ones([1, 256]), [1], tcl.tables.create(10, 256))
before = memory("RssAnon")
layer.build((None, 256))
layer(tf.ones([1, 256]), tf.constant([2**22 - 1]), training=True)
print(memory("RssAnon") - before)
