"""A table on one parameter server: the fused op runs beside it; for test_distribute_servers.py."""

import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from parameter_servers import (
    C,
    D,
    assert_equal,
    check_step,
    coordinator,
    features,
    labels,
    scheduled,
    start,
)

strategy, queue = coordinator()
with strategy.scope():
    centers = tf.Variable(start, trainable=False)
    layer = tcl.CenterLoss(C)
    layer.build((None, D))
assert "/job:ps/" in centers.device
step = check_step(queue, centers, centers.numpy)
graph = step.get_concrete_function(tf.constant(features), tf.constant(labels)).graph
assert "TclCenterLossStep" in [op.type for op in graph.get_operations()]


@tf.function
def train(features, labels):
    layer(features, labels, training=True)
    return layer.losses[0]


result = scheduled(queue, train)
expected = oracle.center_loss(features, labels, np.zeros([C, D]))
assert_equal(result, expected.loss)
assert_equal(layer.centers.numpy(), expected.centers)

with strategy.scope():
    with pytest.raises(ValueError, match="ParameterServerStrategy splits tables itself"):
        tcl.distribute.ShardedCenters(C, D)
