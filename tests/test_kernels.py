"""The bare kernels on NumPy arrays, without TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

import oracle
import plain
import problems
from child import run_program
from stepping import wide
from tolerances import assert_near_oracle

pytestmark = pytest.mark.native


@pytest.mark.parametrize("rule", ["paper", "batch_mean"])
@pytest.mark.parametrize("dtype", list(problems.DTYPES))
@pytest.mark.parametrize("shape", problems.SHAPES, ids=str)
def test_a_step_equals_the_oracle(kernels, shape, dtype, rule):
    shape = shape._replace(leading=(int(np.prod(shape.leading)),))
    problem = problems.make(shape, dtype, weights=True, ignore="class")
    reduction = "mean" if rule == "paper" else "sum"
    centers = problem.centers.copy()
    loss, residual = kernels.center_loss_step(
        problem.features,
        problem.ids.astype(np.int32),
        centers,
        alpha=0.3,
        rule=rule,
        reduction=reduction,
        sample_weight=problem.sample_weight,
        ignore_class=problem.ignore_class,
        loss_weight=0.25,
        threads=2,
    )
    options = dict(ignore_class=problem.ignore_class, reduction=reduction)
    truth = oracle.center_loss(
        problem.features,
        problem.ids,
        problem.centers,
        alpha=0.3,
        rule=rule,
        sample_weight=problem.sample_weight,
        upstream=0.25,
        **options,
    )
    # The residual has the centers' dtype: it is not yet rounded to the features'.
    features, table = tf.constant(problem.features), tf.constant(problem.centers)
    features = tf.cast(features, table.dtype)
    with tf.GradientTape() as tape:
        tape.watch(features)
        yardstick = 0.25 * plain.loss(
            features,
            tf.constant(problem.ids),
            table,
            sample_weight=problem.sample_weight,
            **options,
        )
    moved = plain.moved_centers(
        features,
        tf.constant(problem.ids),
        table,
        alpha=0.3,
        rule=rule,
        ignore_class=problem.ignore_class,
    )
    table_dtype = problem.centers.dtype.name
    assert residual.dtype == problem.centers.dtype
    terms = len(problem.ids)
    assert_near_oracle(loss, wide(yardstick), 0.25 * truth.loss, table_dtype, "loss", terms)
    gradient = wide(tape.gradient(yardstick, features))
    assert_near_oracle(residual, gradient, truth.feature_gradient, table_dtype, "residual")
    assert_near_oracle(centers, wide(moved), truth.centers, table_dtype, "centers")


def test_reduction_none_and_reading_only(kernels):
    centers = np.array([[0.0, 0.0], [10.0, 10.0]], np.float32)
    before = centers.copy()
    loss, residual = kernels.center_loss_step(
        np.array([[2.0, 4.0], [10.0, 16.0]], np.float32),
        np.array([0, 1]),
        centers,
        reduction="none",
        update_centers=False,
    )
    assert np.asarray(loss).tolist() == [10.0, 18.0]
    assert residual.tolist() == [[2.0, 4.0], [0.0, 6.0]]
    assert np.array_equal(centers, before)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(labels=np.array([0, 3])), r"labels\[1\] = 3 is outside \[0, 3\)"),
        (dict(labels=np.array([0, -1])), r"labels\[1\] = -1 is outside \[0, 3\)"),
        (dict(labels=np.array([0, 2**32])), r"labels\[1\] = 4294967296 is outside \[0, 3\)"),
        (dict(labels=np.array([0])), r"labels: expected shape \[2\], got"),
        (dict(labels=np.array([[0], [1]])), r"labels: expected shape \[2\], got"),
        (dict(labels=np.array([0.0, 1.0])), "labels: expected dtype int32 or int64, got float64"),
        (dict(features=np.ones([2, 3], np.float32)), r"centers: expected shape \[C, 3\], got"),
        (dict(features=np.ones([2], np.float32)), r"features: expected shape \[B, D\], got"),
        (
            dict(features=np.ones([2, 2], np.float64)),
            "centers: expected dtype float64 .*, got float32",
        ),
        (dict(features=np.ones([2, 2], np.int32)), "features: expected dtype .*, got int32"),
        (dict(sample_weight=np.ones([3], np.float32)), r"sample_weight: expected shape \[2\], got"),
        (dict(rule="papr"), "rule: unknown rule 'papr', expected one of"),
        (dict(reduction="avg"), "reduction: unknown reduction 'avg', expected one of"),
        (dict(alpha=-1.0), "alpha: expected a finite number >= 0, got -1.0"),
        (dict(alpha=np.nan), "alpha: expected a finite number >= 0, got nan"),
        (dict(isa="sse9"), "isa: expected 'auto' or one of .*, got 'sse9'"),
        (dict(threads=0), "threads: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_errors_name_the_argument_and_write_nothing(kernels, wrong, words):
    centers = np.zeros([3, 2], np.float32)
    options = dict(features=np.ones([2, 2], np.float32), labels=np.array([0, 1])) | wrong
    features, labels = options.pop("features"), options.pop("labels")
    with pytest.raises(ValueError, match=words):
        kernels.center_loss_step(features, labels, centers, **options)
    assert not centers.any()


def test_centers_that_cannot_be_moved_in_place_are_refused(kernels):
    # A step on a silent copy would be lost.
    features, labels = np.ones([1, 2], np.float32), np.array([0])
    table = np.zeros([4, 4], np.float32)
    frozen = np.zeros([4, 2], np.float32)
    frozen.setflags(write=False)
    swapped = np.zeros([4, 2], ">f4")
    for centers, words in [
        (table[:, ::2], "centers: expected a C-contiguous array"),
        (table[:2].T, "centers: expected a C-contiguous array"),
        (frozen, "array is not writeable"),
        (swapped, "centers: expected dtype float32"),
        ([[0.0, 0.0]], "incompatible function arguments"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            kernels.center_loss_step(features, labels, centers)
    assert not table.any()


def test_views_are_read_correctly_or_refused(kernels):
    # Every other row of an array, and a column-major array, are read correctly.
    features = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = np.array([0, 9, 1, 9, 0, 9])
    expected = np.zeros([2, 5], np.float32)
    loss, _ = kernels.center_loss_step(features[::2].copy(), labels[::2].copy(), expected)
    for view in (features[::2], np.asfortranarray(features[::2])):
        centers = np.zeros([2, 5], np.float32)
        try:
            actual, _ = kernels.center_loss_step(view, labels[::2], centers)
        except ValueError:
            continue  # an error is allowed, a wrong result is not
        assert actual == loss
        assert np.array_equal(centers, expected)


@pytest.mark.parametrize("batch", [5, 64, 100, 5000])
def test_labels_that_collide_in_the_last_slot(kernels, batch):
    # The hash table of csrc/label_segments.cc has at least four slots a sample, and the high bits
    # of label * 2^64 / golden ratio are a label's slot. After the last slot comes the first.
    bits = 1
    while 2**bits < 4 * batch:
        bits += 1
    distinct = min(batch, 100)
    candidates = np.arange(distinct * 2 ** (bits + 1), dtype=np.uint64)
    slots = (candidates * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)
    labels = candidates[slots == 2**bits - 1].astype(np.int64)[:distinct]
    assert len(labels) == distinct and len(candidates) > 2**bits
    labels = np.resize(labels, batch)
    features = np.random.default_rng(0).normal(size=(batch, 2))
    centers = np.zeros([len(candidates), 2])
    # A step before leaves its numbers in the memory that this one uses.
    kernels.center_loss_step(features, labels[::-1].copy(), centers.copy())
    loss, residual = kernels.center_loss_step(features, labels, centers, rule="mean", alpha=1.0)
    np.testing.assert_allclose(residual, features / batch, rtol=1e-12)
    np.testing.assert_allclose(loss, (features**2).sum() / 2 / batch, rtol=1e-12)
    sums = np.zeros_like(centers)
    np.add.at(sums, labels, features)
    counts = np.bincount(labels, minlength=len(centers))[:, np.newaxis]
    np.testing.assert_allclose(centers, sums / np.maximum(counts, 1), rtol=1e-12, atol=1e-14)


def test_more_numbers_than_32_bits_count(kernels, tmp_path):
    # C * D > 2^31, and byte offsets beyond 2^33. A sparse file costs only the pages touched.
    rows, dim = 2**22 + 5, 513
    centers = np.memmap(tmp_path / "centers", np.float32, "w+", shape=(rows, dim))
    labels = np.array([rows - 1, 0, rows - 1, rows // 2])
    features = np.full([4, dim], 3, np.float32)
    kernels.center_loss_step(features, labels, centers, rule="mean", alpha=1.0, threads=2)
    for j in (0, rows // 2, rows - 1):
        assert (centers[j] == 3).all()
    for j in (1, rows // 2 - 1, rows // 2 + 1, rows - 2):
        assert not centers[j].any()


def test_the_module_needs_no_tensorflow(kernels, tmp_path):
    out = run_program("kernels_without_tensorflow", kernels.__file__, cwd=tmp_path)
    assert out.split("\n")[0] == "0.5 [0.0, 0.25]"
