"""Trains on two workers for 12 steps, or resumes; for test_distribute_workers.py.

Mirrored and sharded centers, a trained kernel, and a checkpoint after each step.

Prints "resumed at N" and "done N"; writes end-WORKER.npz.
"""

import keras
import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import C, D, worker
from replicas import copies, spread

strategy = tf.distribute.MultiWorkerMirroredStrategy()

STEPS = 12
rng = np.random.default_rng(5)
data = [(rng.normal(size=(8, D)).astype("f"), rng.integers(0, C, 8)) for _ in range(STEPS)]
with strategy.scope():
    kernel = tf.Variable(np.eye(D, dtype="f"))
    centers = tf.Variable(tf.zeros([C, D]), trainable=False)
    sharded = tcl.distribute.ShardedCenters(C, D)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build([kernel])
done = tf.Variable(0, dtype=tf.int64, trainable=False)


@tf.function(autograph=False)
def train(features, labels):
    def step(features, labels):
        with tf.GradientTape() as tape:
            x = features @ kernel
            loss = tcl.center_loss(x, labels, centers) + tcl.center_loss(x, labels, sharded)
        optimizer.apply([tape.gradient(loss, kernel)], [kernel])

    strategy.run(step, args=(features, labels))


# All workers write, as some strategies require; all restore the first one's checkpoint.
state = tf.train.Checkpoint(kernel=kernel, centers=centers, done=done)
latest = tf.train.latest_checkpoint("checkpoints-0")
if latest:
    state.restore(latest).assert_consumed()
    sharded.load(f"shards-{int(done)}")
manager = tf.train.CheckpointManager(state, f"checkpoints-{worker()}", max_to_keep=3)
print("resumed at", int(done), flush=True)
while int(done) < STEPS:
    features, labels = data[int(done)]
    half = np.array_split(np.arange(8), 2)[worker()]
    own = {worker(): features[half]}, {worker(): labels[half]}
    train(*[spread(strategy, part) for part in own])
    done.assign_add(1)
    sharded.save(f"shards-{int(done)}")
    manager.save(int(done))
    print("done", int(done), flush=True)
np.savez(f"end-{worker()}.npz", kernel.numpy(), copies(strategy, centers), sharded.shards[0][1])
