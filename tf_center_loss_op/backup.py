"""A Keras callback that resumes a killed `fit`, from a backup that is complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import keras
import numpy as np

from tf_center_loss_op import tables

_STATE = "state.json"


class AtomicBackup(keras.callbacks.Callback):
    """Backs up model, optimizer and epoch after every epoch, and resumes from it in `fit`.

    `keras.callbacks.BackupAndRestore` writes over its last backup: a job killed meanwhile is left
    with half a file, or with weights of one epoch and the number of another. Here a backup gets
    its name only when it is complete and on the disk, and the one before goes only then.

    A resumed `fit` continues bit for bit as one that was not interrupted, if its data of epoch k
    are the same in both (a dataset that does not shuffle, or shuffles by a seed and the epoch).

    Args:
      backup_dir: a folder for the backups of this one training, made where there is none.
      delete_at_end: whether to remove the backups when `fit` has ended by itself.

    Raises:
      ValueError: at the start of `fit`: the model is not built, or the backup is of a model with
        other variables. Nothing has been loaded.

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
        state, folder = backups[-1]
        variables = self._variables()
        if state["variables"] != _describe(variables):
            raise ValueError(
                f"backup_dir: expected a backup of this model, got one of other variables in "
                f"{os.fspath(folder)!r}"
            )
        for variable, path in zip(variables, _paths(folder, variables), strict=True):
            if _is_table(variable):
                tables.load_centers(variable, path)
            else:
                variable.assign(np.load(path))
        # What fit() starts from; Keras has no public name for it.
        self.model._initial_epoch = state["epochs"]

    def on_epoch_end(self, epoch, logs=None):
        """Writes a backup, then removes the older ones."""
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        older = [folder for _, folder in self._backups()]
        for folder in self.backup_dir.glob("*.partial"):
            shutil.rmtree(folder)
        partial = self.backup_dir / "new.partial"
        partial.mkdir()
        variables = self._variables()
        paths = _paths(partial, variables)
        for variable, path in zip(variables, paths, strict=True):
            if _is_table(variable):
                tables.save_centers(variable, path)
            else:
                np.save(path, keras.ops.convert_to_numpy(variable))
        state = {"epochs": epoch + 1, "variables": _describe(variables)}
        (partial / _STATE).write_text(json.dumps(state))
        for path in (*paths, partial / _STATE, partial):
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

    def _variables(self):
        # With the states of metrics and random generators.
        optimizer = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        return [*self.model.variables, *optimizer.variables]

    def _backups(self):
        """(state, folder) of each complete backup, oldest first."""
        folders = [path.parent for path in self.backup_dir.glob("*/" + _STATE)]
        folders = [folder for folder in folders if folder.name.isdecimal()]
        folders.sort(key=lambda folder: int(folder.name))
        return [(json.loads((folder / _STATE).read_text()), folder) for folder in folders]


def _describe(variables):
    return [[str(variable.dtype), list(variable.shape)] for variable in variables]


def _paths(folder, variables):
    return [folder / f"{k}.npy" for k in range(len(variables))]


def _is_table(variable):
    """Whether a copy of it would be felt."""
    bytes_of = np.prod(variable.shape) * np.dtype(variable.dtype).itemsize
    return len(variable.shape) == 2 and bytes_of > tables.BLOCK_BYTES


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
