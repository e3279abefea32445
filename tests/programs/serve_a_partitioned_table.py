"""A table of 21 rows partitioned over two servers, 11 and 10; for test_distribute_servers.py."""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from parameter_servers import check_step, coordinator, features, labels, start

halves = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
strategy, queue = coordinator(variable_partitioner=halves)
with strategy.scope():
    centers = tf.Variable(start, trainable=False)
assert [part.shape[0] for part in centers.variables] == [11, 10]
assert len({part.device for part in centers.variables}) == 2
check_step(queue, centers, lambda: np.concatenate([part.numpy() for part in centers.variables]))
words = "impl: 'native' cannot run on centers that a partitioner has split"
with pytest.raises(RuntimeError, match=words):
    tcl.center_loss(features, labels, centers, impl="native")
