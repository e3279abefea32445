"""Saves the shards of four replicas and restores them on one, and back; for test_distribute.py."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import AddsAnother, C, D, trained
from replicas import mirrored

strategy = mirrored(4)


def whole(centers):
    parts = [part.numpy() for _, part in centers.shards]
    assert sum(map(len, parts)) == C
    return np.concatenate(parts)


random = tcl.tables.RandomNormal(1.0, seed=3)
with strategy.scope():
    four = tcl.distribute.ShardedCenters(C, D, initializer=random)
# A table has the same initial numbers with any number of shards, and without.
expected = tcl.tables.create(C, D, initializer=random).numpy()
assert np.array_equal(whole(four), expected)
assert [first for first, _ in four.shards] == [0, 5, 11, 17]

four.save("saved")
tf.train.Checkpoint(centers=four).write("checkpoint")
one = tcl.distribute.ShardedCenters(C, D)
one.load("saved")
assert np.array_equal(whole(one), expected)
one = tcl.distribute.ShardedCenters(C, D)
tf.train.Checkpoint(centers=one).read("checkpoint").assert_consumed()
assert np.array_equal(whole(one), expected)

# A second save, from one replica to four, replaces the first and leaves none of its files.
one.shards[0][1].assign(2 * expected)
one.save("saved")
tf.train.Checkpoint(centers=one).write("checkpoint")
assert len(os.listdir("saved")) == 2
four.load("saved")
assert np.array_equal(whole(four), 2 * expected)
with strategy.scope():
    again = tcl.distribute.ShardedCenters(C, D)
tf.train.Checkpoint(centers=again).read("checkpoint").assert_consumed()
assert np.array_equal(whole(again), 2 * expected)

# A truncated save is refused.
for path in os.listdir("saved"):
    if path.endswith(".npy"):
        os.truncate(os.path.join("saved", path), 100)
with pytest.raises(ValueError, match="folder: expected a complete .npy file"):
    again.load("saved")
with pytest.raises(ValueError, match=r"folder: expected a table float32 \(3, 2\)"):
    tcl.distribute.ShardedCenters(3, 2).load("saved")
with pytest.raises(FileNotFoundError, match="nothing"):
    again.load("nothing")

# Keras saves and loads a whole model.
model, _, layer = trained(strategy.scope(), sharded=True)
model.save("model.keras")
loaded = keras.saving.load_model(
    "model.keras", custom_objects={"AddsAnother": AddsAnother, "Model": keras.Model}
)
assert np.array_equal(whole(loaded.get_layer("centers").centers), whole(layer.centers))
model.save_weights("model.weights.h5")
trained_centers = whole(layer.centers)
for _, part in layer.centers.shards:
    part.assign(tf.zeros_like(part))
model.load_weights("model.weights.h5")
assert np.array_equal(whole(layer.centers), trained_centers)
assert np.abs(whole(layer.centers)).max() > 0.01
