"""A row with NaN or infinity changes loss and gradient, but never the table."""

import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl

BAD = [np.nan, np.inf, -np.inf]
RULES = ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"]


def step(impl, features, labels, centers, **options):
    features = tf.constant(features)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, labels, centers, impl=impl, **options)
    return loss.numpy(), tape.gradient(loss, features)


@pytest.mark.parametrize("column", [0, 3, 16])  # first, inside a vector, in the remainder
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_member_of_a_group(impl, bad, column):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 17)).astype(np.float32)
    features[4, column] = bad
    labels = [0, 1, 0, 2, 1, 1, 0, 2, 3]
    before = rng.normal(size=(5, 17)).astype(np.float32)
    centers = tf.Variable(before)
    losses, gradient = step(impl, features, labels, centers, reduction="none", alpha=0.3)
    truth = oracle.center_loss(features, labels, before, reduction="none", alpha=0.3)
    good = np.arange(9) != 4
    assert not np.isfinite(losses[4])
    assert not np.isfinite(gradient.numpy()[4, column])
    np.testing.assert_allclose(losses[good], truth.loss[good], rtol=1e-5)
    np.testing.assert_allclose(
        gradient.numpy()[good], truth.feature_gradient[good], rtol=1e-5, atol=1e-6
    )
    # Class 1 moves by its two good members, counted as two.
    assert np.isfinite(centers.numpy()).all()
    np.testing.assert_allclose(centers.numpy(), truth.centers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_rules_count_without_the_bad_row(impl, rule):
    # Class 0: samples 2 and NaN; class 1: only inf. n_0 = 1, N = 3 (it is not ignored).
    moved = {
        "paper": 0.5 / 2,
        "mean": 0.5,
        "sum": 0.5,
        "batch_mean": 0.5 / 3,
        "paper_batch_mean": 0.5 / 2 / 3,
        "tutorial": 0.25 / 2,
    }[rule] * 2
    centers = tf.Variable([[0.0], [7.0]])
    step(impl, [[2.0], [np.nan], [np.inf]], [0, 0, 1], centers, rule=rule)
    np.testing.assert_allclose(centers.numpy(), [[moved], [7.0]], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", BAD)
def test_the_scalar_loss_shows_it(impl, bad, reduction):
    loss, gradient = step(
        impl, [[1.0], [bad]], [0, 1], tf.Variable([[0.0], [0.0]]), reduction=reduction
    )
    assert not np.isfinite(loss)
    assert gradient.numpy()[0, 0] == (0.5 if reduction == "mean" else 1.0)
    assert not np.isfinite(gradient.numpy()[1, 0])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_of_nothing_else(impl, bad, dtype):
    centers = tf.Variable(tf.ones([3, 5], tf.float64 if dtype == tf.float64 else tf.float32))
    losses, gradient = step(
        impl, tf.fill([7, 5], tf.cast(bad, dtype)), [0, 1, 2, 0, 1, 0, 0], centers, reduction="none"
    )
    assert not np.isfinite(losses).any()
    assert not tf.reduce_any(tf.math.is_finite(gradient))
    assert (centers.numpy() == 1).all()


def test_one_bad_row_in_a_group_that_is_split(impl):
    features = np.full((6000, 3), 2, np.float32)
    features[3456, 1] = np.nan
    centers = tf.Variable(tf.zeros([2, 3]))
    losses, _ = step(
        impl, features, np.ones(6000, np.int32), centers, rule="mean", reduction="none"
    )
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [3456]
    np.testing.assert_allclose(centers.numpy(), [[0.0] * 3, [1.0] * 3], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_is_split_without_a_finite_row(impl, rule):
    # Class 1 has no sample to divide by, in any of its chunks.
    features = np.full((301, 300), np.inf, np.float32)
    features[300] = 2
    labels = np.ones(301, np.int32)
    labels[300] = 0
    centers = tf.Variable(tf.ones([2, 300]))
    step(impl, features, labels, centers, rule=rule)
    assert (centers.numpy()[1] == 1).all()
    assert (centers.numpy()[0] > 1).all()


def test_an_ignored_bad_row_is_not_seen_at_all(impl):
    centers = tf.Variable([[0.0], [0.0]])
    loss, gradient = step(
        impl, [[2.0], [np.nan]], [0, -1], centers, ignore_class=-1, reduction="mean"
    )
    assert loss == 2.0
    assert gradient.numpy().tolist() == [[2.0], [0.0]]
    assert centers.numpy().tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("bad", BAD)
def test_update_centers_has_the_same_guard(impl, bad):
    centers = tf.Variable([[0.0], [0.0]])
    tcl.update_centers([[2.0], [bad], [bad]], [0, 0, 1], centers, impl=impl)
    assert centers.numpy().tolist() == [[0.5], [0.0]]


def test_a_large_finite_row_is_no_bad_row(impl):
    # The square overflows, so the loss is infinite; the row itself is finite and moves its center.
    centers = tf.Variable([[0.0], [0.0]])
    loss, gradient = step(impl, [[1e30], [1.0]], [0, 1], centers, reduction="sum", rule="mean")
    assert np.isinf(loss)
    np.testing.assert_allclose(gradient, [[1e30], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(centers.numpy(), [[5e29], [0.5]], rtol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_bad_weight_of_an_ignored_sample_is_not_seen_at_all(impl, bad, reduction):
    centers = tf.Variable([[0.0], [0.0]])
    loss, gradient = step(
        impl,
        [[2.0], [3.0]],
        [0, -1],
        centers,
        ignore_class=-1,
        sample_weight=[1.0, bad],
        reduction=reduction,
    )
    assert loss.tolist() == ([2.0, 0.0] if reduction == "none" else 2.0)
    assert gradient.numpy().tolist() == [[2.0], [0.0]]
    assert centers.numpy().tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_weight_shows_in_the_loss_and_moves_as_any_other(impl, bad, reduction):
    centers = tf.Variable([[0.0], [0.0]])
    loss, gradient = step(
        impl, [[2.0], [4.0]], [0, 1], centers, sample_weight=[1.0, bad], reduction=reduction
    )
    assert not np.isfinite(loss[1] if reduction == "none" else loss)
    assert gradient.numpy()[0] == (1.0 if reduction == "mean" else 2.0)
    assert not np.isfinite(gradient.numpy()[1])
    assert centers.numpy().tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("rule", RULES)
def test_alpha_zero_moves_nothing_even_where_a_residual_overflows(impl, rule):
    # x - c is infinite, and 0 * inf would be NaN.
    before = np.array([[-3e38, 1.0], [7.0, 2.0]], np.float32)
    centers = tf.Variable(before)
    step(impl, [[3e38, 1.0]], [0], centers, rule=rule, alpha=0.0)
    assert np.array_equal(centers.numpy(), before)
