"""Random calls: native, graph and XLA agree with the float64 oracle, or raise the same error.

The cases are the same in each run, within a budget of seconds. `make fuzz` tries new ones for
minutes. A case that fails becomes a literal test, in the file of the promise that it breaks.
"""

import re

import numpy as np
import pytest
import tensorflow as tf

import fuzzing
import tf_center_loss_op as tcl
from implementations import IMPLEMENTATIONS
from stepping import wide

REFUSED = (ValueError, tf.errors.InvalidArgumentError)


def signature(case, labels):
    """What tracing knows in modes "unknown" and "unknown-D"."""
    unknown = [None] * len(case.leading)
    width = None if case.mode == "unknown-D" else case.dim
    rows = labels.ndim > len(case.leading)
    row = [None if case.mode == "unknown-D" else case.classes] if rows else []
    return [
        tf.TensorSpec([*unknown, width], case.dtype),
        tf.TensorSpec([*unknown, *row], labels.dtype),
    ]


def outcome(case, arrays, impl, jit=None):
    """(loss, gradient to the features, centers after the call, gradient to the centers)."""
    centers = tf.Variable(arrays.centers)
    alpha = case.alpha
    if case.alpha_kind != "number":
        kind = tf.Variable if case.alpha_kind == "variable" else tf.constant
        alpha = kind(alpha, dtype=tf.float64)
    weights = None if arrays.sample_weight is None else tf.constant(arrays.sample_weight)

    def call(features, labels):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features,
                labels,
                centers,
                alpha=alpha,
                rule=case.rule,
                reduction=case.reduction,
                sample_weight=weights,
                ignore_class=arrays.ignore_class,
                update_centers=case.update_centers,
                impl=impl,
            )
        up = None if arrays.upstream is None else tf.constant(arrays.upstream)
        sources = [features] if case.update_centers else [features, centers]
        gradients = tape.gradient(loss, sources, up)
        return loss, gradients[0], [tf.convert_to_tensor(g) for g in gradients[1:]]

    if case.mode.startswith("unknown"):
        call = tf.function(
            call, input_signature=signature(case, arrays.labels), jit_compile=jit, autograph=False
        )
    elif case.mode == "static":
        call = tf.function(call, jit_compile=jit, autograph=False)
    try:
        loss, gradient, to_centers = call(tf.constant(arrays.features), tf.constant(arrays.labels))
    except Exception:
        assert np.array_equal(centers.numpy(), arrays.centers), "an error, and yet it has written"
        raise
    assert loss.dtype == centers.dtype and gradient.dtype == arrays.features.dtype
    return wide(loss), wide(gradient), wide(centers), [wide(g) for g in to_centers]


def check(case, arrays, impl, jit=None):
    bad = fuzzing.first_bad(case, arrays)
    raises = not (jit and impl == "graph")
    if bad is not None and raises:
        with pytest.raises(REFUSED, match=re.escape(bad[1])):
            outcome(case, arrays, impl, jit)
        return
    truth = fuzzing.expected(case, arrays, () if bad is None else bad[0])
    loss, gradient, centers, to_centers = outcome(case, arrays, impl, jit)
    fuzzing.near("loss", loss, truth.loss, truth.loss_bound)
    fuzzing.near("gradient", gradient, truth.feature_gradient, truth.feature_gradient_bound)
    if case.update_centers:
        fuzzing.near("centers", centers, truth.centers, truth.centers_bound)
        still = (truth.centers == arrays.centers).all(axis=1)
        assert np.array_equal(centers[still], arrays.centers[still].astype(np.float64))
    else:
        assert np.array_equal(centers, arrays.centers.astype(np.float64))
        # XLA drops the row of a label outside the table.
        (dense,) = to_centers
        fuzzing.near(
            "gradient to the centers", dense, truth.centers_gradient, truth.centers_gradient_bound
        )


def check_all(case, jit=None):
    arrays = fuzzing.make(case)
    for impl in IMPLEMENTATIONS:
        check(case, arrays, impl, jit)


def test_eager_calls():
    fuzzing.run(check_all, fuzzing.cases(["eager"]), examples=250)


def test_traced_calls():
    fuzzing.run(check_all, fuzzing.cases(["static", "unknown", "unknown-D"]), examples=60)


# A compilation takes a second.
def test_compiled_calls():
    cases = fuzzing.cases(
        ["static", "unknown", "unknown-D"],
        leadings=[(4,), (65,), (0,), (2, 3)],
        dims=[1, 5, 17],
    )
    fuzzing.run(lambda case: check_all(case, jit=True), cases, examples=15)
