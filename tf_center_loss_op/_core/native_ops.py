"""The center loss by the fused ops of the native library, and their registered gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import native, private_apis, xla
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op._core.graph_ops import GraphOps


class NativeOps:
    """An `Implementation` (dispatch.py): each method is one op."""

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """The loss and ||x_i - c_{y_i}||^2 [B]; the centers have moved where a.update_centers."""
        if not a.update_centers and private_apis.in_forward_mode([a.features, a.centers.handle]):
            # TensorFlow's own ops have forward modes of any order, also inside a tf.function.
            return GraphOps().center_loss(a)
        out = _forward(a)
        return out.loss, out.squared_distance

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """The loss as a plain sum, and x_i - c_{y_i} [B, D]; the centers move as above."""
        # With these arguments the gradient to the features, which the op returns, is the residual.
        one = tf.ones([], a.centers.dtype)
        out = _forward(dataclasses.replace(a, reduction="sum", loss_weight=one, sample_weight=None))
        return out.loss, tf.bitcast(out.residual_bits, a.centers.dtype)

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """The step of the centers alone."""
        return native.ops().tcl_update_centers(**_step_inputs(a), **_batch_inputs(a))

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """The step of the centers from a residual x_i - c_{y_i} [B, D] computed before."""
        batch = _batch_inputs(a) | {"features": residual}
        return native.ops().tcl_update_centers(from_residual=True, **_step_inputs(a), **batch)


def _forward(a: Arguments) -> Any:
    if a.update_centers:
        return native.ops().tcl_center_loss_step(
            **_step_inputs(a), **_batch_inputs(a), **_loss_inputs(a)
        )
    # An op that takes a variable's handle does not put the variable on the tape.
    private_apis.variable_accessed(a.centers)
    return native.ops().tcl_center_loss(
        centers=a.centers.handle, **_batch_inputs(a), **_loss_inputs(a)
    )


def _step_inputs(a: Arguments) -> dict[str, Any]:
    return {
        "centers": a.centers.handle,
        "rule": a.rule,
        "atomic": native.gpu_atomics(),
        "after": xla.reads_before_step(a.centers),
        **_scalar("alpha", a.alpha),
    }


def _batch_inputs(a: Arguments) -> dict[str, Any]:
    return {
        "features": a.features,
        "labels": a.labels,
        "has_ignore_class": a.ignore_class is not None,
        "ignore_class": a.ignore_class or 0,
        "Tcenters": a.centers.dtype,
    }


def _loss_inputs(a: Arguments) -> dict[str, Any]:
    return {
        **_scalar("loss_weight", a.loss_weight),
        "sample_weight": [] if a.sample_weight is None else [a.sample_weight],
        "reduction": a.reduction,
        "Tbits": tf.int64 if a.centers.dtype == tf.float64 else tf.uint32,
    }


def _scalar(name: str, tensor: tf.Tensor) -> dict[str, Any]:
    """A scalar as an attribute of the op where it is known while tracing, else as an input.

    The attribute is a float32. In eager mode it stays an input: each value of an attribute would
    make a kernel of its own.
    """
    value = None if tf.executing_eagerly() else tf.get_static_value(tensor)
    if value is None or np.float32(value) != value:
        # A float also here: for an int, TensorFlow leaves its fast path in eager mode.
        return {name: [tensor], f"constant_{name}": 1.0}
    return {name: [], f"constant_{name}": float(value)}


# -------------------------------------------------------------------------------- gradients


def _backward(
    op: tf.Operation,
    upstream: list[tf.Tensor],
    residual_bits: tf.Tensor,
    features: tf.Tensor,
    labels: tf.Tensor,
    loss_weight: list[tf.Tensor],
    sample_weight: list[tf.Tensor],
    centers: list[tf.Tensor],
) -> tf.Tensor:
    return native.ops().tcl_center_loss_backward(
        upstream=upstream,
        residual_bits=residual_bits,
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
    """loss_weight and sample_weight, each a list of none or one, and the inputs after them."""
    factors, samples = len(op.get_attr("Tloss_weight")), len(op.get_attr("Tsample_weight"))
    rest = inputs[factors:]
    return inputs[:factors], rest[:samples], rest[samples:]


def _unless_one(upstream: tf.Tensor) -> list[tf.Tensor]:
    """The upstream gradient as a list, which is empty where it is known to be one."""
    value = None if tf.executing_eagerly() else tf.get_static_value(upstream)
    return [upstream] if value is None or np.any(value != 1) else []


def _to_centers(
    op: tf.Operation, handle: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor
) -> tf.IndexedSlices:
    """The gradient to the table: -rows at the labels that are not ignored.

    XLA knows no shapes that depend on values. There an ignored sample is a row of zeros for class
    0.
    """
    rows = -tf.cast(rows, op.get_attr("Tcenters"))
    if op.get_attr("has_ignore_class"):
        counted = _counted(op, labels)
        if xla.in_xla():
            labels, rows = tf.where(counted, labels, 0), tf.where(counted[:, tf.newaxis], rows, 0)
        else:
            labels, rows = tf.boolean_mask(labels, counted), tf.boolean_mask(rows, counted)
    # A tensor of this graph: TensorFlow does not capture the indices of a gradient in every case.
    labels = tf.identity(labels)
    return tf.IndexedSlices(rows, labels, private_apis.variable_shape(handle))


def _counted(op: tf.Operation, labels: tf.Tensor) -> tf.Tensor:
    """[B], whether a sample is not ignored; compared as int64, as the kernels do."""
    return tf.not_equal(tf.cast(labels, tf.int64), op.get_attr("ignore_class"))


def _factor(op: Any, labels: tf.Tensor, factors: list[tf.Tensor]) -> tf.Tensor:
    """[B], f_i in d loss / d x_i = f_i * (x_i - c_{y_i})."""
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
    _, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest[len(op.get_attr("Talpha")) :])
    gradient = _backward(
        op, _unless_one(upstream), op.outputs[1], features, labels, loss_weight, sample_weight, []
    )
    return [None, gradient] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLoss")
def _center_loss_gradient(op: tf.Operation, upstream: tf.Tensor, *_: Any) -> list[Any]:
    handle, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest)
    # In the centers' type: the gradient to the centers must not be rounded to 16 bits.
    wide = tf.cast(features, op.get_attr("Tcenters"))
    gradient = _backward(
        op, _unless_one(upstream), op.outputs[1], wide, labels, loss_weight, sample_weight, [handle]
    )
    d_features = tf.cast(gradient, features.dtype)
    return [_to_centers(op, handle, labels, gradient), d_features] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLossBackward")
def _backward_gradient(op: tf.Operation, g: tf.Tensor) -> list[Any]:
    """gradient_i = upstream_i * f_i * (x_i - c_{y_i}), with f_i = loss_weight * w_i (/ N)."""
    residual_bits, *rest = op.inputs
    upstreams = len(op.get_attr("Tupstream"))
    upstream, (features, labels, *rest) = rest[:upstreams], rest[upstreams:]
    loss_weight, sample_weight, centers = _split_weights(op, rest)

    # The op again, not the bits of its output: third derivatives go through it.
    residual = _backward(
        op, [], residual_bits, features, labels, loss_weight, sample_weight, centers
    )
    dtype = op.get_attr("Tcenters")
    g = tf.cast(g, dtype)
    per_sample = tf.reduce_sum(g * tf.cast(residual, dtype), axis=1)
    d_upstream = [per_sample if u.shape.rank == 1 else tf.reduce_sum(per_sample) for u in upstream]

    factor = _factor(op, labels, loss_weight + sample_weight + upstream)
    rows = g * factor[:, tf.newaxis]

    d_centers = [_to_centers(op, handle, labels, rows) for handle in centers]
    d_features = tf.cast(rows, features.dtype)
    no_gradient = [None] * len(loss_weight + sample_weight)
    return [None, *d_upstream, d_features, None, *no_gradient, *d_centers]


# ------------------------------------------------------------------------------ forward mode


class _Attributes:
    """The attributes of an op, as `tf.Operation.get_attr` returns them."""

    def __init__(self, pairs: tuple):
        self._values = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def get_attr(self, name: str) -> Any:
        """The value of an attribute."""
        return self._values[name]


def _in_table(labels: tf.Tensor, num_classes: tf.Tensor) -> tf.Tensor:
    """The labels, 0 for one outside the table: an ignored sample, whose factor is zero."""
    is_row = (labels >= 0) & (tf.cast(labels, tf.int64) < tf.cast(num_classes, tf.int64))
    return tf.where(is_row, labels, 0)


def _residual_tangent(
    features: tf.Tensor, labels: tf.Tensor, centers: list[tf.Tensor | None], dtype: tf.DType
) -> tf.Tensor:
    """The tangent of x_i - c_{y_i}, from the tangents of features and centers, None for zero."""
    tangent = tf.cast(features, dtype)
    for table in centers:
        if table is not None:
            tangent -= tf.gather(table, _in_table(labels, tf.shape(table)[0]))
    return tangent


def _loss_outputs(op: _Attributes, products: tf.Tensor, outputs: list) -> list[tf.Tensor]:
    """The tangents of loss, residual_bits and squared_distance.

    The last two are zero: integers have none, and the public functions return the squared distance
    without a gradient. With None in their place, a forward mode around this one would fail.
    """
    axis = 1 if op.get_attr("reduction") in ("none", b"none") else None
    loss = tf.reduce_sum(products, axis=axis)
    return [loss, *(tf.zeros_like(other) for other in outputs[1:])]


def _step_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """The centers have moved, so the gradient f_i * (x_i - c_{y_i}) comes from the outputs."""
    op = _Attributes(attributes)
    _, features, labels, *rest = inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest[len(op.get_attr("Talpha")) :])
    dtype = outputs[0].dtype
    wide = tf.cast(features, dtype)
    gradient = _backward(op, [], outputs[1], wide, labels, loss_weight, sample_weight, [])
    return _loss_outputs(op, gradient * tf.cast(tangents[1], dtype), outputs)


def _center_loss_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """In TensorFlow's own ops, which any mode of differentiation goes through again."""
    op = _Attributes(attributes)
    handle, features, labels, *rest = inputs
    loss_weight, sample_weight, _ = _split_weights(op, rest)
    dtype = outputs[0].dtype
    read = _in_table(labels, private_apis.variable_shape(handle)[0])
    rows = tf.raw_ops.ResourceGather(resource=handle, indices=read, dtype=dtype)
    factor = _factor(op, labels, [*loss_weight, *sample_weight])[:, tf.newaxis]
    tangent = _residual_tangent(tangents[1], labels, [tangents[0]], dtype)
    residual = tf.cast(features, dtype) - rows
    products = tf.where(tf.not_equal(factor, 0), factor * residual * tangent, 0)
    return _loss_outputs(op, products, outputs)


def _backward_forward(attributes: tuple, inputs: list, outputs: list, tangents: list) -> list:
    """The tangent of upstream_i * f_i * (x_i - c_{y_i})."""
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
        gradient = _backward(
            op, [], inputs[0], features, labels, loss_weight, sample_weight, centers
        )
        if upstream_tangent.shape.rank == 1:
            upstream_tangent = upstream_tangent[:, tf.newaxis]
        result += tf.cast(gradient, dtype) * upstream_tangent
    return [tf.cast(result, features.dtype)]


private_apis.register_forward_mode("TclCenterLossStep", _step_forward)
private_apis.register_forward_mode("TclCenterLoss", _center_loss_forward)
private_apis.register_forward_mode("TclCenterLossBackward", _backward_forward)
