"""Steps of two replicas between other ops with side effects; for test_distribute.py."""

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import C, D, batches, mirrored_table, sharded_table
from replicas import mirrored, spread

strategy = mirrored(2)


def step_between_side_effects(centers):
    """A step with ops before and after it that TensorFlow runs in program order."""

    @tf.function(autograph=False)
    def run(features, labels):
        def step(features, labels):
            check = tf.debugging.Assert(tf.reduce_all(labels >= 0), [labels])
            with tf.control_dependencies([check]):
                features = tf.identity(features)
                loss = tcl.center_loss(features, tf.identity(labels), centers)
            tf.debugging.Assert(loss >= 0, [loss])
            tf.print("loss", loss, output_stream="file:///dev/null")
            return loss

        return strategy.run(step, args=(features, labels))

    return run


for table in (mirrored_table, sharded_table):
    make, _ = table(strategy)
    run = step_between_side_effects(make(np.zeros([C, D], "f")))
    features, ids = batches(2, 0)
    run(spread(strategy, features), spread(strategy, ids))
