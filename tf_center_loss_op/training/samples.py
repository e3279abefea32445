"""The features and labels on which CentersMonitor measures distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op.layer import CenterLoss


def features_and_labels_of(
    model: keras.Model, layer: CenterLoss, embed: Callable | None
) -> Callable[[Any], tuple[Any, Any]]:
    """A function from a batch to the features and labels that the layer gets.

    Args:
      model: a functional model, which holds the layer; with `embed`, any model.
      layer: the layer.
      embed: a function from the inputs of a batch ``(inputs, labels)`` to features, or None.

    Raises:
      ValueError: without `embed`, the model does not tell how the layer's inputs are computed.
    """
    if embed is not None:
        return lambda batch: (embed(batch[0]), batch[1])
    try:
        features, labels, *_ = layer.input
        part = keras.Model(model.inputs, [features, labels])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "embed: expected a function from inputs to features, because the model does not tell "
            f"how the inputs of the layer {layer.name!r} follow from its own, got None"
        ) from error
    return lambda batch: part.predict_on_batch(keras.utils.unpack_x_y_sample_weight(batch)[0])


class LabeledSamples:
    """Features [n, D] and labels [n] of the counted samples of each batch of a dataset.

    A sample is counted unless its label is the layer's `ignore_class`, or its features hold a NaN
    or an infinity.
    """

    def __init__(
        self,
        dataset: Iterable,
        layer: CenterLoss,
        features_and_labels: Callable[[Any], tuple[Any, Any]],
    ):
        self._dataset = dataset
        self._layer = layer
        self._features_and_labels = features_and_labels

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches in order.

        Raises:
          ValueError: a batch is of the wrong shape, or holds a label out of range.
        """
        return map(self._counted, self._dataset)

    def _counted(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        features, labels = (_numpy(value) for value in self._features_and_labels(batch))
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


def _numpy(value: Any) -> np.ndarray:
    return value.numpy() if tf.is_tensor(value) else np.asarray(value)
