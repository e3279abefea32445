"""The guide docs/variants.md: variants equal the implementations that it names, in float64."""

import runpy

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from documentation import ROOT, blocks

B, D, C = 12, 6, 5


def batch(seed):
    """Features, labels (one class is not among them) and centers."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, D)), rng.integers(0, C - 1, B), rng.normal(size=(C, D))


@pytest.fixture
def guide(tmp_path):
    """A function that the guide defines, by name; runs the block that defines it."""

    def find(name):
        sources = blocks(ROOT / "docs" / "variants.md").values()
        (source,) = (source for source in sources if f"def {name}(" in source)
        program = tmp_path / "snippet.py"  # a file, because AutoGraph reads the source
        program.write_text(source)
        return runpy.run_path(str(program))[name]

    return find


def radius_layer(x, y, c, radius, rate):
    """Loss, feature gradient and next centers of the authors' layer of 2019 with type L2."""
    difference = x - c[y]
    count = np.bincount(y, minlength=C)
    length = np.sqrt(np.sum(difference**2, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        propagate = (length - radius) / length
    propagate = np.where(propagate > 0, propagate, 0.0)
    difference = difference * propagate[:, None]
    loss = np.sum(difference**2) / B / 2
    center_diff = np.zeros([C, D])
    for m in range(B):
        center_diff[y[m]] -= difference[m] / count[y[m]]
    return loss, difference / B, c - rate * center_diff


@pytest.mark.parametrize("radius", [0.0, 1.5, 3.0, 100.0])
def test_the_radius(impl, guide, radius):
    radius_loss = guide("radius_loss")
    x, y, c = batch(0)
    x[3] = c[y[3]]  # a sample in its center
    length = np.linalg.norm(x - c[y], axis=1)
    assert radius in (0.0, 100.0) or (length < radius).any() and (length > radius).any()
    centers, features = tf.Variable(c), tf.constant(x)
    for _ in range(3):
        loss, gradient, after = radius_layer(x, y, centers.numpy(), radius, rate=0.3)
        with tf.GradientTape() as tape:
            tape.watch(features)
            ours = radius_loss(features, y, centers, np.float64(radius), alpha=0.3, impl=impl)
        np.testing.assert_allclose(ours, loss, rtol=2e-15, atol=1e-28)
        np.testing.assert_allclose(tape.gradient(ours, features), gradient, atol=8e-16)
        np.testing.assert_allclose(centers, after, atol=8e-16)


@pytest.mark.parametrize("rule", ["paper", "mean"])
def test_momentum_and_decay_as_in_caffes_solver(guide, rule):
    _, _, c = batch(0)
    centers, velocity = tf.Variable(c), tf.Variable(np.zeros([C, D]))
    step = guide("momentum_step")
    rate, momentum, decay = 0.1, 0.9, 0.01
    history = np.zeros([C, D])
    for seed in range(5):
        x, y, _ = batch(seed)
        count = np.bincount(y, minlength=C)[:, None] + (rule == "paper")
        gradient = np.zeros([C, D])
        np.add.at(gradient, y, c[y] - x)
        gradient /= np.maximum(count, 1)
        history = momentum * history + rate * (gradient + decay * c)
        options = {"alpha": rate, "momentum": momentum, "decay": decay, "rule": rule}
        step(tf.constant(x), tf.constant(y), centers, velocity, **options)
        c = c - history
        np.testing.assert_allclose(centers, c, rtol=1e-12, atol=1e-14)


def test_the_cosine_form(guide):
    x, y, c = batch(0)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    centers, features = tf.Variable(c), tf.constant(x)
    cosine_loss = guide("cosine_loss")
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = cosine_loss(features, tf.constant(y), centers)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = np.sum(unit * c[y], axis=1, keepdims=True)
    np.testing.assert_allclose(loss, np.mean(1 - cosine), rtol=1e-12)
    # d(1 - cos)/dx, which is orthogonal to x.
    expected = -(c[y] - cosine * unit) / np.linalg.norm(x, axis=1, keepdims=True) / B
    np.testing.assert_allclose(tape.gradient(loss, features), expected, rtol=1e-10, atol=1e-14)
    after = c.copy()
    for j in np.unique(y):
        after[j] += 0.5 / (1 + np.sum(y == j)) * np.sum(unit[y == j] - c[j], axis=0)
        after[j] /= np.linalg.norm(after[j])
    np.testing.assert_allclose(centers, after, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shared_gradient", [True, False])
def test_centers_shared_with_the_softmax_weights(impl, shared_gradient):
    x, y, c = batch(0)
    weights, features = tf.Variable(c), tf.constant(x)
    options = {"update_centers": False} if shared_gradient else {"alpha": 0.0}
    with tf.GradientTape() as tape:
        logits = tf.matmul(features, weights, transpose_b=True)
        softmax = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.constant(y), logits)
        loss = tf.reduce_mean(softmax) + 0.3 * tcl.center_loss(
            features, y, weights, impl=impl, **options
        )
    gradient = tf.convert_to_tensor(tape.gradient(loss, weights))
    probabilities = tf.nn.softmax(x @ c.T).numpy() - np.eye(C)[y]
    expected = probabilities.T @ x / B
    if shared_gradient:
        np.add.at(expected, y, 0.3 * (c[y] - x) / B)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(weights, c)
