"""Random calls of center_loss: drawn by hypothesis, made from a seed, judged by the oracle.

A `Case` is small enough to be read, and to be copied into a test when it fails.
"""

import os
import time
from typing import NamedTuple

import hypothesis
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import oracle
from tolerances import EPSILON

# Minutes for each test, from `make fuzz`; 0: the few fixed cases of `make test`.
MINUTES = float(os.environ.get("TF_CENTER_LOSS_FUZZ_MINUTES", "0"))

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
# The label that stands for a one-hot row without a largest number.
NO_CLASS = -(2**63)


class Case(NamedTuple):
    """One call; all numbers come from `seed`."""

    leading: tuple = (4,)
    dim: int = 3
    classes: int = 5
    dtype: str = "float32"
    labels: str = "int64"  # or int32, onehot-TYPE, probabilities-TYPE
    pattern: str = "uniform"  # of the labels: equal, distinct or power-law
    rule: str = "paper"
    reduction: str = "mean"
    weights: str = "none"  # or uniform, zeros, negative, int32, non-finite
    ignore: str = "none"  # or class, outside, wraps (to a class, as int32), least, most
    bad_labels: tuple = ()  # values; for rows "zero", "nan" or "inf"
    bad_features: tuple = ()  # nan, inf or -inf
    alpha: float = 0.3
    alpha_kind: str = "number"  # or tensor, variable
    update_centers: bool = True
    upstream: bool = False
    offset: float = 0.0  # of features and centers
    mode: str = "eager"  # or static, unknown, unknown-D: what tracing knows of the shapes
    seed: int = 0


class Arrays(NamedTuple):
    """The arguments of a case."""

    features: np.ndarray
    labels: np.ndarray  # as they are passed
    ids: np.ndarray  # int64, NO_CLASS for a row without a largest number
    centers: np.ndarray
    sample_weight: np.ndarray | None
    ignore_class: int | None
    upstream: np.ndarray | None


def _extreme(labels, classes):
    values = [-1, classes, classes + 1, -(2**31), 2**31 - 1]
    if labels == "int64":
        values += [2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63) + 1]
    return values


@st.composite
def cases(draw, modes, leadings=None, dims=None):
    """Cases in one of the modes; `leadings` and `dims` limit the shapes."""
    labels = draw(
        st.sampled_from(
            ["int64", "int32", "onehot-float32", "onehot-uint8", "onehot-bool", "onehot-float16"]
            + ["onehot-int64", "probabilities-float32", "probabilities-float64"]
        )
    )
    rows = labels not in ("int64", "int32")
    if leadings is None:
        leading = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
        if len(leading) == 1:
            leading = (draw(st.sampled_from([0, 1, 2, 3, 7, 63, 64, 65, 130, 300])),)
    else:
        leading = draw(st.sampled_from(leadings))
    classes = draw(st.sampled_from([1, 2, 3, 7, 40] if rows else [1, 2, 3, 7, 40, 1000, 20000]))
    few = st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=3).map(tuple)
    if rows:
        wrong = ["zero", "nan", "inf"] if "float" in labels else ["zero"]
    else:
        wrong = _extreme(labels, classes)
    # Most calls are without a bad label: a call with one has no other result than the error.
    bad_labels = draw(
        st.one_of(st.just(()), st.just(()), st.lists(st.sampled_from(wrong), max_size=2).map(tuple))
    )
    return Case(
        leading=leading,
        dim=draw(st.sampled_from(dims or [1, 2, 3, 8, 15, 16, 17, 33, 257])),
        classes=classes,
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        labels=labels,
        pattern=draw(st.sampled_from(["uniform", "equal", "distinct", "power-law"])),
        rule=draw(
            st.sampled_from(["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"])
        ),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        weights=draw(
            st.sampled_from(["none", "uniform", "zeros", "negative", "int32", "non-finite"])
        ),
        ignore=draw(st.sampled_from(["none", "class", "outside", "wraps", "least", "most"])),
        bad_labels=bad_labels,
        bad_features=draw(st.one_of(st.just(()), few)),
        alpha=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7])),
        alpha_kind=draw(st.sampled_from(["number", "tensor", "variable"])),
        update_centers=draw(st.booleans()),
        upstream=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 0.0, 100.0])),
        mode=draw(st.sampled_from(modes)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def make(case):
    """The arguments of a case."""
    rng = np.random.default_rng(case.seed)
    batch = int(np.prod(case.leading))
    table_dtype = np.float64 if case.dtype == "float64" else np.float32
    features = (case.offset + rng.normal(size=(batch, case.dim))).astype(DTYPES[case.dtype])
    centers = (case.offset + rng.normal(size=(case.classes, case.dim))).astype(table_dtype)
    for value in case.bad_features if batch and case.dim else ():
        features[rng.integers(batch), rng.integers(case.dim)] = value

    if case.pattern == "equal":
        ids = np.full(batch, rng.integers(case.classes))
    elif case.pattern == "distinct" and batch <= case.classes:
        ids = rng.permutation(case.classes)[:batch]
    elif case.pattern == "power-law":
        ids = (rng.zipf(1.3, batch) - 1) % case.classes
    else:
        ids = rng.integers(0, case.classes, batch)
    ids = ids.astype(np.int64)
    rows = case.labels not in ("int32", "int64")
    ignore_class = None
    if case.ignore != "none":
        some = int(ids[0]) if batch else 0
        ignore_class = {
            "class": some,
            "outside": -1,
            "wraps": 2**32 + some,
            "least": -(2**63) + 1,
            "most": 2**63 - 1,
        }[case.ignore]
    fits = case.labels == "int64" or case.ignore == "outside"
    if not rows and case.ignore in ("outside", "wraps", "least", "most") and fits:
        ids[rng.random(batch) < 0.3] = ignore_class

    places = rng.permutation(batch)[: len(case.bad_labels)]
    if rows:
        kind, _, element = case.labels.partition("-")
        passed = np.eye(case.classes)[ids] if batch else np.zeros([0, case.classes])
        if kind == "probabilities":
            passed = 0.5 * passed + 0.4 / case.classes
        passed = passed.astype(element)
        for place, wrong in zip(places, case.bad_labels, strict=False):
            ids[place] = NO_CLASS
            if wrong == "zero":
                passed[place] = 0
            else:
                passed[place, rng.integers(case.classes)] = float(wrong)
        passed = passed.reshape(*case.leading, case.classes)
    else:
        for place, wrong in zip(places, case.bad_labels, strict=False):
            ids[place] = wrong
        passed = ids.astype(case.labels).reshape(case.leading)

    weights = None
    if case.weights == "int32":
        weights = rng.integers(0, 4, case.leading, dtype=np.int32)
    elif case.weights != "none":
        weights = np.asarray(rng.uniform(0, 2, case.leading)).astype(np.float32)
        if case.weights == "negative":
            weights = np.asarray(weights - 1)
        elif case.weights == "zeros":
            weights = np.zeros_like(weights)
        elif case.weights == "non-finite" and batch:
            weights.reshape(-1)[rng.integers(batch)] = rng.choice([np.nan, np.inf])
    upstream = None
    if case.upstream:
        shape = case.leading if case.reduction == "none" else ()
        upstream = np.asarray(rng.uniform(-2, 2, shape)).astype(table_dtype)
    return Arrays(
        features.reshape(*case.leading, case.dim),
        np.asarray(passed),
        ids,
        centers,
        weights,
        ignore_class,
        upstream,
    )


def first_bad(case, arrays):
    """(position, words of the error) of the first label that is wrong; None if all are right."""
    counted = np.ones(len(arrays.ids), bool)
    if arrays.ignore_class is not None:
        counted = arrays.ids != arrays.ignore_class
    bad = np.flatnonzero(counted & ((arrays.ids < 0) | (arrays.ids >= case.classes)))
    if not len(bad):
        return None
    i, label = bad[0], arrays.ids[bad[0]]
    hint = ": the label of a one-hot row" if label == NO_CLASS else ""
    return bad, f"labels[{i}] = {label} is outside [0, {case.classes}){hint}"


class Expected(NamedTuple):
    """What the oracle says, and how far from it each number may be."""

    loss: np.ndarray
    feature_gradient: np.ndarray
    centers: np.ndarray
    centers_gradient: np.ndarray
    loss_bound: np.ndarray
    feature_gradient_bound: np.ndarray
    centers_bound: np.ndarray
    centers_gradient_bound: np.ndarray


def expected(case, arrays, bad=()):
    """The results; samples in `bad` have a NaN for loss and gradient and move nothing."""
    features = arrays.features.reshape(-1, case.dim).astype(np.float64)
    ids, centers = arrays.ids.copy(), arrays.centers.astype(np.float64)
    if len(bad):
        # A class of its own for them, with features that are no numbers.
        features[bad], ids[bad] = np.nan, case.classes
        centers = np.concatenate([centers, np.zeros([1, case.dim])])
    count = len(ids) if arrays.ignore_class is None else int((ids != arrays.ignore_class).sum())
    weights = (
        np.ones(len(ids)) if arrays.sample_weight is None else arrays.sample_weight.reshape(-1)
    )
    up = np.float64(1) if arrays.upstream is None else arrays.upstream.astype(np.float64)
    with np.errstate(all="ignore"):
        truth = oracle.center_loss(
            features,
            ids,
            centers,
            alpha=case.alpha,
            rule=case.rule,
            reduction=case.reduction,
            sample_weight=weights,
            ignore_class=arrays.ignore_class,
            upstream=up.reshape(-1) if up.ndim else up,
        )
        # Elementwise bounds of the rounding: each operation adds a unit of what it works on.
        table_unit, unit = EPSILON[arrays.centers.dtype.name], EPSILON[case.dtype]
        inside = (ids >= 0) & (ids < len(centers))
        size = np.abs(features) + np.abs(centers[np.where(inside, ids, 0)])
        size = np.where(np.isfinite(size), size, 0)
        weight = np.where(np.isfinite(weights), np.abs(weights), 0).astype(np.float64)
        scale = 1 / max(count, 1) if case.reduction == "mean" else 1.0
        factor = np.abs(up.reshape(-1)) * scale * weight * np.ones(len(ids))
        loss_bound = (case.dim + 16) * table_unit * weight * (size**2).sum(axis=1)
        if case.reduction == "none":
            loss_bound = loss_bound.reshape(case.leading)
        else:
            loss_bound = loss_bound.sum() * scale
        # Numbers that are too small for a type are flushed or lose bits.
        smallest = 6e-8 if case.dtype == "float16" else 1e-37
        gradient_bound = 8 * table_unit * factor[:, None] * size + smallest
        gradient_bound = gradient_bound + unit * np.nan_to_num(
            np.abs(truth.feature_gradient), posinf=0
        )
        n = np.zeros(len(centers))
        moved, to_centers = np.zeros_like(centers), np.zeros_like(centers)
        np.add.at(n, ids[inside], 1)
        np.add.at(moved, ids[inside], size[inside])
        np.add.at(to_centers, ids[inside], (factor[:, None] * size)[inside])
        step = abs(case.alpha) * max(1, abs(1 - case.alpha))
        units = (n[:, None] + 8) * table_unit
        centers_bound = units * (np.abs(centers) + step * moved) + 1e-37
        centers_gradient_bound = units * to_centers + 1e-37
    rows = slice(case.classes)
    loss = truth.loss.reshape(case.leading) if case.reduction == "none" else truth.loss
    return Expected(
        loss,
        truth.feature_gradient.reshape(arrays.features.shape),
        truth.centers[rows],
        truth.centers_gradient[rows],
        loss_bound,
        gradient_bound.reshape(arrays.features.shape),
        centers_bound[rows],
        centers_gradient_bound[rows],
    )


def near(what, actual, truth, bound):
    """Fails where `actual` is farther from `truth` than `bound`, or not finite where that is."""
    actual, truth = np.asarray(actual, np.float64), np.asarray(truth, np.float64)
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    finite = np.isfinite(truth)
    same = np.isfinite(actual) == finite
    assert same.all(), f"{what}: {actual[~same]} for {truth[~same]} at {np.argwhere(~same)[:5]}"
    error = np.abs(np.where(finite, actual, 0) - np.where(finite, truth, 0))
    over = error > bound
    assert not over.any(), (
        f"{what}: {actual[over][:5]}, expected {truth[over][:5]} within "
        f"{np.broadcast_to(bound, over.shape)[over][:5]} at {np.argwhere(over)[:5].tolist()}"
    )


def run(check, strategy, examples):
    """check(case) for the same `examples` cases each time, or for MINUTES for ever new ones."""
    options = dict(
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )

    def once(case):
        check(case)

    if not MINUTES:
        hypothesis.settings(derandomize=True, **options)(hypothesis.given(strategy)(once))()
        return
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        hypothesis.settings(**options)(hypothesis.given(strategy)(once))()
