"""Trains on two replicas to the end, then anew until it kills itself; run again, resumes that.

For test_resume.py. The replicas differ in the statistics of their batches, the shards of a table
and the metrics.
"""

import os
import signal

import keras
import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import C, D, main_loss
from replicas import mirrored

strategy = mirrored(2)

rng = np.random.default_rng(0)
x, y = rng.normal(size=(34, D)).astype("f"), rng.integers(0, C, 34)
data = tf.data.Dataset.from_tensor_slices(((x, y), y)).batch(8)


def end_of_training(*callbacks):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
        z = keras.layers.Dropout(0.1)(keras.layers.Dense(D)(inputs))
        z = keras.layers.BatchNormalization()(z)
        layers = [tcl.CenterLoss(C, loss_weight=0.1, sharded=sharded) for sharded in (False, True)]
        for layer in layers:
            z = layer(z, labels)
        model = keras.Model([inputs, labels], keras.layers.Dense(C)(z))
        model.compile("adam", tcl.distribute.GlobalBatchLoss(main_loss()), metrics=["accuracy"])
    logs = model.fit(data, epochs=2, verbose=0, callbacks=[*callbacks]).history
    variables = [v.value for v in model.variables + model.optimizer.variables]
    variables += [part for _, part in layers[1].centers.shards]
    copies = [c for v in variables for c in strategy.experimental_local_results(v)]
    return {str(k): copy.numpy() for k, copy in enumerate(copies)} | {k: logs[k][-1] for k in logs}


def kill_after_the_second_backup(batch, logs):
    if os.path.exists("backup/backup-4"):
        os.kill(os.getpid(), signal.SIGKILL)


backup = tcl.training.AtomicBackup("backup", save_freq=2)
if not os.path.exists("backup"):
    np.savez("whole.npz", **end_of_training())
    end_of_training(
        backup, keras.callbacks.LambdaCallback(on_train_batch_begin=kill_after_the_second_backup)
    )
assert sorted(os.listdir("backup")) == ["backup-4"]
resumed = end_of_training(backup)
with np.load("whole.npz") as whole:
    assert whole.files == list(resumed)
    for name in whole.files:
        assert np.isfinite(resumed[name]).all() and np.array_equal(whole[name], resumed[name]), name
