"""Checks the arguments of a call before an implementation is chosen.

The error is therefore the same whichever implementation would have run. Each message names the
argument, what is expected and what came. The implementations check what depends on the values of
tensors: a label out of range, a negative alpha in a variable.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_center_loss_op._core import private_apis, variables
from tf_center_loss_op._core.checks import with_shape

RULES = ("paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial")
REDUCTIONS = ("sum", "mean", "none")
IMPLEMENTATIONS = ("auto", "native", "graph")

# The label given to a one-hot row that is all zero or not finite. No class has this number.
NO_CLASS_IN_ROW = -(2**63)

# The label of a masked sample where no label is ignored otherwise. No table has such a row.
MASKED = -(2**63) + 1

_FEATURE_TYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)
_CLASS_TYPES = (tf.int32, tf.int64)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The checked arguments of a call, flattened to one batch; alpha and weights are cast."""

    features: tf.Tensor  # [B, D]
    labels: tf.Tensor  # [B] int32 or int64 class ids
    centers: tf.Variable | variables.TableLike  # [C, D], float64 for float64 features, else float32
    alpha: tf.Tensor  # [] in the centers' type; the implementation checks its value
    rule: str
    reduction: str
    loss_weight: tf.Tensor  # [] in the centers' type, the factor of the loss
    sample_weight: tf.Tensor | None  # [B] in the centers' type
    ignore_class: int | None
    update_centers: bool
    loss_shape: tf.Tensor | None  # the shape [...] of the class ids, None where it is [B]


def check(
    features: Any,
    labels: Any,
    centers: Any,
    *,
    alpha: Any,
    rule: str,
    reduction: str = "mean",
    loss_weight: Any = 1.0,
    sample_weight: Any = None,
    ignore_class: int | None = None,
    update_centers: bool = True,
    mask: Any = None,
) -> Arguments:
    """Checks and converts the arguments of one call.

    mask: True for the samples that count, a tensor in the shape of class ids, or None. The others
    get the label `ignore_class`.
    """
    one_of("rule", rule, RULES)
    one_of("reduction", reduction, REDUCTIONS)
    if not isinstance(update_centers, bool):
        raise TypeError(f"update_centers: expected True or False, got {_describe(update_centers)}")
    ignore_class = class_to_ignore(ignore_class)
    features = _features(features)
    centers = _centers(centers, features, update_centers)
    # Where tracing does not know the width, it is checked when the op runs.
    if features.shape[-1] is None:
        features = tf.ensure_shape(
            features, [*features.shape[:-1], centers.shape[1]], name="features_of_width_D"
        )
    labels = _labels(labels, features, centers)
    labels = _with_leading_shape_of(features, "labels", labels)
    if mask is not None:
        mask = _with_leading_shape_of(features, "mask", _mask(mask, labels))
        ignore_class = MASKED if ignore_class is None else ignore_class
        labels = tf.where(mask, tf.cast(labels, tf.int64), ignore_class)
    dtype = centers.dtype
    if sample_weight is not None:
        sample_weight = _sample_weight(sample_weight, labels, dtype)
        sample_weight = _with_leading_shape_of(features, "sample_weight", sample_weight)
    loss_shape = None if labels.shape.rank == 1 else tf.shape(labels)
    return Arguments(
        features=_flatten(features, [-1, centers.shape[1]], rank=2),
        labels=_flatten(labels, [-1], rank=1),
        centers=centers,
        alpha=_alpha(alpha, dtype),
        rule=rule,
        reduction=reduction,
        loss_weight=tf.cast(loss_weight, dtype),
        sample_weight=None if sample_weight is None else _flatten(sample_weight, [-1], rank=1),
        ignore_class=ignore_class,
        update_centers=update_centers,
        loss_shape=loss_shape,
    )


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}: expected one of {expected}, got {_describe(value)}")


def number(name: str, value: Any) -> float:
    """The value as a float; TypeError or ValueError unless it is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a finite number >= 0, got {_describe(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def positive(name: str, value: Any) -> int:
    """The value as an int; TypeError or ValueError unless it is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int >= 1, got {_describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")
    return int(value)


def integer(name: str, value: Any) -> int:
    """Raises unless value is an int of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {_describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int in [-2**63, 2**63), got {value}")
    return int(value)


def class_to_ignore(ignore_class: Any) -> int | None:
    """Raises unless it is None or an int."""
    if ignore_class is None:
        return None
    if isinstance(ignore_class, bool) or not isinstance(ignore_class, numbers.Integral):
        raise TypeError(f"ignore_class: expected None or an int, got {_describe(ignore_class)}")
    if not NO_CLASS_IN_ROW < ignore_class < 2**63:
        raise ValueError(f"ignore_class: expected an int in (-2**63, 2**63), got {ignore_class}")
    return int(ignore_class)


def require_no_recomputation() -> None:
    """RuntimeError inside tf.recompute_grad: the backward pass would run the step once more."""
    if private_apis.inside_recompute_grad():
        raise RuntimeError(
            "update_centers: expected a step of the centers outside of tf.recompute_grad "
            "(keras.remat, keras.RematScope), got one inside, which the gradient would repeat; "
            "compute the loss with update_centers=False there and call update_centers outside"
        )


def _describe(value: Any) -> str:
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        return f"a tensor of dtype {value.dtype.name} and shape {value.shape}"
    return f"{value!r} ({type(value).__name__})"


def _tensor(name: str, value: Any) -> tf.Tensor:
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected a dense tensor, got {type(value).__name__}: {error}"
        ) from error


def _known_rank(name: str, tensor: tf.Tensor) -> tf.Tensor:
    if tensor.shape.rank is None:
        raise ValueError(
            f"{name}: expected a tensor whose rank is known while tracing, got an unknown rank; "
            "tf.ensure_shape gives it one"
        )
    return tensor


def _features(features: Any) -> tf.Tensor:
    features = _known_rank("features", _tensor("features", features))
    if features.dtype not in _FEATURE_TYPES:
        expected = ", ".join(t.name for t in _FEATURE_TYPES)
        raise TypeError(f"features: expected dtype {expected}, got {features.dtype.name}")
    if features.shape.rank < 1:
        raise ValueError("features: expected shape [..., D], got a scalar")
    return features


def _centers(centers: Any, features: tf.Tensor, moves: bool) -> tf.Variable | variables.TableLike:
    variable = variables.unwrap(centers)
    if isinstance(variable, tf.Variable):
        variable = variables.own_table(variable, moves)
    if not (isinstance(variable, variables.TableLike) or variables.is_resource_variable(variable)):
        raise variables.wrong_kind(centers)
    if variable.dtype not in (tf.float32, tf.float64):
        raise TypeError(f"centers: expected dtype float32 or float64, got {variable.dtype.name}")
    if (features.dtype == tf.float64) != (variable.dtype == tf.float64):
        float64 = variable.dtype == tf.float64
        expected = "float64" if float64 else "float32, float16 or bfloat16"
        raise TypeError(
            f"features: expected dtype {expected} for {variable.dtype.name} centers, "
            f"got {features.dtype.name}"
        )
    if variable.shape.rank != 2 or variable.shape[1] is None:
        raise ValueError(f"centers: expected shape [C, D], got {variable.shape}")
    if not features.shape[-1:].is_compatible_with(variable.shape[1:]):
        raise ValueError(
            f"features: expected shape [..., {variable.shape[1]}] for centers of shape "
            f"{variable.shape}, got {features.shape}"
        )
    return variable


def _labels(
    labels: Any, features: tf.Tensor, centers: tf.Variable | variables.TableLike
) -> tf.Tensor:
    labels = _known_rank("labels", _tensor("labels", labels))
    batch_shape = features.shape[:-1]
    classes = centers.shape[0]
    rows = labels.shape.rank == features.shape.rank
    expected = f"{batch_shape} (class ids) or {batch_shape + [classes]} (one-hot rows)"
    if not rows and labels.shape.rank != batch_shape.rank:
        raise ValueError(
            f"labels: expected shape {expected} for features of shape {features.shape}, "
            f"got {labels.shape}"
        )
    if not rows and labels.dtype not in _CLASS_TYPES:
        raise TypeError(
            f"labels: expected class ids of dtype int32 or int64, got {labels.dtype.name}; "
            + _advice(labels.dtype)
        )
    if not labels.shape.is_compatible_with(batch_shape + [classes] if rows else batch_shape):
        hint = ""
        if rows and labels.shape[-1] == 1:
            remedy = "reshape(labels, [-1])" if labels.shape.rank == 2 else "squeeze(labels, -1)"
            hint = f"; a column of class ids needs tf.{remedy}"
        raise ValueError(
            f"labels: expected shape {expected} for features of shape {features.shape}, "
            f"got {labels.shape}{hint}"
        )
    if rows:
        if not (labels.dtype.is_floating or labels.dtype.is_integer or labels.dtype.is_bool):
            raise TypeError(
                f"labels: expected one-hot rows of a numeric type, got {labels.dtype.name}"
            )
        labels = _argmax(labels, centers)
    return labels


def _advice(dtype: tf.DType) -> str:
    """How labels of a wrong type become class ids."""
    if dtype == tf.string:
        return "tf.keras.layers.StringLookup or tf.lookup.StaticHashTable makes them from strings"
    return "cast them with tf.cast(labels, tf.int32)"


def _argmax(rows: tf.Tensor, centers: tf.Variable | variables.TableLike) -> tf.Tensor:
    """The class ids of one-hot rows; NO_CLASS_IN_ROW for a row that is all zero or not finite."""
    if rows.dtype.is_bool:
        rows = tf.cast(rows, tf.int8)
    classes = centers.shape[0]
    if classes is None:
        classes = tf.raw_ops.VariableShape(input=centers.handle)[0]
    if rows.shape[-1] is None or centers.shape[0] is None:
        expected = tf.concat([tf.shape(rows)[:-1], [classes]], axis=0)
        rows = with_shape("labels", rows, expected, "one-hot rows for the rows of centers")
    names_a_class = tf.reduce_any(tf.not_equal(rows, 0), axis=-1)
    if rows.dtype.is_floating:
        names_a_class &= tf.reduce_all(tf.math.is_finite(rows), axis=-1)
    return tf.where(names_a_class, tf.argmax(rows, axis=-1), NO_CLASS_IN_ROW)


def _with_leading_shape_of(features: tf.Tensor, name: str, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor [...] of features [..., D], with its shape checked when the op runs.

    Shapes that are known while tracing have been checked. In a batch of rank 1 every implementation
    compares the lengths itself.
    """
    batch_shape = features.shape[:-1]
    known = batch_shape.is_fully_defined() and tensor.shape.is_fully_defined()
    if known or batch_shape.rank == 1:
        return tensor
    return with_shape(name, tensor, tf.shape(features)[:-1], "features without D")


def _sample_weight(sample_weight: Any, labels: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    weights = _tensor("sample_weight", sample_weight)
    if not (weights.dtype.is_floating or weights.dtype.is_integer):
        raise TypeError(f"sample_weight: expected numbers, got {weights.dtype.name}")
    if not weights.shape.is_compatible_with(labels.shape):
        raise ValueError(
            f"sample_weight: expected shape {labels.shape}, one number for each sample, "
            f"got {weights.shape}"
        )
    # In every implementation the weights are data: no gradient flows to them.
    return tf.stop_gradient(tf.cast(weights, dtype))


def _mask(mask: Any, labels: tf.Tensor) -> tf.Tensor:
    mask = _tensor("mask", mask)
    if not mask.dtype.is_bool:
        raise TypeError(f"mask: expected dtype bool, got {mask.dtype.name}")
    if not mask.shape.is_compatible_with(labels.shape):
        raise ValueError(
            f"mask: expected shape {labels.shape}, one for each sample, got {mask.shape}"
        )
    return mask


def _alpha(alpha: Any, dtype: tf.DType) -> tf.Tensor:
    if isinstance(alpha, keras.Variable):
        alpha = alpha.value
    if not (tf.is_tensor(alpha) or isinstance(alpha, tf.Variable)):
        return tf.constant(number("alpha", alpha), dtype)
    if not (alpha.dtype.is_floating or alpha.dtype.is_integer):
        raise TypeError(f"alpha: expected a finite number >= 0, got {_describe(alpha)}")
    if not alpha.shape.is_compatible_with([]):
        raise ValueError(f"alpha: expected a scalar, got shape {alpha.shape}")
    return tf.cast(tf.stop_gradient(alpha), dtype)


def _flatten(tensor: tf.Tensor, shape: list[int], rank: int) -> tf.Tensor:
    return tensor if tensor.shape.rank == rank else tf.reshape(tensor, shape)
