"""Ops with side effects around the steps of two replicas; for test_distribute.py."""

import time

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from messages import with_words
from replica_checks import C, D, batches, mirrored_table, sharded_table
from replicas import mirrored, spread

strategy = mirrored(2)
features, ids = batches(2, 0)


def append(what, *numbers):
    if what == b"before":
        time.sleep(0.3)  # All later ops of the program must wait for it.
    seen.append((what.decode(), *(float(number) for number in numbers)))


for table in (mirrored_table, sharded_table):
    make, _ = table(strategy)
    centers = make(np.zeros([C, D], "f"))
    seen = []

    @tf.function(autograph=False)
    def in_program_order(features, labels):
        def step(features, labels):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            tf.numpy_function(append, ["before", replica], [])
            loss = tcl.center_loss(features, labels, centers)  # noqa: B023
            tf.numpy_function(append, ["after", replica, loss], [])

        strategy.run(step, args=(features, labels))

    in_program_order(spread(strategy, features), spread(strategy, ids))
    assert [each[:2] for each in seen] == [
        ("before", 0.0),
        ("after", 0.0),
        ("before", 1.0),
        ("after", 1.0),
    ], seen

    @tf.function(autograph=False)
    def two_losses(features, labels):
        def step(features, labels):
            loss = tcl.center_loss(features, labels, centers)  # noqa: B023
            tf.numpy_function(append, ["between", loss], [])
            more = tf.numpy_function(lambda x: 2 * x, [features], tf.float32)
            more = tf.ensure_shape(more, features.shape)
            return loss + tcl.center_loss(more, labels, centers)  # noqa: B023

        return strategy.run(step, args=(features, labels))

    # A replica's op waits for its own first exchange only, and not for that of the second loss.
    two_losses(spread(strategy, features), spread(strategy, ids))
    assert [each[0] for each in seen[4:]] == ["between"] * 2

    @tf.function(autograph=False)
    def waiting_for_each_other(features, labels):
        def step(features, labels):
            check = tf.debugging.Assert(tf.reduce_all(labels >= 0), [labels])
            with tf.control_dependencies([check]):
                features = tf.identity(features)
            loss = tcl.center_loss(features, labels, centers)  # noqa: B023
            tf.print("loss", loss)

        strategy.run(step, args=(features, labels))

    words = with_words("strategy: expected", "(Assert)", "(PrintV2)", "strategy.run")
    with pytest.raises(ValueError, match=words):
        waiting_for_each_other(spread(strategy, features), spread(strategy, ids))
