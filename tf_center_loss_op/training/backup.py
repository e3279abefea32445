"""A Keras callback that resumes a killed `fit`, from a backup that is complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import _arguments, tables
from tf_center_loss_op.distribute import ShardedCenters
from tf_center_loss_op.layer import CenterLoss

_STATE = "state.json"


class AtomicBackup(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` whose backups are whole, and resumed from bit for bit.

    Takes the same arguments and stands in its place. What differs:

    - Keras writes over its last backup: a job killed meanwhile is left with half a file, or with
      weights of one epoch and the number of another. Here a backup gets its name only when it is
      complete and on the disk, and the one before goes only then.
    - Keras leaves out the states of random generators (dropout, say); here every variable of model
      and optimizer is in it.
    - With ``save_freq`` a number, Keras begins the epoch anew with weights from its middle. Here
      the batches that were trained are taken from the data again, but not trained on again, and
      the metrics go on where they were.
    - A large table is written and read block by block.

    A resumed `fit` continues bit for bit as one that was not interrupted, if its data of epoch k
    are the same in both: a dataset that does not shuffle, or shuffles by a seed and the epoch. Not
    in a backup, as in Keras's: the states of other callbacks, and of random numbers drawn outside
    of the model. Under a strategy of several replicas in one process that holds for the same number
    of replicas; what each has of its own (moving statistics, for one) and parts of `ShardedCenters`
    are in the backup.

    Args:
      backup_dir: a folder for the backups of this one training, made where there is none.
      save_freq: ``"epoch"``, or after how many batches a backup is written; False: never, it only
        resumes.
      double_checkpoint: whether the backup before the last is kept, too. It is resumed from where
        the last one has been damaged on the disk since.
      delete_checkpoint: whether the backups are removed when `fit` has ended by itself.

    Raises:
      ValueError: an argument is wrong; or at the start of `fit`: the model is not built, its
        replicas are in several processes, the backup is of a model with other variables, or it is
        damaged. Nothing has been loaded.

    >>> import tf_center_loss_op as tcl
    >>> callback = tcl.training.AtomicBackup("backup", save_freq=1000)
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ):
        super().__init__(os.fspath(backup_dir), save_freq, double_checkpoint, delete_checkpoint)
        if save_freq != "epoch" and save_freq is not False:
            _arguments.positive("save_freq", save_freq)
        self.backup_dir = Path(backup_dir)

    def on_train_begin(self, logs=None):
        """Loads the last complete backup, if there is one."""
        if not self.model.built:
            raise ValueError("model: expected a built model, call it on a batch before fit()")
        _require_all_replicas_here(self.model.distribute_strategy)
        self._epoch, self._batch, self._since = 0, 0, 0
        self._resumed = (0, 0)
        damages = []
        for folder in reversed(self._backups()):
            try:
                state = _checked(folder)
            except (OSError, ValueError, EOFError) as error:
                damages.append(f"{os.fspath(folder)!r}: {error}")
                continue
            for damage in damages:
                warnings.warn(
                    f"A backup is damaged, the one before is used: {damage}", stacklevel=2
                )
            self._load(folder, state)
            return
        if damages:
            raise ValueError(f"backup_dir: expected complete backups, got {'; '.join(damages)}")

    def on_epoch_begin(self, epoch, logs=None):
        """Counts."""
        self._epoch, self._batch = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        """Writes a backup, if so many batches have passed."""
        # Several at once with steps_per_execution.
        before, self._batch = self._batch, batch + 1
        if self.save_freq in ("epoch", False) or (self._epoch, self._batch) <= self._resumed:
            return
        self._since += self._batch - before
        if self._since >= self.save_freq:
            self._since = 0
            self._save(self._epoch, self._batch)

    def on_epoch_end(self, epoch, logs=None):
        """Writes a backup, if wanted."""
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0)

    def on_train_end(self, logs=None):
        """Removes the backups, if wanted."""
        if self.delete_checkpoint and self.backup_dir.exists():
            for folder in self._backups():
                _remove(folder)
            shutil.rmtree(self.backup_dir)

    def _save(self, epoch, batch):
        """Writes a backup after `batch` batches of the epoch, then removes the older ones."""
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        older = self._backups()
        for folder in self.backup_dir.iterdir():
            # Of a process that was killed while it wrote or removed them.
            if folder not in older and (folder.suffix == ".partial" or folder.name.isdecimal()):
                shutil.rmtree(folder)
        partial = self.backup_dir / "new.partial"
        partial.mkdir()
        variables = self._variables()
        # `fit` resets them at the start of an epoch.
        metrics = self.model.metrics_variables if batch else []
        state = {"epoch": epoch, "batch": batch}
        state |= {"variables": _describe(variables), "metrics": _describe(metrics)}
        state |= {"copies": [self._write(partial, k, v) for k, v in enumerate(variables + metrics)]}
        (partial / _STATE).write_text(json.dumps(state))
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        # A name of its own, so that it never has to make way for another.
        partial.rename(self.backup_dir / str(int(older[-1].name) + 1 if older else 1))
        _to_disk(self.backup_dir)
        for folder in older[:-1] if self.double_checkpoint else older:
            _remove(folder)

    def _load(self, folder, state):
        variables = self._variables()
        if state["variables"] != _describe(variables):
            raise ValueError(
                f"backup_dir: expected a backup of this model, got one of other variables in "
                f"{os.fspath(folder)!r}"
            )
        for k, variable in enumerate(variables):
            self._read(folder, k, variable, state["copies"][k])
        # What fit() starts from; Keras has no public name for it.
        self.model._initial_epoch = state["epoch"]
        if state["batch"]:
            self._resumed = state["epoch"], state["batch"]

            def read_metrics():
                for k, variable in enumerate(self.model.metrics_variables, len(variables)):
                    self._read(folder, k, variable, state["copies"][k])

            self._skip(state["batch"], read_metrics)

    def _skip(self, batches, read_metrics):
        """Lets `fit` take so many batches without training on them, then train as before."""
        model, train, taken = self.model, self.model.train_function, 0

        def skip(iterator):
            nonlocal taken
            step = [next(iterator, None) for _ in range(model.steps_per_execution)]
            if step[0] is None:
                raise StopIteration
            if not taken:
                # Metrics make their variables when they first see data.
                model._symbolic_build(data_batch=step[0])
                read_metrics()
            taken += len(step)
            if taken >= batches:
                model.train_function = train
            return model.get_metrics_result()

        model.train_function = skip

    def _write(self, folder, k, variable):
        """Writes a variable; how many copies of it have a file of their own.

        Replicas have copies that differ of what each of them writes for itself: the sums of a
        metric, statistics of its batches.
        """
        if _is_table(variable):
            # All replicas' copies of it are equal.
            tables.save_centers(variable, _path(folder, k))
            return 0
        whole, copies = keras.ops.convert_to_numpy(variable), self._copies(variable)
        arrays = [copy.numpy() for copy in copies] if len(copies) > 1 else []
        np.save(_path(folder, k), whole)
        if all(array.tobytes() == whole.tobytes() for array in arrays):
            return 0
        for replica, array in enumerate(arrays):
            np.save(_path(folder, k, replica), array)
        return len(arrays)

    def _read(self, folder, k, variable, own):
        """As `_write` wrote it; on another number of replicas the same for all of them."""
        if _is_table(variable):
            tables.load_centers(variable, _path(folder, k))
            return
        variable.assign(_array(_path(folder, k), variable))
        copies = self._copies(variable)
        if len(copies) == own:
            for replica, copy in enumerate(copies):
                copy.assign(_array(_path(folder, k, replica), variable))

    def _copies(self, variable):
        """The copy of each replica, or the one that there is."""
        strategy = self.model.distribute_strategy
        return strategy.experimental_local_results(_arguments.unwrap(variable))

    def _variables(self):
        """Every variable but the metrics': weights, random states, the optimizer's."""
        layers = self.model._flatten_layers(include_self=False)
        centers = [layer.centers for layer in layers if isinstance(layer, CenterLoss)]
        # Keras does not know the parts of sharded ones.
        sharded = [table for table in centers if isinstance(table, ShardedCenters)]
        parts = [part for table in sharded for _, part in table.shards]
        optimizer = self.model.optimizer
        if optimizer is None:
            return [*self.model.variables, *parts]
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        return [*self.model.variables, *parts, *optimizer.variables]

    def _backups(self):
        """The folder of each complete backup, oldest first."""
        folders = [path.parent for path in self.backup_dir.glob("*/" + _STATE)]
        folders = [folder for folder in folders if folder.name.isdecimal()]
        return sorted(folders, key=lambda folder: int(folder.name))


def _require_all_replicas_here(strategy):
    count = strategy.num_replicas_in_sync
    here = len(strategy.extended.worker_devices) if count > 1 else 1
    if here < count:
        raise ValueError(
            f"strategy: expected all replicas in one process, got {type(strategy).__name__} with "
            f"{here} of {count} in this one: use tf.train.CheckpointManager and "
            "ShardedCenters.save in a training loop"
        )


def _describe(variables):
    return [[tf.as_dtype(variable.dtype).name, list(variable.shape)] for variable in variables]


def _path(folder, k, replica=None):
    return folder / (f"{k}.npy" if replica is None else f"{k}-{replica}.npy")


def _checked(folder):
    """The state of a backup whose files are whole."""
    state = json.loads((folder / _STATE).read_text())
    expected = [*state["variables"], *state["metrics"]]
    for k, ((_, shape), own) in enumerate(zip(expected, state["copies"], strict=True)):
        for path in (_path(folder, k), *(_path(folder, k, replica) for replica in range(own))):
            # Maps the file, and so looks at its size, but reads none of it. No map of no bytes.
            whole = np.load(path, mmap_mode="r" if np.prod(shape) else None)
            if list(whole.shape) != shape:
                raise ValueError(f"{path.name}: expected shape {tuple(shape)}, got {whole.shape}")
    return state


def _array(path, variable):
    # NumPy's files do not know bfloat16: it comes back as bytes.
    return np.load(path).view(tf.as_dtype(variable.dtype).as_numpy_dtype)


def _is_table(variable):
    """Whether a copy of it would be felt."""
    bytes_of = np.prod(variable.shape) * tf.as_dtype(variable.dtype).size
    return len(variable.shape) == 2 and bytes_of > tables.BLOCK_BYTES


def _remove(folder):
    # The state first: half a folder must not look like a backup.
    (folder / _STATE).unlink()
    shutil.rmtree(folder)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
