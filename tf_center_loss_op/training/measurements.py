"""What CentersMonitor measures, and how TensorBoard gets it."""

from __future__ import annotations

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import tables
from tf_center_loss_op.layer import CenterLoss
from tf_center_loss_op.nearest import distance_to_center, predict
from tf_center_loss_op.training.samples import LabeledSamples

# The names of the measurements, in their order. The distances need a dataset.
DISTANCES = ("own_distance", "other_distance", "own_nearest")
MOVEMENTS = ("seen", "norm", "moved")

_HISTOGRAM_BUCKETS = 30


class WatchedRows:
    """Some rows of the centers now and at earlier times.

    Attributes:
      labels: int64 ``[n]``, the classes of the rows, ascending.
      sampled: bool ``[n]``, whether the row belongs to the random sample that is measured. The
        other rows are those of known classes, and show only whether any center moves.
      first, epoch, last: ``[n, D]``, the rows when the training began, when the epoch began and at
        the last measurement.
    """

    def __init__(self, layer: CenterLoss, known: np.ndarray, sample_size: int):
        # A generator of its own: draws from the global one would change the training.
        rng = np.random.default_rng(0)
        classes = layer.num_classes
        if classes > sample_size:
            sample = rng.choice(classes, sample_size, replace=False)
        else:
            sample = np.arange(classes)
        # An epoch may move none of the sampled rows of a large table, but it moves those of the
        # classes in the data.
        self.labels = np.union1d(sample, known)
        self.sampled = np.isin(self.labels, sample)
        self._centers = layer.centers
        self.first = self.last = self.epoch = self.read()

    def read(self) -> np.ndarray:
        """The rows now, ``[n, D]``."""
        return tables.rows(self.labels, self._centers).numpy()

    def moved(self) -> bool:
        """Whether any row has changed since the epoch began."""
        return not np.array_equal(self.read(), self.epoch, equal_nan=True)


class Measurement(NamedTuple):
    """The mean of the measured values, and the values where their distribution is of interest."""

    mean: float
    values: np.ndarray | None


NOTHING = Measurement(math.nan, None)


def measurement(values: np.ndarray) -> Measurement:
    """The mean of the finite values, NaN without any; the mean of booleans is a share."""
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else math.nan
    return Measurement(mean, None if values.dtype == bool else values)


def movements(rows: np.ndarray, first: np.ndarray, before: np.ndarray) -> dict[str, Measurement]:
    """How far the rows ``[m, D]`` have moved since two earlier times; the keys are `MOVEMENTS`."""
    values = (
        (rows != first).any(1),
        np.linalg.norm(rows, axis=1),
        np.linalg.norm(rows - before, axis=1),
    )
    return dict(zip(MOVEMENTS, map(measurement, values), strict=True))


def distances(
    samples: LabeledSamples,
    max_samples: int,
    centers: tf.Variable | keras.Variable,
    classes: np.ndarray,
    rows: np.ndarray,
) -> dict[str, Measurement]:
    """Distances to the own and to the nearest other center; the keys are `DISTANCES`.

    Args:
      samples: the samples to measure.
      max_samples: how many of them are measured, from the first on.
      centers: the whole table, for the distance to the own center.
      classes: ``[m]``, the classes that count as other centers.
      rows: ``[m, D]``, their centers.
    """
    own, other, left = [], [], max_samples
    for batch in samples:
        features, labels = (part[:left] for part in batch)
        left -= len(labels)
        own.append(distance_to_center(features, labels, centers).numpy())
        k = min(2, len(rows))
        near, to_near = predict(features, rows, k=k)
        shape = (len(labels), k)  # for k = 1, predict returns no axis of neighbors
        near, to_near = near.numpy().reshape(shape), to_near.numpy().reshape(shape)
        others = (near >= 0) & (classes[near] != labels[:, np.newaxis])
        other.append(np.where(others, to_near, np.inf).min(1))
        if left <= 0:
            break
    own, other = np.concatenate(own), np.concatenate(other)
    return dict(zip(DISTANCES, map(measurement, (own, other, own < other)), strict=True))


def write_to_tensorboard(
    writer: tf.summary.SummaryWriter, prefix: str, measured: dict[str, Measurement], step: int
) -> None:
    """Writes the mean of each measurement, and a histogram of its values."""
    with writer.as_default():
        for name, (mean, values) in measured.items():
            _write_summary(f"{prefix}/{name}", np.float32(mean), "scalars", step)
            if values is not None:
                counts, edges = np.histogram(values, _HISTOGRAM_BUCKETS)
                buckets = np.stack([edges[:-1], edges[1:], counts], 1)
                _write_summary(f"{prefix}/{name}_histogram", buckets, "histograms", step)
    writer.flush()


def _write_summary(tag: str, value: np.ndarray, plugin: str, step: int) -> None:
    # Writes what tf.summary.scalar and tf.summary.histogram write: those two need TensorBoard.
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin)
    )
    metadata.data_class = {"scalars": 1, "histograms": 2}[plugin]  # DATA_CLASS_SCALAR, _TENSOR
    tf.summary.write(tag, value, step, metadata)
