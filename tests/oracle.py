"""The contract of the center loss in NumPy, sample by sample; imports nothing of the package."""

from typing import NamedTuple

import numpy as np

# Wider than float64 on machines that have it, so that the oracle's rounding does not matter in a
# float64 comparison. Results are float64.
WIDE = np.longdouble


class Step(NamedTuple):
    """The expected results of one call: float64 arrays."""

    loss: np.ndarray  # scalar, or the labels' shape for reduction "none"
    feature_gradient: np.ndarray  # the features' shape, upstream included
    centers: np.ndarray  # [C, D], after the step
    centers_gradient: np.ndarray  # [C, D], dense, for update_centers=False, upstream included


def class_ids(labels, feature_rank):
    """Class ids as they are; one-hot or probability rows by their first maximum."""
    labels = np.asarray(labels)
    if labels.ndim < feature_rank:
        return labels.astype(np.int64)
    rows = labels.reshape(-1, labels.shape[-1])
    ids = np.zeros(len(rows), np.int64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value > row[ids[i]]:
                ids[i] = j
    return ids.reshape(labels.shape[:-1])


def step_size(rule, alpha, n, total):
    """The factor s_i of a sample whose class was counted n times in a batch of `total` samples."""
    alpha = WIDE(alpha)
    if rule == "paper":
        return alpha / (1 + n)
    if rule == "mean":
        return alpha / n
    if rule == "sum":
        return alpha
    if rule == "batch_mean":
        return alpha / total
    if rule == "paper_batch_mean":
        return alpha / ((1 + n) * total)
    if rule == "tutorial":
        return alpha * (1 - alpha) / (1 + n)
    raise ValueError(rule)


def center_loss(
    features,
    labels,
    centers,
    *,
    alpha=0.5,
    rule="paper",
    reduction="mean",
    sample_weight=None,
    ignore_class=None,
    upstream=1.0,
    precision=WIDE,
):
    """One call with the given arguments; `upstream` is dL/dloss, a scalar or of its shape.

    In another precision it is no oracle, but what the plain formulas come to in that type.
    """
    features = np.asarray(features).astype(precision)
    before = np.asarray(centers).astype(precision)
    ids = class_ids(labels, features.ndim)
    shape, dim = ids.shape, features.shape[-1]
    x, y = features.reshape(-1, dim), ids.reshape(-1)
    batch = len(y)
    w = np.ones(batch, precision)
    if sample_weight is not None:
        w = np.asarray(sample_weight).astype(precision).reshape(-1)

    total = 0  # N: samples that are not ignored, finite or not
    members = {}  # n_i: finite ones, by class
    for i in range(batch):
        if y[i] == ignore_class:
            continue
        total += 1
        if np.isfinite(x[i]).all():
            members[y[i]] = members.get(y[i], 0) + 1

    losses = np.zeros(batch, precision)
    gradient = np.zeros((batch, dim), precision)
    after = before.copy()
    centers_gradient = np.zeros_like(before)
    scale = precision(1) / total if reduction == "mean" and total else precision(1)
    up = np.broadcast_to(np.asarray(upstream).astype(precision), shape if shape else ()).reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(batch):
            if y[i] == ignore_class:
                continue
            residual = x[i] - before[y[i]]
            losses[i] = w[i] * (residual * residual).sum() / 2
            gradient[i] = up[i] * scale * w[i] * residual
            centers_gradient[y[i]] -= gradient[i]
            if np.isfinite(x[i]).all():
                after[y[i]] += precision(step_size(rule, alpha, members[y[i]], total)) * residual
        loss = losses.reshape(shape) if reduction == "none" else losses.sum() * scale

    return Step(
        np.asarray(loss).astype(np.float64),
        gradient.reshape(features.shape).astype(np.float64),
        after.astype(np.float64),
        centers_gradient.astype(np.float64),
    )
