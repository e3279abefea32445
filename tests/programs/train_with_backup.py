"""Trains with AtomicBackup, or resumes, until it is killed or ends; for test_resume.py.

Writes end.npz.
"""

import keras

import resumable_training
import tf_center_loss_op as tcl

model, inputs, labels = resumable_training.begin()
callbacks = [
    tcl.training.AtomicBackup("backup", save_freq=3),
    keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: resumable_training.rest()),
]
model.fit([inputs, labels], labels, batch_size=32, epochs=4, verbose=0, callbacks=callbacks)
resumable_training.end(model)
