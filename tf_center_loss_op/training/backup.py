"""A Keras callback that resumes an interrupted `fit` from a complete backup."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments, private_apis
from tf_center_loss_op._core.keras_backend import require_keras_on_tensorflow
from tf_center_loss_op._core.variables import unwrap
from tf_center_loss_op.layer import CenterLoss
from tf_center_loss_op.tables import whole_files
from tf_center_loss_op.training import backup_files


class AtomicBackup(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` with complete backups, which resume bit for bit.

    Replaces, with the same arguments:

        keras.callbacks.BackupAndRestore(backup_dir, save_freq)

    It differs in these points:

    - Keras overwrites its last backup: a job that is killed meanwhile leaves half a file, or the
      weights of one epoch with the number of another. Here a backup gets its name only when it is
      complete and on the disk, and only then the previous one is removed.
    - Keras omits the states of random generators, of dropout for example. Here a backup holds every
      variable of the model and the optimizer.
    - With a number as ``save_freq``, Keras repeats the epoch from its start with weights from its
      middle. Here `fit` takes the batches that were trained from the data again without training on
      them again, and the metrics continue from their values.
    - A large table is written and read block by block.

    A resumed `fit` continues bit for bit as one that was not interrupted, if the data of epoch k
    are the same in both: those of a dataset that does not shuffle, or shuffles by a seed and the
    epoch. As in Keras, a backup does not hold the states of other callbacks, nor of random
    generators outside of the model. Under a strategy of several replicas in one process the same
    holds for the same number of replicas: a backup holds what each replica has of its own (moving
    statistics, for example) and the rows of `ShardedCenters`.

    Args:
      backup_dir: a folder for the backups of one training, created where it is missing.
      save_freq: ``"epoch"``; or an int >= 1, the number of batches from one backup to the next; or
        False, to resume only and write no backup.
      double_checkpoint: whether to keep the backup before the last one, too. `fit` resumes from it
        if the last one has been damaged on the disk since.
      delete_checkpoint: whether to remove the backups when `fit` has ended without an interruption,
        and their folder if nothing else is in it. Other files stay.

    Raises:
      TypeError, ValueError: an argument is wrong.
      ValueError: at the start of `fit`, the model is not built, its replicas are in several
        processes, the backup is of a model with other variables, or all backups are damaged.
        Nothing has been loaded then.

    Determinism: a resumed `fit` gives the bits of an uninterrupted one, under the conditions above.

    >>> import tf_center_loss_op as tcl
    >>> callback = tcl.training.AtomicBackup("backup", save_freq=1000)
    """

    def __init__(
        self,
        backup_dir: str | bytes | os.PathLike,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ):
        require_keras_on_tensorflow("AtomicBackup")
        backup_dir = whole_files.checked_path("backup_dir", backup_dir)
        if save_freq is not False and not (isinstance(save_freq, str) and save_freq == "epoch"):
            save_freq = arguments.positive("save_freq", save_freq)
        super().__init__(backup_dir, save_freq, double_checkpoint, delete_checkpoint)
        self.backup_dir = Path(backup_dir)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Loads the last complete backup, if there is one."""
        if not self.model.built:
            raise ValueError("model: expected a built model, call it on a batch before fit()")
        _require_all_replicas_here(self.model.distribute_strategy)
        self._epoch, self._batch, self._since = 0, 0, 0
        self._resumed = (0, 0)
        damages = []
        for folder in reversed(backup_files.complete_backups(self.backup_dir)):
            try:
                state = backup_files.checked_state(folder)
            except (OSError, ValueError) as error:
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

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers the epoch."""
        self._epoch, self._batch = epoch, 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Writes a backup every `save_freq` batches."""
        # With steps_per_execution, one call stands for several batches.
        before, self._batch = self._batch, batch + 1
        if self.save_freq in ("epoch", False) or (self._epoch, self._batch) <= self._resumed:
            return
        self._since += self._batch - before
        if self._since >= self.save_freq:
            self._since = 0
            self._save(self._epoch, self._batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes a backup if `save_freq` is "epoch"."""
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Removes the backups if `delete_checkpoint` is set."""
        if self.delete_checkpoint:
            backup_files.remove_all(self.backup_dir)

    def _save(self, epoch: int, batch: int) -> None:
        """Writes a backup after `batch` batches of the epoch, then removes the older ones."""
        older = backup_files.complete_backups(self.backup_dir)
        partial = backup_files.new_partial(self.backup_dir)
        variables = self._variables()
        # At the start of an epoch, `fit` resets the metrics.
        metrics = self.model.metrics_variables if batch else []
        state = {
            "epoch": epoch,
            "batch": batch,
            "variables": backup_files.description(variables),
            "metrics": backup_files.description(metrics),
            "copies": [
                backup_files.write(partial, k, variable, self._copies(variable))
                for k, variable in enumerate(variables + metrics)
            ],
        }
        backup_files.publish(partial, state)
        for folder in older[:-1] if self.double_checkpoint else older:
            backup_files.remove(folder)

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        variables = self._variables()
        if state["variables"] != backup_files.description(variables):
            raise ValueError(
                f"backup_dir: expected a backup of this model, got one of other variables in "
                f"{os.fspath(folder)!r}"
            )

        def read(first: int, variables: Sequence[Any]) -> None:
            for k, variable in enumerate(variables, first):
                copies = self._copies(variable)
                backup_files.read(folder, k, variable, copies, state["copies"][k])

        read(0, variables)
        private_apis.start_at_epoch(self.model, state["epoch"])
        if state["batch"]:
            self._resumed = state["epoch"], state["batch"]

            def read_metrics() -> None:
                metrics = self.model.metrics_variables
                if state["metrics"] != backup_files.description(metrics):
                    raise ValueError(
                        f"backup_dir: expected a backup with the metrics of this model, got one "
                        f"with others in {os.fspath(folder)!r}"
                    )
                read(len(variables), metrics)

            self._skip(state["batch"], read_metrics)

    def _skip(self, batches: int, read_metrics: Callable[[], None]) -> None:
        """Lets `fit` take this number of batches without training on them, then train again."""
        model, train, taken = self.model, self.model.train_function, 0

        def skip(iterator: Iterator) -> dict:
            nonlocal taken
            step = [next(iterator, None) for _ in range(model.steps_per_execution)]
            if step[0] is None:
                raise StopIteration
            if not taken:
                # Metrics have no variables before they see data.
                private_apis.build_on_batch(model, step[0])
                read_metrics()
            taken += len(step)
            if taken >= batches:
                model.train_function = train
            return model.get_metrics_result()

        model.train_function = skip

    def _copies(self, variable: Any) -> Sequence[tf.Variable]:
        """The copy of the variable on each replica; itself where there is only one."""
        strategy = self.model.distribute_strategy
        return strategy.experimental_local_results(unwrap(variable))

    def _variables(self) -> list:
        """Every variable except those of metrics: weights, random states, the optimizer's."""
        layers = private_apis.layers_of(self.model)
        # Keras does not know the variables that the user made for loss_weight and alpha.
        factors = {
            id(variable): variable
            for layer in layers
            if isinstance(layer, CenterLoss)
            for variable in layer.factor_variables().values()
        }
        optimizer = self.model.optimizer
        if optimizer is None:
            return [*self.model.variables, *factors.values()]
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        return [*self.model.variables, *factors.values(), *optimizer.variables]


def _require_all_replicas_here(strategy: tf.distribute.Strategy) -> None:
    count = strategy.num_replicas_in_sync
    here = len(strategy.extended.worker_devices) if count > 1 else 1
    if here < count:
        raise ValueError(
            f"strategy: expected all replicas in one process, got {type(strategy).__name__} with "
            f"{here} of {count} in this one: use tf.train.CheckpointManager and "
            "ShardedCenters.save in a training loop"
        )
