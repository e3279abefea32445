"""Functions, layers and files on two workers; for test_distribute_workers.py.

Writes centers-WORKER.npy.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import (
    CASES,
    C,
    D,
    check_fit,
    check_functions,
    mirrored_table,
    sharded_table,
    worker,
)
from replicas import copies

strategy = tcl.distribute.MultiWorkerMirroredStrategy()

check_functions(strategy, "auto", *mirrored_table(strategy))
check_functions(strategy, "auto", *sharded_table(strategy), cases=CASES[:2])
check_functions(strategy, "auto", *mirrored_table(strategy), cases=CASES[:2], eager=True)
check_fit(strategy, [{"loss": None, "ignore_class": 3}, {"sharded": True}])

# Every worker writes its shard and one process reads all of them; then the reverse.
with strategy.scope():
    two = tcl.distribute.ShardedCenters(C, D, initializer=tcl.tables.RandomNormal(1.0, seed=3))
two.save("saved")
two.save("saved")
expected = tcl.tables.create(C, D, initializer=tcl.tables.RandomNormal(1.0, seed=3)).numpy()
one = tcl.distribute.ShardedCenters(C, D)
one.load("saved")
assert np.array_equal(one.shards[0][1].numpy(), expected)
one.save(f"alone-{worker()}")
two.shards[0][1].assign(tf.zeros_like(two.shards[0][1]))
two.load(f"alone-{worker()}")
first, part = two.shards[0]
assert first == (0, 11)[worker()]
assert np.array_equal(part.numpy(), expected[first : first + part.shape[0]])
# Keras would write a file with one shard only.
with pytest.raises(ValueError, match=r"expected layer.centers.save\(folder\) on every worker"):
    two.save_own_variables({})
backup = tcl.training.AtomicBackup("backup")
with strategy.scope():
    backup.set_model(keras.Sequential([keras.Input([2]), keras.layers.Dense(1)]))
# Both workers would write to one folder.
with pytest.raises(ValueError, match="strategy: expected all replicas in one process"):
    backup.on_train_begin()
layer = check_fit(strategy, [{"deferred_update": True}])
np.save(f"centers-{worker()}.npy", copies(strategy, layer.centers.value))
