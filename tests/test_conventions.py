"""Every convention reproduces the formula of the codebase that it names."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

B, D, C, STEP = 12, 6, 5, 0.3


def per_class(values, labels):
    """Sum of the samples' values by class, [C] or [C, D]."""
    sums = np.zeros([C, *values.shape[1:]])
    np.add.at(sums, labels, values)
    return sums


def counts(labels):
    return per_class(np.ones(B), labels)[:, None]


# Each formula is written as in its codebase. It takes features x, labels y, centers c and the
# codebase's step size; it returns the codebase's loss and the centers after a step.


def paper(x, y, c, alpha):
    """Equation 2, and equation 4 with delta(y_i = j)."""
    loss = 0.5 * sum(np.sum((x[i] - c[y[i]]) ** 2) for i in range(B))
    delta = np.zeros([C, D])
    for j in range(C):
        numerator = sum(((y[i] == j) * (c[j] - x[i]) for i in range(B)), np.zeros(D))
        delta[j] = numerator / (1 + sum(y[i] == j for i in range(B)))
    return loss, c - alpha * delta


def caffe_face(x, y, c, rate):
    distance = x - c[y]
    variation_sum = -per_class(distance, y)
    return np.sum(distance**2) / B / 2, c - rate * variation_sum / (counts(y) + 1)


def authors_2019(x, y, c, rate):
    difference = per_class(c[y] - x, y)
    return np.sum((x - c[y]) ** 2) / B / 2, c - rate * difference / np.maximum(counts(y), 1)


def encode_ts(x, y, c, alpha):
    _, unique_idx, unique_count = np.unique(y, return_inverse=True, return_counts=True)
    appear_times = unique_count[unique_idx][:, None]
    diff = alpha * (c[y] - x) / (1 + appear_times)
    return np.sum((x - c[y]) ** 2) / 2, c - per_class(diff, y)


def tutorial(x, y, c, alpha):
    _, unique_idx, unique_count = np.unique(y, return_inverse=True, return_counts=True)
    appear_times = unique_count[unique_idx][:, None]
    diff = alpha * (1 - alpha) * (c[y] - x) / (1 + appear_times)
    return np.sum((x - c[y]) ** 2) / 2, c - per_class(diff, y)


def facenet(x, y, c, alfa):
    diff = (1 - alfa) * (c[y] - x)
    return np.mean((x - c[y]) ** 2), c - per_class(diff, y)


def pytorch_center_loss(x, y, c, lr):
    distmat = np.sum(x**2, 1)[:, None] + np.sum(c**2, 1)[None] - 2 * x @ c.T
    mask = y[:, None] == np.arange(C)
    loss = np.sum(distmat * mask) / B
    gradient = 2 * per_class(c[y] - x, y) / B
    return loss, c - lr * gradient


def mnist_center_loss_pytorch(x, y, c, lr):
    loss = np.sum((x - c[y]) ** 2) / 2 / B
    counts_from_one = 1 + counts(y)
    gradient = per_class(c[y] - x, y) / counts_from_one / B
    return loss, c - lr * gradient


def louis_she(x, y, c, alpha):
    delta = per_class(x - c[y], y) / (counts(y) + 1.0) * alpha
    return np.mean((x - c[y]) ** 2), c + delta


def paddle(x, y, c, update_rate):
    center_diff = x - c[y]
    center_update_count = 1 + counts(y)
    step = update_rate * per_class(center_diff, y) / center_update_count
    return np.sum(center_diff**2, axis=1) / 2, c + step


def mxnet(x, y, c, alpha):
    diff = x - c[y]
    return np.sum(diff**2) / B / 2, c + alpha * per_class(diff, y) / (1 + counts(y))


FORMULAS = {
    "paper": paper,
    "caffe-face": caffe_face,
    "authors-2019": authors_2019,
    "EncodeTS": encode_ts,
    "tutorial": tutorial,
    "facenet": facenet,
    "pytorch-center-loss": pytorch_center_loss,
    "MNIST_center_loss_pytorch": mnist_center_loss_pytorch,
    "louis-she": louis_she,
    "paddle": paddle,
    "mxnet": mxnet,
}


def test_every_convention_has_its_formula_here():
    assert set(tcl.CONVENTIONS) == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_convention_gives_the_formulas_results(impl, name):
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(B, D)), rng.normal(size=(C, D))
    y = rng.integers(0, C - 1, B)  # one class is not in the batch
    expected_loss, expected_centers = FORMULAS[name](x, y, c, STEP)

    convention = tcl.CONVENTIONS[name]
    centers = tf.Variable(c)
    loss = convention.loss_factor(D) * tcl.center_loss(
        x,
        y,
        centers,
        alpha=convention.alpha(STEP),
        rule=convention.rule,
        reduction=convention.reduction,
        impl=impl,
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(centers.numpy(), expected_centers, rtol=1e-12, atol=1e-14)


# The gradient to the features as each codebase writes it, divided by d_i = x_i - c_{y_i}.
GRADIENTS = {
    "paper": 1,
    "caffe-face": 1 / B,
    "authors-2019": 1 / B,
    "EncodeTS": 1,
    "tutorial": 1,
    "facenet": 2 / (B * D),
    "pytorch-center-loss": 2 / B,
    "MNIST_center_loss_pytorch": 1 / B,
    "louis-she": 2 / (B * D),
    "paddle": 1,
    "mxnet": 1 / B,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_convention_gives_the_codebases_gradient(impl, name):
    rng = np.random.default_rng(1)
    x, c, y = rng.normal(size=(B, D)), rng.normal(size=(C, D)), rng.integers(0, C, B)
    convention, features = tcl.CONVENTIONS[name], tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = convention.loss_factor(D) * tcl.center_loss(
            features,
            y,
            tf.Variable(c),
            rule=convention.rule,
            reduction=convention.reduction,
            impl=impl,
        )
    expected = GRADIENTS[name] * (x - c[y])
    np.testing.assert_allclose(tape.gradient(loss, features), expected, rtol=1e-12)


def test_one_optimizer_for_the_model_and_the_centers(impl):
    # KaiyangZhou's loss in an optimizer with its weight left in: alpha = 2 lr lambda.
    rng = np.random.default_rng(2)
    x, c, y = rng.normal(size=(B, D)), rng.normal(size=(C, D)), rng.integers(0, C, B)
    lr, weight = 0.1, 0.7
    gradient = weight * 2 * per_class(c[y] - x, y) / B
    centers = tf.Variable(c)
    tcl.update_centers(x, y, centers, alpha=2 * lr * weight, rule="batch_mean", impl=impl)
    np.testing.assert_allclose(centers.numpy(), c - lr * gradient, rtol=1e-12)


# The guide, docs/choosing.md.


def test_the_guides_weights_in_this_packages_units():
    guide = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    cell = r" ([\d.e-]+) \|"
    rows = re.findall(rf"^\| (.+?) \|{cell} (.+?) \|{cell}{cell}{cell} .+\|$", guide, re.M)
    assert len(rows) == 10
    for name, theirs, factor, dim, batch, ours in rows:
        factors = {"1": 1, "2": 2, "2/D": 2 / float(dim), "B": float(batch)}
        assert float(ours) == pytest.approx(float(theirs) * factors[factor], rel=0.05), name


@pytest.mark.parametrize(
    "rule, limit",
    [
        ("paper", 2 * (1 + 3) / 3),
        ("mean", 2.0),
        ("sum", 2 / 3),
        ("batch_mean", 2 * 5 / 3),
        ("paper_batch_mean", 2 * (1 + 3) * 5 / 3),
        ("tutorial", 1.0),
    ],
)
def test_where_a_rule_diverges(impl, rule, limit):
    # n = 3 of N = 5 samples are of class 0 and lie in one point.
    x, y = np.ones([5, D]), [0, 0, 0, 1, 2]
    for alpha, diverges in ((0.98 * limit, False), (1.02 * limit, True)):
        centers = tf.Variable(np.zeros([C, D]))
        for _ in range(60):
            tcl.update_centers(x, y, centers, alpha=alpha, rule=rule, impl=impl)
        distance = np.abs(centers.numpy()[0] - 1).max()
        assert (distance > 1.5) if diverges else (distance < 0.7)


def test_the_guide_has_every_convention():
    guide = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    rows = re.findall(r'^\| `([\w-]+)` \| (.+?) \| `"(\w+)"` \| (.+?) \| `"(\w+)"` \|', guide, re.M)
    assert [row[0] for row in rows] == list(tcl.CONVENTIONS)
    for name, step, rule, _, reduction in rows:
        convention = tcl.CONVENTIONS[name]
        assert (step, rule, reduction) == (
            convention.step_name,
            convention.rule,
            convention.reduction,
        )


def test_a_convention_has_a_source():
    for convention in tcl.CONVENTIONS.values():
        assert convention.source and convention.step_name


def test_conventions_cannot_be_changed_by_accident():
    with pytest.raises(TypeError, match="does not support item assignment"):
        tcl.CONVENTIONS["paper"] = None
