"""The center loss by the fused ops of the native library, their gradients and forward mode.

In d loss / d x_i = f_i * (x_i - c_{y_i}), the factor f_i is loss_weight * sample_weight_i, divided
by N for reduction "mean", and 0 for an ignored sample. The loss ops return this product, the scaled
residual, for the backward pass: their output `residual_bits` is an integer tensor of its bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import native, private_apis, xla
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op._core.graph_ops import GraphOps


class NativeOps:
    """An `Implementation` (dispatch.py): each method runs one fused op of the native library."""

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Implementation`."""
        if not a.update_centers and private_apis.in_forward_mode([a.features, a.centers.handle]):
            # Forward mode of any order works through TensorFlow's own ops. in_forward_mode misses
            # some cases, such as a variable watched inside a tf.function: for these there are the
            # rules at the end of this file. A step has no gradient to the centers, so its rule is
            # enough.
            return GraphOps().center_loss(a)
        out = _forward(a)
        return out.loss, out.squared_distance

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Implementation`."""
        # For these arguments f_i = 1: the scaled residual is the residual.
        one = tf.ones([], a.centers.dtype)
        out = _forward(dataclasses.replace(a, reduction="sum", loss_weight=one, sample_weight=None))
        return out.loss, tf.bitcast(out.residual_bits, a.centers.dtype)

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """See `Implementation`."""
        return native.ops().tcl_update_centers(**_step_inputs(a), **_batch_inputs(a))

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """See `Implementation`."""
        batch = _batch_inputs(a) | {"features": residual}
        return native.ops().tcl_update_centers(from_residual=True, **_step_inputs(a), **batch)


def _forward(a: Arguments) -> Any:
    if a.update_centers:
        return native.ops().tcl_center_loss_step(
            **_step_inputs(a), **_batch_inputs(a), **_loss_inputs(a)
        )
    # The op takes the variable's handle, which does not put the variable on the tape.
    private_apis.variable_accessed(a.centers)
    return native.ops().tcl_center_loss(
        centers=a.centers.handle, **_batch_inputs(a), **_loss_inputs(a)
    )


def _step_inputs(a: Arguments) -> dict[str, Any]:
    return {
        "centers": a.centers.handle,
        "rule": a.rule,
        "atomic": native.gpu_atomics(),  # on a GPU, sum the residuals by float atomics
        "after": xla.reads_before_step(a.centers),  # under XLA, inputs that order the step
        **_scalar("alpha", a.alpha),
    }


def _batch_inputs(a: Arguments) -> dict[str, Any]:
    return {
        "features": a.features,
        "labels": a.labels,
        "has_ignore_class": a.ignore_class is not None,
        "ignore_class": a.ignore_class or 0,  # not read without has_ignore_class
        "Tcenters": a.centers.dtype,
    }


def _loss_inputs(a: Arguments) -> dict[str, Any]:
    return {
        **_scalar("loss_weight", a.loss_weight),
        "sample_weight": [] if a.sample_weight is None else [a.sample_weight],
        "reduction": a.reduction,
        # Integers, because TensorFlow makes a gradient of zeros for each unused output of floats.
        "Tbits": tf.int64 if a.centers.dtype == tf.float64 else tf.uint32,
    }


def _scalar(name: str, tensor: tf.Tensor) -> dict[str, Any]:
    """A scalar as an attribute of the op where it is known while tracing, else as an input.

    The attribute is a float32, so the value must be one; it is 1 where there is an input. Eager
    mode always uses the input: TensorFlow keeps a kernel for each value of an attribute.
    """
    value = None if tf.executing_eagerly() else tf.get_static_value(tensor)
    if value is None or np.float32(value) != value:
        # 1.0 and not 1: an int for a float attribute leaves TensorFlow's fast path in eager mode.
        return {name: [tensor], f"constant_{name}": 1.0}
    return {name: [], f"constant_{name}": float(value)}


# -------------------------------------------------------------------------------- gradients


def _backward(
    op: tf.Operation,
    upstream: list[tf.Tensor],
    scaled_residual_bits: tf.Tensor,
    features: tf.Tensor,
    labels: tf.Tensor,
    loss_weight: list[tf.Tensor],
    sample_weight: list[tf.Tensor],
    centers: list[tf.Tensor],
) -> tf.Tensor:
    """The gradient to the features [B, D], in their type: upstream_i * f_i * (x_i - c_{y_i}).

    The kernel multiplies upstream by the scaled residual. The other inputs are there for second
    derivatives: upstream (1 where missing), loss_weight, sample_weight and centers, the variable's
    handle, are lists with at most one tensor. The attributes are those of op.
    """
    return native.ops().tcl_center_loss_backward(
        upstream=upstream,
        residual_bits=scaled_residual_bits,
        features=features,
        labels=labels,
        loss_weight=loss_weight,
        constant_loss_weight=op.get_attr("constant_loss_weight"),
        sample_weight=sample_weight,
        centers=centers,
        reduction=op.get_attr("reduction"),
        has_ignore_class=op.get_attr("has_ignore_class"),
        ignore_class=op.get_attr("ignore_class"),
        Tcenters=op.get_attr("Tcenters"),
    )


def _split_weights(
    op: tf.Operation, inputs: list[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
    """loss_weight and sample_weight, each a list with at most one tensor; and the other inputs."""
    loss_weights, samples = len(op.get_attr("Tloss_weight")), len(op.get_attr("Tsample_weight"))
    rest = inputs[loss_weights:]
    return inputs[:loss_weights], rest[:samples], rest[samples:]


def _upstream(upstream: tf.Tensor) -> list[tf.Tensor]:
    """[upstream], or [] where the upstream gradient is known to be 1 everywhere."""
    value = None if tf.executing_eagerly() else tf.get_static_value(upstream)
    return [upstream] if value is None or np.any(value != 1) else []


def _to_centers(
    op: tf.Operation, handle: tf.Tensor, labels: tf.Tensor, d_features: tf.Tensor
) -> tf.IndexedSlices:
    """The gradient to the table: minus the gradient to the features [B, D], at their labels.

    Ignored samples are left out. Under XLA, which has no shapes that depend on values, each of them
    is a row of zeros for class 0 instead.
    """
    rows = -tf.cast(d_features, op.get_attr("Tcenters"))
    if op.get_attr("has_ignore_class"):
        counted = _counted(op, labels)
        if xla.in_xla():
            labels, rows = tf.where(counted, labels, 0), tf.where(counted[:, tf.newaxis], rows, 0)
        else:
            labels, rows = tf.boolean_mask(labels, counted), tf.boolean_mask(rows, counted)
    # The labels may belong to an outer graph. TensorFlow captures the values of a gradient in this
    # graph, but not always its indices; identity makes a tensor of this graph.
    labels = tf.identity(labels)
    return tf.IndexedSlices(rows, labels, private_apis.variable_shape(handle))


def _counted(op: tf.Operation, labels: tf.Tensor) -> tf.Tensor:
    """[B], whether a sample is not ignored; compared as int64, as in the kernels."""
    return tf.not_equal(tf.cast(labels, tf.int64), op.get_attr("ignore_class"))


def _factor(op: Any, labels: tf.Tensor, factors: list[tf.Tensor]) -> tf.Tensor:
    """[B], f_i: the product of these factors, of the constant loss_weight and of 1 / N."""
    dtype = op.get_attr("Tcenters")
    factor = tf.fill(tf.shape(labels), tf.constant(op.get_attr("constant_loss_weight"), dtype))
    for given in factors:
        factor *= given
    count = tf.ones_like(factor)
    if op.get_attr("has_ignore_class"):
        counted = _counted(op, labels)
        count, factor = tf.cast(counted, dtype), tf.where(counted, factor, 0)
    if op.get_attr("reduction") in ("mean", b"mean"):
        factor = tf.math.divide_no_nan(factor, tf.reduce_sum(count))
    return factor


@tf.RegisterGradient("TclCenterLossStep")
def _step_gradient(op: tf.Operation, upstream: tf.Tensor, *_: Any) -> list[Any]:
    """The gradients to the inputs centers, features, labels, ...: only the features have one."""
    _, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest[len(op.get_attr("Talpha")) :])
    gradient = _backward(
        op, _upstream(upstream), op.outputs[1], features, labels, loss_weight, sample_weight, []
    )
    return [None, gradient] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLoss")
def _center_loss_gradient(op: tf.Operation, upstream: tf.Tensor, *_: Any) -> list[Any]:
    """The gradients to the inputs centers, features, labels, ...: the first two have one."""
    handle, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest)
    # _backward returns the type of its features. Here that is the centers' type, because the
    # gradient to the centers must not be rounded to 16 bits.
    wide = tf.cast(features, op.get_attr("Tcenters"))
    gradient = _backward(
        op, _upstream(upstream), op.outputs[1], wide, labels, loss_weight, sample_weight, [handle]
    )
    d_features = tf.cast(gradient, features.dtype)
    return [_to_centers(op, handle, labels, gradient), d_features] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLossBackward")
def _backward_gradient(op: tf.Operation, g: tf.Tensor) -> list[Any]:
    """The gradients to the inputs of the op that computes upstream_i * f_i * (x_i - c_{y_i}).

    g [B, D] is the upstream gradient of this op, `upstream` that of the loss.
    """
    scaled_residual_bits, *rest = op.inputs
    upstreams = len(op.get_attr("Tupstream"))
    upstream, (features, labels, *rest) = rest[:upstreams], rest[upstreams:]
    loss_weight, sample_weight, centers = _split_weights(op, rest)

    # By the op again, not by tf.bitcast: bits have no derivative, and third derivatives go through
    # this op.
    scaled_residual = _backward(
        op, [], scaled_residual_bits, features, labels, loss_weight, sample_weight, centers
    )
    dtype = op.get_attr("Tcenters")
    g = tf.cast(g, dtype)
    per_sample = tf.reduce_sum(g * tf.cast(scaled_residual, dtype), axis=1)
    d_upstream = [per_sample if u.shape.rank == 1 else tf.reduce_sum(per_sample) for u in upstream]

    factor = _factor(op, labels, loss_weight + sample_weight + upstream)
    d_features = g * factor[:, tf.newaxis]

    d_centers = [_to_centers(op, handle, labels, d_features) for handle in centers]
    d_features = tf.cast(d_features, features.dtype)
    no_gradient = [None] * len(loss_weight + sample_weight)
    return [None, *d_upstream, d_features, None, *no_gradient, *d_centers]


# ------------------------------------------------------------------------------ forward mode


class _Attributes:
    """Stands for a tf.Operation in `_factor` and the like: get_attr over (name, value, ...)."""

    def __init__(self, pairs: tuple):
        self._values = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def get_attr(self, name: str) -> Any:
        """The value of an attribute."""
        return self._values[name]


def _or_class_0(labels: tf.Tensor, num_classes: tf.Tensor) -> tf.Tensor:
    """The labels, with 0 for those outside the table: ignored samples, whose factor is zero."""
    is_row = (labels >= 0) & (tf.cast(labels, tf.int64) < tf.cast(num_classes, tf.int64))
    return tf.where(is_row, labels, 0)


def _residual_tangent(
    features_tangent: tf.Tensor,
    labels: tf.Tensor,
    table_tangents: list[tf.Tensor | None],
    dtype: tf.DType,
) -> tf.Tensor:
    """The tangent of the residual x_i - c_{y_i} [B, D].

    table_tangents holds the tangent of the table, or None where that is zero, or nothing.
    """
    tangent = tf.cast(features_tangent, dtype)
    for table_tangent in table_tangents:
        if table_tangent is not None:
            read = _or_class_0(labels, tf.shape(table_tangent)[0])
            tangent -= tf.gather(table_tangent, read)
    return tangent


def _loss_outputs(op: _Attributes, products: tf.Tensor, outputs: list) -> list[tf.Tensor]:
    """The tangents of loss, residual_bits and squared_distance.

    products [B, D] is the gradient to the features times the tangent of the residual, element by
    element. The last two tangents are zero: integers have none, and the public functions return the
    squared distance without a gradient. None in their place would break nested forward modes.
    """
    axis = 1 if op.get_attr("reduction") in ("none", b"none") else None
    loss = tf.reduce_sum(products, axis=axis)
    return [loss, *(tf.zeros_like(other) for other in outputs[1:])]


def _step_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """The tangents of the op that also moves the centers.

    The old centers are gone, so the scaled residual comes from the op's outputs.
    """
    op = _Attributes(attributes)
    _, features, labels, *rest = inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest[len(op.get_attr("Talpha")) :])
    dtype = outputs[0].dtype
    wide = tf.cast(features, dtype)
    scaled_residual = _backward(op, [], outputs[1], wide, labels, loss_weight, sample_weight, [])
    return _loss_outputs(op, scaled_residual * tf.cast(tangents[1], dtype), outputs)


def _center_loss_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """The tangents of the op without a step, in TensorFlow's own ops.

    These can be differentiated again in any mode.
    """
    op = _Attributes(attributes)
    handle, features, labels, *rest = inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest)
    dtype = outputs[0].dtype
    read = _or_class_0(labels, private_apis.variable_shape(handle)[0])
    rows = tf.raw_ops.ResourceGather(resource=handle, indices=read, dtype=dtype)
    factor = _factor(op, labels, [*loss_weight, *sample_weight])[:, tf.newaxis]
    tangent = _residual_tangent(tangents[1], labels, [tangents[0]], dtype)
    residual = tf.cast(features, dtype) - rows
    # An ignored sample has factor 0, but its residual may be infinite or NaN.
    products = tf.where(tf.not_equal(factor, 0), factor * residual * tangent, 0)
    return _loss_outputs(op, products, outputs)


def _backward_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """The tangent of the op that computes upstream_i * f_i * (x_i - c_{y_i})."""
    op = _Attributes(attributes)
    upstreams = len(op.get_attr("Tupstream"))
    upstream, (features, labels, *rest) = inputs[1 : 1 + upstreams], inputs[1 + upstreams :]
    loss_weight, sample_weight, centers = _split_weights(op, rest)
    dtype = tf.as_dtype(op.get_attr("Tcenters"))
    table_tangents = tangents[len(tangents) - len(centers) :]
    tangent = _residual_tangent(tangents[1 + upstreams], labels, table_tangents, dtype)
    factor = _factor(op, labels, [*loss_weight, *sample_weight, *upstream])
    result = factor[:, tf.newaxis] * tangent
    for upstream_tangent in tangents[1 : 1 + upstreams]:
        scaled_residual = _backward(
            op, [], inputs[0], features, labels, loss_weight, sample_weight, centers
        )
        if upstream_tangent.shape.rank == 1:
            upstream_tangent = upstream_tangent[:, tf.newaxis]
        result += tf.cast(scaled_residual, dtype) * upstream_tangent
    return [tf.cast(result, features.dtype)]


private_apis.register_forward_mode("TclCenterLossStep", _step_forward)
private_apis.register_forward_mode("TclCenterLoss", _center_loss_forward)
private_apis.register_forward_mode("TclCenterLossBackward", _backward_forward)
