"""Errors on two replicas, which leave the centers as they were; for test_distribute.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from replica_checks import C, D, batches, mirrored_table, sharded_table, step_of
from replicas import mirrored, spread

strategy = mirrored(2)

make, tables_of = mirrored_table(strategy)
start = np.ones([C, D], "f")
features, ids = batches(2, 0)
good = spread(strategy, features), spread(strategy, ids)

# A label of one replica is out of range: all replicas raise, no copy moves, the next step works.
for table in (mirrored_table, sharded_table):
    make, tables_of = table(strategy)
    centers = make(start)
    run = step_of(strategy, centers)
    wrong = [ids[0], np.full_like(ids[1], C)]
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels"):
        run(good[0], spread(strategy, wrong))
    for first, rows in tables_of(centers):
        assert np.array_equal(rows, start[first : first + len(rows)])
    run(*good)
    truth = oracle.center_loss(np.concatenate(features), np.concatenate(ids), start)
    for first, rows in tables_of(centers):
        expected = truth.centers[first : first + len(rows)]
        np.testing.assert_allclose(rows, expected, rtol=1e-6)

# The variable of alpha holds a negative number.
alpha = tf.Variable(-1.0)
centers = mirrored_table(strategy)[0](start)
with pytest.raises(tf.errors.InvalidArgumentError, match="alpha: expected a finite"):
    step_of(strategy, centers, alpha=alpha)(*good)

with pytest.raises(ValueError, match=r"made in strategy.scope\(\)"):
    step_of(strategy, tf.Variable(start))(*good)
with strategy.scope():
    with pytest.raises(ValueError, match="expected a call in a replica"):
        tcl.center_loss(features[0], ids[0], centers)
    # A call without an update is allowed.
    tcl.center_loss(features[0], ids[0], centers, update_centers=False)
    with pytest.raises(ValueError, match="num_classes: expected at least one for each"):
        tcl.distribute.ShardedCenters(1, D)
    with pytest.raises(ValueError, match="initializer: expected zeros"):
        tcl.distribute.ShardedCenters(C, D, initializer="glorot_uniform")
    sharded = tcl.distribute.ShardedCenters(C, D)
    with pytest.raises(ValueError, match="expected a call in a replica"):
        tcl.center_loss(features[0], ids[0], sharded)
with pytest.raises(ValueError, match="strategy of 2 replicas"):
    tcl.center_loss(features[0], ids[0], sharded)


@tf.function(jit_compile=True)
def compiled(features, labels):
    return tcl.center_loss(features, labels, centers)


with pytest.raises(ValueError, match="jit_compile: expected False"):
    tf.function(lambda *args: strategy.run(compiled, args=args))(*good)

with strategy.scope():
    inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
    model = keras.Model([inputs, label], tcl.CenterLoss(C)([inputs, label]))
    model.compile("sgd", run_eagerly=True)
with pytest.raises(RuntimeError, match="run_eagerly: expected False"):
    model.fit([np.ones([4, D], "f"), np.zeros([4], "i")], batch_size=4, verbose=0)
