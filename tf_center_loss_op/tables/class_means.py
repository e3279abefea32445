"""Sets the centers to the means of their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import arguments
from tf_center_loss_op._core.variables import resource_table
from tf_center_loss_op.tables.blocks import rows_per_block
from tf_center_loss_op.tables.memory import create


def from_dataset(
    dataset: Iterable,
    centers: tf.Variable | keras.Variable,
    *,
    embed: Callable | None = None,
    ignore_class: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Sets the centers to the means of their classes, in one pass over a dataset.

    Equals, for each class j of the dataset's features x and labels y:

        centers[j].assign(x[y == j].mean(axis=0))

    In symbols, c_j = sum of the x_i with y_i = j, divided by their number n_j.

    The means are kept in a second table, of which only the rows of classes that occur take up
    memory. The centers are written when the pass is complete: an error before that changes nothing.

    Args:
      dataset: an iterable of batches ``(inputs, labels)``, such as a ``tf.data.Dataset``; the
        labels are integers ``[B]``, each in ``[0, C)``.
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``, written in place.
      embed: a function or model from inputs to features ``[B, D]``; None where the inputs are the
        features.
      ignore_class: samples with this label are left out.
      progress: whether to draw a progress bar.

    Returns:
      int64 ``[C]``, the number of counted samples of each class. A class without one keeps its
      center. A sample with a NaN or an infinity among its features is not counted.

    Raises:
      TypeError, ValueError: an array is of the wrong type or shape, or a label is out of range.

    Determinism: the same features in the same order give the same bits.

    >>> import numpy as np
    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(3, 2)
    >>> batch = np.array([[0.0, 2.0], [2.0, 4.0]], np.float32), np.array([1, 1])
    >>> tcl.tables.from_dataset([batch], centers, progress=False).tolist()
    [0, 2, 0]
    >>> tcl.tables.rows([1], centers).numpy().tolist()
    [[1.0, 3.0]]
    """
    table = resource_table(centers)
    if ignore_class is not None:
        ignore_class = arguments.integer("ignore_class", ignore_class)
    classes, dim = table.shape
    counts = np.zeros(classes, np.int64)
    means = create(classes, dim, dtype=table.dtype.name, name="means")
    total = tf.data.experimental.cardinality(dataset) if hasattr(dataset, "element_spec") else -1
    bar = keras.utils.Progbar(int(total) if total > 0 else None) if progress else None
    done = 0
    for done, batch in enumerate(dataset, 1):
        features, labels = _counted_samples(batch, embed, ignore_class, classes, dim)
        _add_batch(means, counts, features, labels)
        if bar:
            bar.update(done, finalize=False)
    if bar:
        bar.target = done
        bar.update(done, finalize=True)
    seen = np.flatnonzero(counts)
    step = rows_per_block(dim, table.dtype.size)
    for begin in range(0, len(seen), step):
        block = seen[begin : begin + step]
        table.scatter_update(tf.IndexedSlices(tf.gather(means, block), block))
    return counts


def _counted_samples(
    batch: Any, embed: Callable | None, ignore_class: int | None, classes: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, D] and int64 labels [n] of the samples of a batch that count."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        several = isinstance(batch, (tuple, list))
        got = f"{len(batch)} of them" if several else type(batch).__name__
        raise ValueError(f"dataset: expected batches (inputs, labels), got {got}")
    inputs, labels = batch
    features = np.asarray(inputs if embed is None else embed(inputs))
    labels = np.asarray(labels)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features: expected shape [B, {dim}], got {features.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels: expected integers of shape {features.shape[:1]}, "
            f"got {labels.dtype} {labels.shape}"
        )
    kept = np.isfinite(features).all(axis=1)
    if ignore_class is not None:
        kept &= labels != ignore_class
    bad = np.flatnonzero(kept & ((labels < 0) | (labels >= classes)))
    if len(bad):
        raise ValueError(f"labels[{bad[0]}] = {labels[bad[0]]} is outside [0, {classes})")
    return features[kept], labels[kept].astype(np.int64)


def _add_batch(
    means: tf.Variable, counts: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> None:
    """Updates the means and counts of the classes in place."""
    dim = means.shape[1]
    present, place, now = np.unique(labels, return_inverse=True, return_counts=True)
    counts[present] += now
    sums = np.zeros([len(present), dim])
    np.add.at(sums, place, features.astype(np.float64))
    # Running means and not sums: a float32 sum of millions of features loses the small ones.
    before = tf.gather(means, present).numpy().astype(np.float64)
    after = before + (sums - now[:, np.newaxis] * before) / counts[present, np.newaxis]
    means.scatter_update(tf.IndexedSlices(tf.cast(after, means.dtype), present))
