"""Trains with tf.train.Checkpoint as in docs/training.md, or resumes; for test_resume.py.

Writes end.npz.
"""

import tensorflow as tf

import resumable_training

model, inputs, labels = resumable_training.begin()
dataset = tf.data.Dataset.from_tensor_slices(((inputs, labels), labels)).shuffle(256, seed=7)
batches = iter(dataset.batch(32).repeat(4))
model.optimizer.build(model.trainable_variables)
variables = [v.value for v in [*model.variables, *model.optimizer.variables]]
state = tf.train.Checkpoint(variables=variables, batches=batches)
manager = tf.train.CheckpointManager(state, "checkpoints", max_to_keep=2)
state.restore(manager.latest_checkpoint)
for batch, target in batches:
    model.train_on_batch(batch, target)
    manager.save()
    resumable_training.rest()
resumable_training.end(model)
