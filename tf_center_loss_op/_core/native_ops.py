"""The native ops and their registered gradients."""

import dataclasses

import numpy as np
import tensorflow as tf

# A variable is put on the tape by being read; an op that takes its handle does not count as such.
# tf.gather does the same, with the same function.
from tensorflow.python.ops.resource_variable_ops import variable_accessed

from tf_center_loss_op import _native
from tf_center_loss_op._arguments import Arguments


def center_loss(a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss and ||x_i - c_{y_i}||^2 [B]; the centers have moved where a.update_centers."""
    out = _step(a) if a.update_centers else _read_only(a)
    return out.loss, out.squared_distance


def update_centers(a: Arguments) -> tf.Operation | None:
    """The step of the centers alone."""
    return _native.ops().tcl_update_centers(**_move(a), **_batch(a))


def loss_and_residual(a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss and d(loss)/d(features) [B, D] in the centers' type; no center moves."""
    out = _read_only(a)
    return out.loss, tf.bitcast(out.residual_bits, a.centers.dtype)


def update_from_residual(a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
    """The step of the centers from a residual x_i - c_{y_i} [B, D] computed before."""
    batch = _batch(a) | {"features": residual}
    return _native.ops().tcl_update_centers(from_residual=True, **_move(a), **batch)


def residual_and_step(a: Arguments) -> tf.Tensor:
    """x_i - c_{y_i} [B, D]; the centers have moved where a.update_centers."""
    a = dataclasses.replace(a, reduction="sum", loss_weight=tf.ones([], a.centers.dtype))
    out = _step(a) if a.update_centers else _read_only(a)
    return tf.bitcast(out.residual_bits, a.centers.dtype)


def _step(a):
    return _native.ops().tcl_center_loss_step(**_move(a), **_batch(a), **_loss(a))


def _read_only(a):
    variable_accessed(a.centers)
    return _native.ops().tcl_center_loss(centers=a.centers.handle, **_batch(a), **_loss(a))


def _move(a):
    return {
        "centers": a.centers.handle,
        "rule": a.rule,
        "atomic": _native.gpu_atomics(),
        "after": _native.reads_in_xla(a.centers),
        **_number("alpha", a.alpha),
    }


def _batch(a):
    return {
        "features": a.features,
        "labels": a.labels,
        "has_ignore_class": a.ignore_class is not None,
        "ignore_class": a.ignore_class or 0,
        "Tcenters": a.centers.dtype,
    }


def _loss(a):
    return {
        **_number("loss_weight", a.loss_weight),
        "sample_weight": [] if a.sample_weight is None else [a.sample_weight],
        "reduction": a.reduction,
        "Tbits": tf.int64 if a.centers.dtype == tf.float64 else tf.uint32,
    }


def _number(name, tensor):
    """A scalar input of an op, or its attribute where the number is known while tracing.

    An attribute is a float32. In eager mode each number would make a kernel of its own.
    """
    value = None if tf.executing_eagerly() else tf.get_static_value(tensor)
    if value is None or np.float32(value) != value:
        return {name: [tensor]}
    return {name: [], f"constant_{name}": float(value)}


def _backward(op, upstream, residual_bits, features, labels, loss_weight, sample_weight, centers):
    return _native.ops().tcl_center_loss_backward(
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


def _weights(op, inputs):
    """loss_weight and sample_weight, each a list of none or one, and the inputs after them."""
    weights, sample_weights = len(op.get_attr("Tloss_weight")), len(op.get_attr("Tsample_weight"))
    rest = inputs[weights:]
    return inputs[:weights], rest[:sample_weights], rest[sample_weights:]


def _unless_one(upstream):
    """The upstream gradient, as a list, which is empty where it is known to be one."""
    value = None if tf.executing_eagerly() else tf.get_static_value(upstream)
    return [upstream] if value is None or np.any(value != 1) else []


def _slices(op, handle, labels, rows):
    """The gradient to the table: -rows at the labels that count.

    XLA knows no shapes that depend on values: there the others are rows of zeros for class 0.
    """
    rows = -tf.cast(rows, op.get_attr("Tcenters"))
    if op.get_attr("has_ignore_class"):
        counted = tf.not_equal(labels, tf.cast(op.get_attr("ignore_class"), labels.dtype))
        if _native.in_xla():
            labels, rows = tf.where(counted, labels, 0), tf.where(counted[:, tf.newaxis], rows, 0)
        else:
            labels, rows = tf.boolean_mask(labels, counted), tf.boolean_mask(rows, counted)
    return tf.IndexedSlices(rows, labels, tf.raw_ops.VariableShape(input=handle))


@tf.RegisterGradient("TclCenterLossStep")
def _step_gradient(op, upstream, *_):
    _, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _weights(op, rest[len(op.get_attr("Talpha")) :])
    gradient = _backward(
        op, _unless_one(upstream), op.outputs[1], features, labels, loss_weight, sample_weight, []
    )
    return [None, gradient] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLoss")
def _center_loss_gradient(op, upstream, *_):
    handle, features, labels, *rest = op.inputs
    loss_weight, sample_weight, _ = _weights(op, rest)
    # In the centers' type: the gradient to the centers is not rounded to 16 bits on its way.
    wide = tf.cast(features, op.get_attr("Tcenters"))
    gradient = _backward(
        op, _unless_one(upstream), op.outputs[1], wide, labels, loss_weight, sample_weight, [handle]
    )
    d_features = tf.cast(gradient, features.dtype)
    return [_slices(op, handle, labels, gradient), d_features] + [None] * (len(op.inputs) - 2)


@tf.RegisterGradient("TclCenterLossBackward")
def _backward_gradient(op, g):
    """gradient_i = upstream_i * f_i * (x_i - c_{y_i}), with f_i = loss_weight * w_i (/ N)."""
    residual_bits, *rest = op.inputs
    upstreams = len(op.get_attr("Tupstream"))
    upstream, (features, labels, *rest) = rest[:upstreams], rest[upstreams:]
    loss_weight, sample_weight, centers = _weights(op, rest)

    # Taken through the op again, not from its bits, so that third derivatives exist.
    residual = _backward(
        op, [], residual_bits, features, labels, loss_weight, sample_weight, centers
    )
    dtype = op.get_attr("Tcenters")
    g = tf.cast(g, dtype)
    per_sample = tf.reduce_sum(g * tf.cast(residual, dtype), axis=1)
    d_upstream = [per_sample if u.shape.rank == 1 else tf.reduce_sum(per_sample) for u in upstream]

    factor = tf.fill(tf.shape(labels), tf.constant(op.get_attr("constant_loss_weight"), dtype))
    for given in loss_weight + sample_weight + upstream:
        factor *= given
    counted = tf.ones_like(factor)
    if op.get_attr("has_ignore_class"):
        ignore_class = tf.cast(op.get_attr("ignore_class"), labels.dtype)
        counted = tf.cast(tf.not_equal(labels, ignore_class), dtype)
        factor = tf.where(counted > 0, factor, 0)
    if op.get_attr("reduction") == b"mean":
        factor = tf.math.divide_no_nan(factor, tf.reduce_sum(counted))
    rows = g * factor[:, tf.newaxis]

    d_centers = [_slices(op, handle, labels, rows) for handle in centers]
    d_features = tf.cast(rows, features.dtype)
    nothing = [None] * len(loss_weight + sample_weight)
    return [None, *d_upstream, d_features, None, *nothing, *d_centers]
