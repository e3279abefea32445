"""A Keras callback that measures the centers for TensorBoard and the logs of the training."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import arguments, private_apis
from tf_center_loss_op._core.keras_backend import require_keras_on_tensorflow
from tf_center_loss_op.layer import CenterLoss
from tf_center_loss_op.training.measurements import (
    DISTANCES,
    MOVEMENTS,
    NOTHING,
    Measurement,
    WatchedRows,
    distances,
    movements,
    write_to_tensorboard,
)
from tf_center_loss_op.training.samples import LabeledSamples, features_and_labels_of


class CentersMonitor(keras.callbacks.Callback):
    """Reports distances and movements of the centers, and warns when the centers do not move.

    Equals, for ``own_distance``, after each epoch:

        own = tf.norm(features - tf.gather(layer.centers, labels), axis=-1)
        logs[f"{layer.name}_own_distance"] = tf.reduce_mean(own)

    After each epoch, the measurements of a `CenterLoss` layer named ``center_loss`` join the
    epoch's logs as ``center_loss_<name>``, where `History` and a `CSVLogger` that comes after this
    callback find them. TensorBoard gets them as ``center_loss/<name>`` and, except for the shares,
    their distribution as ``center_loss/<name>_histogram``:

        own_distance    mean of |x_i - c_{y_i}|
        other_distance  mean over i of min over j != y_i of |x_i - c_j|
        own_nearest     share of the samples with own < other
        seen            share of the centers that have moved since the training began
        norm            mean of |c_j|
        moved           mean of |c_j - c_j before|, since the epoch began or the last measurement

    The first three are measured on the samples of the dataset, the others on the centers. Of a
    table with more than ``max_classes`` rows, a fixed random sample of that size is measured. It
    also provides the other centers of ``other_distance``, which is then an upper bound. Ignored
    samples and samples with a NaN or an infinity are left out. The mean of no values is NaN.

    After the first epoch in which no watched center moved, a warning names the likely cause. The
    callback does not change the training by a bit.

    Args:
      log_dir: the folder for the event files, or None to write none. TensorBoard need not be
        installed.
      dataset: the batches on which the distances are measured, or None to measure the centers only.
        It must be possible to iterate over them several times, as over a ``tf.data.Dataset``. The
        batches are those that `fit` takes, with the labels among the inputs of a functional model;
        with ``embed`` they are ``(inputs, labels)``. Give validation data rather than training
        data, and not the shuffled dataset that `fit` reads: each iteration draws from its random
        generator, which would change the order of the training data.
      layer: the `CenterLoss` layer or its name; None where the model has only one.
      embed: a function or model from inputs to features ``[..., D]``, for models that are not
        functional or hold the layer inside another model.
      freq: ``"epoch"``, or an int >= 1, the number of batches after which TensorBoard gets the
        measurements again.
      max_samples: how many samples of the dataset are measured, from its beginning, >= 1.
      max_classes: how many rows of the table are measured, >= 1.

    Raises:
      TypeError, ValueError: an argument is wrong, at construction or when the training begins.

    Determinism: the same training gives the same measurements.

    >>> import keras
    >>> import numpy as np
    >>> import tf_center_loss_op as tcl
    >>> image, label = keras.Input([8]), keras.Input([], dtype="int32")
    >>> model = keras.Model([image, label], tcl.CenterLoss(3, name="cl")(image, label))
    >>> model.compile("sgd")
    >>> x, y = np.ones([6, 8], "f"), np.arange(6) % 3
    >>> monitor = tcl.training.CentersMonitor(None, [([x, y],)])
    >>> history = model.fit([x, y], verbose=0, callbacks=[monitor]).history
    >>> history["cl_seen"]
    [1.0]

    Source: the ratio of distances within and between the classes: Wen et al., ECCV 2016, figure 2.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike | None,
        dataset: Iterable | None = None,
        *,
        layer: CenterLoss | str | None = None,
        embed: Callable | None = None,
        freq: int | str = "epoch",
        max_samples: int = 10_000,
        max_classes: int = 4096,
    ):
        require_keras_on_tensorflow("CentersMonitor")
        super().__init__()
        if dataset is not None and (
            isinstance(dataset, tuple)
            or not hasattr(dataset, "__iter__")
            or iter(dataset) is dataset
        ):
            raise TypeError(
                "dataset: expected batches that can be iterated again and again, such as a "
                f"tf.data.Dataset, got {type(dataset).__name__}; for arrays, "
                "tf.data.Dataset.from_tensor_slices(...).batch(256) makes one"
            )
        if not (layer is None or isinstance(layer, (CenterLoss, str))):
            raise TypeError(f"layer: expected a CenterLoss layer or its name, got {layer!r}")
        if embed is not None and not callable(embed):
            raise TypeError(f"embed: expected a function or model, got {embed!r}")
        if embed is not None and dataset is None:
            raise ValueError("embed: expected a dataset with it, got dataset=None")
        if freq != "epoch":
            freq = arguments.positive("freq", freq)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.dataset = dataset
        self.layer = layer
        self.embed = embed
        self.freq = freq
        self.max_samples = arguments.positive("max_samples", max_samples)
        self.max_classes = arguments.positive("max_classes", max_classes)
        self.watched: WatchedRows | None = None
        self._layer: CenterLoss | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Finds the layer and reads the first batch, so that errors are raised early."""
        self._layer = self._find_layer()
        if self._layer.sharded:
            raise ValueError(
                f"layer: expected one whose centers are one table, got {self._layer.name!r} with "
                "sharded=True"
            )
        self._samples = None
        if self.dataset is not None:
            embedded = features_and_labels_of(self.model, self._layer, self.embed)
            self._samples = LabeledSamples(self.dataset, self._layer, embedded)
        self._writer = self.log_dir and tf.summary.create_file_writer(self.log_dir)
        self._batches = 0
        self.watched = None
        self._warned = False
        self._known_labels = np.zeros(0, np.int64)
        if self._samples is not None:
            batch = next(iter(self._samples), None)
            if batch is None:
                raise ValueError("dataset: expected at least one batch, got none")
            self._known_labels = batch[1]

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers the centers at the start of the epoch."""
        self._batches_before = self._batches
        self._counted = None
        self._start_watching()
        self._watched_batches = 0
        if self.watched is not None:
            self.watched.epoch = self.watched.read()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Writes to TensorBoard every `freq` batches."""
        before, self._batches = self._batches, self._batches_before + batch + 1
        # A layer that this batch has built is watched from the next batch on.
        self._watched_batches += self.watched is not None
        self._start_watching()
        if self.freq != "epoch" and self._batches // self.freq > before // self.freq:
            self._write(self._measure("last"), self._batches)

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Reads the layer's metric, which the validation after an epoch resets."""
        if self._layer is not None:
            self._counted = self._metric()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes to TensorBoard and to the logs, and warns of centers that did not move."""
        measured = self._measure("epoch")
        if self.freq == "epoch":
            self._write(measured, epoch)
        if logs is not None:
            logs.update(
                {f"{self._layer.name}_{name}": mean for name, (mean, _) in measured.items()}
            )
        self._warn(epoch)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Closes the event file."""
        if self._writer:
            self._writer.close()
        self._layer = None

    def _find_layer(self) -> CenterLoss:
        if isinstance(self.layer, CenterLoss):
            return self.layer
        layers = private_apis.layers_of(self.model)
        found = [layer for layer in layers if isinstance(layer, CenterLoss)]
        names = [layer.name for layer in found]
        if self.layer is not None:
            found = [layer for layer in found if layer.name == self.layer]
        if len(found) != 1:
            expected = "one in the model" if self.layer is None else f"one named {self.layer!r}"
            raise ValueError(f"layer: expected a CenterLoss layer, {expected}, got {names}")
        return found[0]

    def _start_watching(self) -> None:
        if self.watched is None and self._layer.built:
            self.watched = WatchedRows(self._layer, self._known_labels, self.max_classes)

    def _measure(self, since: str) -> dict[str, Measurement]:
        """All measurements; movements count since the "last" measurement or the "epoch" began."""
        watched, measured = self.watched, {}
        if watched is None:
            names = MOVEMENTS if self._samples is None else DISTANCES + MOVEMENTS
            return dict.fromkeys(names, NOTHING)
        now, sampled = watched.read(), watched.sampled
        before = watched.last if since == "last" else watched.epoch
        watched.last = now
        if self._samples is not None:
            classes, centers = watched.labels[sampled], self._layer.centers
            measured |= distances(self._samples, self.max_samples, centers, classes, now[sampled])
        return measured | movements(now[sampled], watched.first[sampled], before[sampled])

    def _write(self, measured: dict[str, Measurement], step: int) -> None:
        if self._writer:
            write_to_tensorboard(self._writer, self._layer.name, measured, step)

    def _metric(self) -> tuple[float, float] | None:
        """The number of samples that the layer counted and their mean distance, or None."""
        distance = self._layer.distance
        return distance and (float(distance.count), float(distance.result()))

    def _warn(self, epoch: int) -> None:
        watched = self.watched
        if self._warned or (watched is not None and (not self._watched_batches or watched.moved())):
            return
        self._warned = True
        warnings.warn(
            f"The centers of the layer {self._layer.name!r} did not move in epoch {epoch + 1}: "
            f"{self._cause()}.",
            stacklevel=2,
        )

    def _cause(self) -> str:
        """The likely cause why the centers did not move."""
        layer = self._layer
        if not any(layer is other for other in private_apis.layers_of(self.model)):
            return "it is not a layer of the model that is trained"
        if self.watched is None:
            return "it has not been called yet"
        if not layer.trainable:
            return "it is frozen (trainable=False on the layer or on a model around it)"
        alpha = float(layer.factor_now(layer.alpha))
        if alpha == 0:
            return "alpha = 0"
        if layer.rule == "tutorial" and alpha == 1:
            return 'the step of the rule "tutorial" is alpha (1 - alpha), which is 0 for alpha = 1'
        if layer.deferred_update:
            return (
                "with deferred_update=True they wait for apply_deferred_update(), which is not "
                "called after the steps; UpdateCentersAfterStep calls it"
            )
        counted, distance = self._counted or self._metric() or (math.nan, math.nan)
        if counted == 0:
            ignored = (
                ""
                if layer.ignore_class is None
                else f"all labels are ignore_class = {layer.ignore_class}, or "
            )
            return (
                f"the layer has counted no sample: {ignored}all features are NaN or infinite, or "
                "the training step does not call the layer"
            )
        if distance == 0:
            return "all features equal their centers, as those of a network that outputs zeros do"
        if not _takes_training(self.model):
            return (
                "the model's call() has no argument `training`, so Keras does not tell its layers "
                "that it trains: call(self, inputs, training=None)"
            )
        cause = (
            "the training step calls the layer with training=False, or inside a call() without "
            "the argument `training`"
        )
        if len(self.watched.labels) < layer.num_classes:
            cause += (
                f", or trained on none of the {len(self.watched.labels)} classes that are looked "
                f"at, of {layer.num_classes}"
            )
        return cause


def _takes_training(model: keras.Model) -> bool:
    """Whether `fit` can tell the model that it trains."""
    return "training" in inspect.signature(model.call).parameters
