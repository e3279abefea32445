"""A step under OneDeviceStrategy against the oracle; for test_distribute.py.

Argument: the implementation.
"""

import sys

import numpy as np
import tensorflow as tf

import oracle
from replica_checks import C, D, batches, mirrored_table, sharded_table, step_of

strategy = tf.distribute.OneDeviceStrategy("CPU:0")

for table in (mirrored_table, sharded_table):
    make, tables_of = table(strategy)
    start = np.ones([C, D], "f")
    centers = make(start)
    features, ids = batches(2, 0)
    run = step_of(strategy, centers, impl=sys.argv[1])
    run(tf.constant(features[0]), tf.constant(ids[0]))
    truth = oracle.center_loss(features[0], ids[0], start)
    ((_, rows),) = tables_of(centers)
    np.testing.assert_allclose(rows, truth.centers, rtol=1e-6)
