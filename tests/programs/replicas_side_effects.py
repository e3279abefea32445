"""Steps of two replicas beside ops with side effects; for test_distribute.py.

TensorFlow runs such ops in the order in which they were traced: those of the second replica after
those of the first.
"""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import C, D, batches, mirrored_table, sharded_table
from replicas import mirrored, spread

strategy = mirrored(2)


def step_beside_side_effects(centers, before, after):
    """A step whose features an op with side effects computes, or whose loss one uses, or both."""

    @tf.function(autograph=False)
    def run(features, labels):
        def step(features, labels):
            if before:
                check = tf.debugging.Assert(tf.reduce_all(labels >= 0), [labels])
                with tf.control_dependencies([check]):
                    features, labels = tf.identity(features), tf.identity(labels)
            loss = tcl.center_loss(features, labels, centers)
            if after:
                tf.debugging.Assert(loss >= 0, [loss])
                tf.print("loss", loss, output_stream="file:///dev/null")
            return loss

        return strategy.run(step, args=(features, labels))

    features, ids = batches(2, 0)
    return run(spread(strategy, features), spread(strategy, ids))


for table in (mirrored_table, sharded_table):
    make, _ = table(strategy)
    centers = make(np.zeros([C, D], "f"))
    step_beside_side_effects(centers, before=True, after=False)
    step_beside_side_effects(centers, before=False, after=True)
    # Both would wait for each other.
    words = "strategy: expected features and labels that no op with side effects computes"
    with pytest.raises(ValueError, match=words):
        step_beside_side_effects(centers, before=True, after=True)
