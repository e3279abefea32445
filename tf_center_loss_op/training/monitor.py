"""Seeing what the centers do: a callback for TensorBoard and the training's logs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import _arguments, tables
from tf_center_loss_op.layer import CenterLoss
from tf_center_loss_op.nearest import distance_to_center, nearest_centers

_BUCKETS = 30
# What is measured, in this order; the first three need a dataset.
_DISTANCES = ("own_distance", "other_distance", "own_nearest")
_TABLE = ("seen", "norm", "moved")


class CentersMonitor(keras.callbacks.Callback):
    """Writes what the centers do to TensorBoard and into the logs; warns when they do not move.

    After each epoch, for the `CenterLoss` layer named ``center_loss`` say, the numbers
    ``center_loss_<what>`` join the epoch's logs, so that `History`, and a `CSVLogger` that comes
    after this callback, have them. TensorBoard gets the same as ``center_loss/<what>``, and, of
    all but the shares, the distribution as ``center_loss/<what>_histogram``:

        own_distance    mean of |x_i - c_{y_i}|
        other_distance  mean over i of min over j != y_i of |x_i - c_j|
        own_nearest     share of the samples with own < other
        seen            share of the centers that have moved since the training began
        norm            mean of |c_j|
        moved           mean of |c_j - c_j before|, since the epoch began or the last time

    The first three are of the dataset's samples, the others of the centers. Of a table with more
    than ``max_classes`` rows a fixed random sample of so many stands for all, also as the others
    of ``other_distance``, which is an upper bound then. Ignored samples and samples with a NaN or
    an infinity are left out; a mean over nothing is NaN.

    A warning that names the likely cause follows an epoch in which no watched center moved. The
    training itself is not changed by a bit.

    Args:
      log_dir: folder for the event files; None writes none. TensorBoard need not be installed.
      dataset: batches to measure the distances on, iterable again and again, such as a
        ``tf.data.Dataset``; validation data rather than training data. They are what `fit` gets,
        with the labels among the inputs of a functional model; with ``embed`` they are
        ``(inputs, labels)``. None: only the centers are looked at. Not the shuffled dataset that
        `fit` reads: each iteration draws from its generator, and the order would change.
      layer: the `CenterLoss` layer, or its name; None where the model has only one.
      embed: a function or model from inputs to features ``[..., D]``, for models that are not
        functional or have the layer within another model.
      freq: when TensorBoard gets them: ``"epoch"``, or every so many batches.
      max_samples: how many samples of the dataset are measured, from its beginning.
      max_classes: how many rows of the table are looked at.

    Raises:
      TypeError, ValueError: an argument is wrong, at construction or when the training begins.

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
        super().__init__()
        if dataset is not None and (
            isinstance(dataset, tuple)
            or not hasattr(dataset, "__iter__")
            or iter(dataset) is dataset
        ):
            raise TypeError(
                "dataset: expected batches that can be iterated again and again, such as a "
                f"tf.data.Dataset, got {type(dataset).__name__}; of arrays "
                "tf.data.Dataset.from_tensor_slices(...).batch(256) makes one"
            )
        if not (layer is None or isinstance(layer, (CenterLoss, str))):
            raise TypeError(f"layer: expected a CenterLoss layer or its name, got {layer!r}")
        if embed is not None and not callable(embed):
            raise TypeError(f"embed: expected a function or model, got {embed!r}")
        if embed is not None and dataset is None:
            raise ValueError("embed: expected a dataset with it, got dataset=None")
        if freq != "epoch":
            freq = _arguments.positive("freq", freq)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.dataset = dataset
        self.layer = layer
        self.embed = embed
        self.freq = freq
        self.max_samples = _arguments.positive("max_samples", max_samples)
        self.max_classes = _arguments.positive("max_classes", max_classes)

    def on_train_begin(self, logs=None):
        """Finds the layer and looks at the first batch, so that errors come now."""
        self._layer = self._find_layer()
        if self._layer.sharded:
            raise ValueError(
                f"layer: expected one whose centers are one table, got {self._layer.name!r} with "
                "sharded=True"
            )
        self._features = None if self.dataset is None else self._features_of()
        self._writer = self.log_dir and tf.summary.create_file_writer(self.log_dir)
        self._batches = 0
        self._watch = None
        self._warned = False
        self._labels = np.zeros(0, np.int64)
        if self.dataset is not None:
            batch = next(iter(self.dataset), None)
            if batch is None:
                raise ValueError("dataset: expected at least one batch, got none")
            self._labels = self._embedded(batch)[1]

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers where the centers are."""
        self._batches_before = self._batches
        self._counted = None
        self._start_watching()
        self._trained = 0
        if self._watch is not None:
            self._watch.epoch = self._watch.read()

    def on_train_batch_end(self, batch, logs=None):
        """Writes to TensorBoard, every `freq` batches."""
        before, self._batches = self._batches, self._batches_before + batch + 1
        # A layer that was built by this very batch is watched from the next one on.
        self._trained += self._watch is not None
        self._start_watching()
        if self.freq != "epoch" and self._batches // self.freq > before // self.freq:
            self._write(self._measure("last"), self._batches)

    def on_test_begin(self, logs=None):
        """The validation after an epoch resets the layer's metric, which tells what it saw."""
        if getattr(self, "_layer", None) is not None:
            self._counted = self._metric()

    def on_epoch_end(self, epoch, logs=None):
        """Writes to TensorBoard and into the logs, and warns."""
        measured = self._measure("epoch")
        if self.freq == "epoch":
            self._write(measured, epoch)
        if logs is not None:
            logs.update(
                {f"{self._layer.name}_{name}": mean for name, (mean, _) in measured.items()}
            )
        self._warn(epoch)

    def on_train_end(self, logs=None):
        """Closes the event file."""
        if self._writer:
            self._writer.close()
        self._layer = None

    # ------------------------------------------------------------------ layer and features

    def _find_layer(self):
        if isinstance(self.layer, CenterLoss):
            return self.layer
        found = [layer for layer in _layers(self.model) if isinstance(layer, CenterLoss)]
        names = [layer.name for layer in found]
        if self.layer is not None:
            found = [layer for layer in found if layer.name == self.layer]
        if len(found) != 1:
            expected = "one in the model" if self.layer is None else f"one named {self.layer!r}"
            raise ValueError(f"layer: expected a CenterLoss layer, {expected}, got {names}")
        return found[0]

    def _features_of(self):
        """A function from a batch to its features and labels."""
        if self.embed is not None:
            return lambda batch: (self.embed(batch[0]), batch[1])
        try:
            features, labels, *_ = self._layer.input
            model = keras.Model(self.model.inputs, [features, labels])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "embed: expected a function from inputs to features, because the inputs of the "
                f"layer {self._layer.name!r} are not to be had from those of the model, got None"
            ) from error
        return lambda batch: model.predict_on_batch(keras.utils.unpack_x_y_sample_weight(batch)[0])

    def _embedded(self, batch):
        """Features [n, D] and labels [n] of the counted samples of a batch."""
        features, labels = (_numpy(part) for part in self._features(batch))
        if labels.ndim == features.ndim:
            labels = labels.argmax(-1)
        if labels.shape != features.shape[:-1]:
            raise ValueError(
                f"dataset: expected labels of shape {features.shape[:-1]} for features of shape "
                f"{features.shape}, got {labels.shape}"
            )
        features = features.reshape(-1, features.shape[-1]).astype(np.float32)
        labels = labels.reshape(-1).astype(np.int64)
        kept = np.isfinite(features).all(1)
        if self._layer.ignore_class is not None:
            kept &= labels != self._layer.ignore_class
        bad = np.flatnonzero(kept & ((labels < 0) | (labels >= self._layer.num_classes)))
        if len(bad):
            raise ValueError(
                f"dataset: labels[{bad[0]}] = {labels[bad[0]]} is outside "
                f"[0, {self._layer.num_classes})"
            )
        return features[kept], labels[kept]

    # ---------------------------------------------------------------------- measurements

    def _start_watching(self):
        if self._watch is None and self._layer.built:
            self._watch = _Watch(self._layer, self._labels, self.max_classes)

    def _measure(self, since):
        """{name: (mean, values or None)}; moved since the "last" time or the "epoch" began."""
        measured = {}
        if self.dataset is not None:
            measured |= dict.fromkeys(_DISTANCES, (math.nan, None))
        measured |= dict.fromkeys(_TABLE, (math.nan, None))
        if self._watch is None:
            return measured
        watch, now = self._watch, self._watch.read()
        table = now[watch.sampled]
        values = {
            "seen": (table != watch.first[watch.sampled]).any(1),
            "norm": np.linalg.norm(table, axis=1),
            "moved": np.linalg.norm(table - getattr(watch, since)[watch.sampled], axis=1),
        }
        watch.last = now
        if self.dataset is not None:
            own, other = self._distances(watch.labels[watch.sampled], table)
            values |= zip(_DISTANCES, (own, other, own < other), strict=True)
        for name, value in values.items():
            value = value[np.isfinite(value)]
            share = value.dtype == bool
            mean = float(value.mean()) if len(value) else math.nan
            measured[name] = (mean, None if share else value)
        return measured

    def _distances(self, classes, table):
        """Distances of the dataset's samples to their own and the nearest other center."""
        own, other, left = [], [], self.max_samples
        for batch in self.dataset:
            features, labels = (part[:left] for part in self._embedded(batch))
            left -= len(labels)
            own.append(distance_to_center(features, labels, self._layer.centers).numpy())
            k = min(2, len(table))
            near, distances = nearest_centers(features, table, k=k)
            shape = (len(labels), k)  # k = 1 has no axis of its own
            near, distances = near.numpy().reshape(shape), distances.numpy().reshape(shape)
            others = (near >= 0) & (classes[near] != labels[:, np.newaxis])
            other.append(np.where(others, distances, np.inf).min(1))
            if left <= 0:
                break
        return np.concatenate(own), np.concatenate(other)

    def _write(self, measured, step):
        if not self._writer:
            return
        with self._writer.as_default():
            for name, (mean, values) in measured.items():
                tag = f"{self._layer.name}/{name}"
                _write_summary(tag, np.float32(mean), "scalars", step)
                if values is not None:
                    counts, edges = np.histogram(values, _BUCKETS)
                    buckets = np.stack([edges[:-1], edges[1:], counts], 1)
                    _write_summary(f"{tag}_histogram", buckets, "histograms", step)
        self._writer.flush()

    # --------------------------------------------------------------------------- warning

    def _metric(self):
        """Number of samples that the layer counted and their mean distance, or None."""
        distance = self._layer.distance
        return distance and (float(distance.count), float(distance.result()))

    def _warn(self, epoch):
        watch = self._watch
        if self._warned or (watch is not None and (not self._trained or watch.moved())):
            return
        self._warned = True
        warnings.warn(
            f"The centers of the layer {self._layer.name!r} did not move in epoch {epoch + 1}: "
            f"{self._cause()}.",
            stacklevel=2,
        )

    def _cause(self):
        layer = self._layer
        if not any(layer is other for other in _layers(self.model)):
            return "it is not a layer of the model that is trained"
        if self._watch is None:
            return "it has not been called yet"
        alpha = float(layer._now(layer.alpha))
        if alpha == 0:
            return "alpha = 0"
        if layer.rule == "tutorial" and alpha == 1:
            return 'the step of the rule "tutorial" is alpha (1 - alpha), which is 0 for alpha = 1'
        if layer.update == "manual":
            return (
                "with deferred_update=True they wait for update_centers(), which is not called after "
                "the steps; UpdateCentersAfterStep does that"
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
        cause = "the training step calls the layer with training=False"
        if len(self._watch.labels) < layer.num_classes:
            cause += (
                f", or trained on none of the {len(self._watch.labels)} classes that are looked "
                f"at, of {layer.num_classes}"
            )
        return cause


class _Watch:
    """Some rows of a table, and where they were."""

    def __init__(self, layer, known, most):
        # Not the global generator: the training draws from that.
        rng = np.random.default_rng(0)
        classes = layer.num_classes
        sample = rng.choice(classes, most, replace=False) if classes > most else np.arange(classes)
        # In a large table an epoch may pass by the sampled classes, but hardly by the data's own.
        self.labels = np.union1d(sample, known)
        self.sampled = np.isin(self.labels, sample)
        self._centers = layer.centers
        self.first = self.last = self.epoch = self.read()

    def read(self):
        return tables.centers_of(self.labels, self._centers).numpy()

    def moved(self):
        """Whether any row changed since `epoch`."""
        return not np.array_equal(self.read(), self.epoch, equal_nan=True)


def _layers(model):
    return model._flatten_layers(include_self=False)


def _numpy(tensor):
    return tensor.numpy() if tf.is_tensor(tensor) else np.asarray(tensor)


def _write_summary(tag, value, plugin, step):
    # What tf.summary.scalar and .histogram write, which are missing where TensorBoard is.
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin)
    )
    metadata.data_class = {"scalars": 1, "histograms": 2}[plugin]  # DATA_CLASS_SCALAR, _TENSOR
    tf.summary.write(tag, value, step, metadata)
