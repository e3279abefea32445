"""A Keras callback that resumes a killed `fit`, from a backup that is complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import keras

_WEIGHTS, _STATE = "model.weights.h5", "state.json"


class AtomicBackup(keras.callbacks.Callback):
    """Backs up model, optimizer and epoch after every epoch, and resumes from it in `fit`.

    `keras.callbacks.BackupAndRestore` writes over its last backup: a job killed meanwhile is left
    with half a file, or with weights of one epoch and the number of another. Here a backup gets
    its name only when it is complete and on the disk, and the one before goes only then.

    A resumed `fit` continues bit for bit as one that was not interrupted, if its data of epoch k
    are the same in both (a dataset that does not shuffle, or shuffles by a seed and the epoch).

    Args:
      backup_dir: a folder for the backups of this one training, made where there is none. A backup
        holds a copy of the centers; those of large tables take as long as writing them does.
      delete_at_end: whether to remove the backups when `fit` has ended by itself.

    >>> import tf_center_loss_op as tcl
    >>> callback = tcl.AtomicBackup("backup")
    """

    def __init__(self, backup_dir: str | os.PathLike, *, delete_at_end: bool = True):
        super().__init__()
        self.backup_dir = Path(backup_dir)
        self.delete_at_end = delete_at_end

    def on_train_begin(self, logs=None):
        """Loads the last complete backup, if there is one."""
        if not self.model.built:
            raise ValueError("model: expected a built model, call it on a batch before fit()")
        backups = self._backups()
        if not backups:
            return
        epochs, folder = backups[-1]
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self.model.load_weights(folder / _WEIGHTS)
        # What fit() starts from; Keras has no public name for it.
        self.model._initial_epoch = epochs

    def on_epoch_end(self, epoch, logs=None):
        """Writes a backup, then removes the older ones."""
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        older = [folder for _, folder in self._backups()]
        for folder in self.backup_dir.glob("*.partial"):
            shutil.rmtree(folder)
        partial = self.backup_dir / "new.partial"
        partial.mkdir()
        self.model.save_weights(partial / _WEIGHTS)
        (partial / _STATE).write_text(json.dumps({"epochs": epoch + 1}))
        for path in (partial / _WEIGHTS, partial / _STATE, partial):
            _to_disk(path)
        # A name of its own, so that it never has to make way for another.
        names = [int(folder.name) for folder in older if folder.name.isdecimal()]
        partial.rename(self.backup_dir / str(max(names, default=0) + 1))
        _to_disk(self.backup_dir)
        for folder in older:
            shutil.rmtree(folder)

    def on_train_end(self, logs=None):
        """Removes the backups, if wanted."""
        if self.delete_at_end and self.backup_dir.exists():
            shutil.rmtree(self.backup_dir)

    def _backups(self):
        """(epochs, folder) of each complete backup, oldest first."""
        folders = [path.parent for path in self.backup_dir.glob("*/" + _STATE)]
        folders = [folder for folder in folders if folder.name.isdecimal()]
        folders.sort(key=lambda folder: int(folder.name))
        return [(json.loads((f / _STATE).read_text())["epochs"], f) for f in folders]


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
