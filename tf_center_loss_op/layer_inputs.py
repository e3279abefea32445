"""What a call of the layer is given: its forms, masks, and checks while a model is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_center_loss_op._core import arguments, private_apis, variables

_NAMES = ("features", "labels", "sample_weight")
_FORMS = (
    "layer(features, labels), layer([features, labels]) or layer({'features': ..., 'labels': ...})"
)


class Inputs(NamedTuple):
    """The inputs of a call, or one thing of each: its shape, its mask."""

    features: Any
    labels: Any = None
    sample_weight: Any = None


def is_nested(value: Any) -> bool:
    """Whether it holds the inputs, or shapes or masks of them."""
    return isinstance(value, (list, tuple, dict)) and not isinstance(value, tf.TensorShape)


def inputs_of(features: Any, labels: Any = None, sample_weight: Any = None) -> Inputs:
    """The inputs, from any form in which they may be given.

    Raises:
      ValueError: a list of another length, a dict of other names, or an input that is given twice.
    """
    if not is_nested(features):
        return Inputs(features, labels, sample_weight)
    if isinstance(features, dict):
        if not {"features"} <= set(features) <= set(_NAMES):
            raise ValueError(
                f"features: expected a dict with the names 'features', 'labels' and, where wanted, "
                f"'sample_weight', got {sorted(features)}"
            )
        inputs = Inputs(**features)
    else:
        if len(features) not in (2, 3):
            raise ValueError(
                "features: expected [features, labels] or [features, labels, sample_weight], got "
                f"a {type(features).__name__} of {len(features)}"
            )
        inputs = Inputs(*features)
    for name, given in (("labels", labels), ("sample_weight", sample_weight)):
        if given is not None and getattr(inputs, name) is not None:
            raise ValueError(
                f"{name}: expected once, got it beside features and again inside of it"
            )
    if labels is None:
        labels = inputs.labels
    if sample_weight is None:
        sample_weight = inputs.sample_weight
    return Inputs(inputs.features, labels, sample_weight)


def require_labels(inputs: Inputs) -> None:
    """Raises ValueError for a call without labels."""
    if inputs.labels is None:
        raise ValueError(
            f"labels: expected {_FORMS}, got None; to predict without labels, make a model that "
            "ends at the features"
        )


def features_shape_of(shapes: Any) -> Any:
    """The shape of the features from what `build` is given as the first shape.

    Keras passes the shapes of a list or dict of inputs in the same structure.
    """
    if isinstance(shapes, dict):
        return inputs_of(shapes).features
    if shapes and isinstance(shapes[0], (tuple, list)):
        return shapes[0]
    return shapes


def features_mask_of(previous_mask: Any) -> Any:
    """The mask of the features among those of all inputs."""
    if not is_nested(previous_mask):
        return previous_mask
    return previous_mask.get("features") if isinstance(previous_mask, dict) else previous_mask[0]


def mask_of(inputs: Inputs, mask: Any) -> tf.Tensor | None:
    """Which samples are not masked: by `mask`, else by Keras's masks of features and labels."""
    if is_nested(mask):
        given = inputs_of(mask)
        masks = [given.features, given.labels]
    elif mask is not None:
        masks = [mask]
    else:
        masks = [private_apis.get_keras_mask(t) for t in (inputs.features, inputs.labels)]
    masks = [tf.cast(m, tf.bool) for m in masks if m is not None]
    return None if not masks else tf.reduce_all(masks, axis=0) if masks[1:] else masks[0]


def check_symbolic(inputs: Inputs, num_classes: int, dim: int) -> None:
    """Raises for inputs of a wrong type or shape, as the function would, while a model is built."""
    if any(getattr(t, "sparse", False) or getattr(t, "ragged", False) for t in inputs):
        return
    centers = variables.TableLike()
    centers.dtype, centers.shape = tf.float32, tf.TensorShape([num_classes, dim])
    with tf.Graph().as_default():
        features, labels, sample_weight = (
            None if t is None else tf.compat.v1.placeholder(t.dtype, t.shape) for t in inputs
        )
        arguments.check(
            as_float32(features),
            labels,
            centers,
            alpha=0.0,
            rule="paper",
            sample_weight=sample_weight,
        )


def as_float32(features: Any) -> tf.Tensor:
    """The features for centers that are float32 whatever the features are."""
    features = tf.convert_to_tensor(features)
    return tf.cast(features, tf.float32) if features.dtype == tf.float64 else features


def with_placeholders(inputs: Inputs) -> Inputs:
    """The inputs where Keras calls a subclassed model on placeholders, which are all of floats."""
    labels = tf.convert_to_tensor(inputs.labels)
    labels = tf.cast(labels, tf.int32) if labels.dtype.is_floating else labels
    return Inputs(inputs.features, labels, inputs.sample_weight)


def of_one_type(tensors: Sequence[tf.Tensor], otherwise: tf.DType) -> Sequence[tf.Tensor]:
    """The tensors, cast where they are not of one type."""
    if len({t.dtype for t in tensors}) == 1:
        return tensors
    return [tf.cast(t, otherwise) for t in tensors]
