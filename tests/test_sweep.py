"""Loss, feature gradient and moved centers equal the oracle's for all options of a caller."""

import numpy as np
import pytest
import tensorflow as tf

import problems
import stepping
import tf_center_loss_op as tcl
from pairwise import all_pairs

FACTORS = {
    "shape": problems.SHAPES,
    "dtype": list(problems.DTYPES),
    "labels": [
        "int32",
        "int64",
        "onehot-float32",
        "onehot-uint8",
        "onehot-int64",
        "probabilities",
    ],
    "rule": ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"],
    "reduction": ["mean", "sum", "none"],
    "weights": [False, True],
    "ignore": [None, "outside", "class"],
    "update_centers": [True, False],
    "upstream": [False, True],
    "mode": ["eager", "function", "unknown"],
    "holder": ["tf.Variable", "keras.Variable"],
}


def allowed(row):
    ids = row["labels"] in ("int32", "int64")
    # One-hot rows have no class outside the table, and are too large for thousands of classes.
    return ids or (row["ignore"] != "outside" and row["shape"].classes <= 1000)


def name(row):
    return "-".join(str(value) for value in row.values())


def run_and_check(impl, row, jit=None):
    problem = problems.make(
        row["shape"], row["dtype"], row["labels"], row["weights"], row["ignore"]
    )
    options = {key: row[key] for key in ("rule", "reduction", "update_centers")} | {"alpha": 0.3}
    upstream = None
    if row["upstream"]:
        upstream = problem.upstream if row["reduction"] == "none" else np.float64(-1.7)
    outcome = stepping.run(
        problem,
        mode=row["mode"],
        holder=row["holder"],
        upstream=upstream,
        jit=jit,
        impl=impl,
        **options,
    )
    stepping.check(problem, outcome, dtype=row["dtype"], upstream=upstream, **options)


@pytest.mark.parametrize("row", all_pairs(FACTORS, allowed), ids=name)
def test_every_pair_of_choices(impl, row):
    run_and_check(impl, row)


# Every distribution of labels with default options: a failure here is easier to read.
@pytest.mark.parametrize("rule", ["paper", "sum"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", problems.SHAPES, ids=str)
def test_every_shape(impl, shape, dtype, rule):
    problem = problems.make(shape, dtype)
    outcome = stepping.run(problem, impl=impl, rule=rule, alpha=0.3)
    stepping.check(problem, outcome, dtype=dtype, rule=rule, alpha=0.3)


@pytest.mark.parametrize("reduction", FACTORS["reduction"])
@pytest.mark.parametrize("dtype", list(problems.DTYPES))
def test_large_residual_near_a_far_center(impl, dtype, reduction):
    # Features of size 1000, one unit away from their centers: |x|^2 - 2xc + |c|^2 would cancel.
    problem = problems.make(problems.SHAPES[0], dtype)
    near = (problem.centers[problem.ids] + 1000).astype(problem.features.dtype)
    problem = problem._replace(features=near + problem.features, centers=problem.centers + 1000)
    outcome = stepping.run(problem, impl=impl, reduction=reduction)
    stepping.check(problem, outcome, dtype=dtype, reduction=reduction)


@pytest.mark.parametrize("dim", [1, 8, 16, 33])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_features_too_small_for_normal_numbers(impl, dtype, dim):
    # TensorFlow's threads flush float32 subnormals to zero. These numbers are subnormal as float16
    # only: they are exact in float32, and both conversions must keep them.
    column = np.array([[2.0**-24], [-3 * 2.0**-22], [2.0**-15], [1.0]])
    features = np.tile(column, dim).astype(problems.DTYPES[dtype])
    problem = problems.Problem(
        features, np.arange(4), np.arange(4), np.zeros([4, dim], np.float32), None, None, None
    )
    for mode in ("eager", "function"):
        outcome = stepping.run(
            problem, mode=mode, impl=impl, alpha=1.0, rule="sum", reduction="sum"
        )
        assert np.array_equal(outcome.centers, features.astype(np.float64))
        assert np.array_equal(outcome.feature_gradient, features.astype(np.float64))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_is_read_exactly_and_rounded_to_nearest(impl, dtype):
    # All 65536 of them. The centers put the differences between two numbers of the type, on a tie
    # and beside it, and beyond the largest.
    half = problems.DTYPES[dtype]
    features = np.arange(2**16, dtype=np.uint16).view(half).reshape(-1, 16)
    labels = np.arange(len(features), dtype=np.int32)
    wide = features.astype(np.float32)
    # The distance to the next number of the type.
    digits, lowest = (10, -14) if dtype == "float16" else (7, -126)
    finite = np.where(np.isfinite(wide), np.abs(wide), 1)
    unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(finite, 2.0**-126))), lowest) - digits)
    # TensorFlow's threads flush float32 subnormals to zero, also those of half a residual.
    smallest = 4 * np.finfo(np.float32).tiny
    for part in (0.0, 0.5, -0.5, 0.5 + 2.0**-10, 0.5 - 2.0**-10, 0.25, 1.5):
        centers = (unit * np.float32(part)).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            difference = wide - centers
        flushed = (np.abs(difference) < smallest) | (np.abs(centers) < smallest) & (centers != 0)
        flushed |= (np.abs(wide) < smallest) & (wide != 0)
        given = tf.constant(features)
        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = tcl.center_loss(
                given,
                labels,
                tf.Variable(centers),
                reduction="sum",
                update_centers=False,
                impl=impl,
            )
        actual = tape.gradient(loss, given).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            expected = difference.astype(half)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected)) | flushed
        assert same.all(), (part, wide[~same][:5], actual[~same][:5], expected[~same][:5])
