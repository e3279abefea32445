"""Nearest centers and distances are exact and use bounded memory, for every kind of table."""

import concurrent.futures
import gc
import json
import math
import re
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from messages import about
from naming import described
from tf_center_loss_op.nearest import calls, search
from tolerances import EPSILON

C, D, B = 300, 7, 40


def brute_force(features, centers, k, dtype="float32"):
    """Labels and distances [B, k] from all differences in float64; the lowest label wins a tie."""
    x, c = np.asarray(features, np.float64), np.asarray(centers, np.float64)
    # Distances that round to one number are equal.
    distances = np.sqrt(np.square(x[:, None] - c[None]).sum(-1)).astype(dtype)
    labels = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return labels, np.take_along_axis(distances, labels, 1)


def assert_exact(found, features, centers, k=1, dtype="float32"):
    labels, distances = (np.asarray(part).reshape(-1, k) for part in found)
    expected_labels, expected = brute_force(features, centers, k, dtype)
    assert distances.dtype == dtype and labels.dtype == np.int64
    np.testing.assert_array_equal(labels, expected_labels)
    # float64 sums have no wider type to be rounded from.
    units = 1 if dtype == "float32" else 4
    np.testing.assert_allclose(distances, expected, rtol=units * EPSILON[dtype])


def problem(offset=0.0, noise=0.5, dtype=np.float32):
    rng = np.random.default_rng(0)
    centers = (rng.normal(size=(C, D)) + offset).astype(dtype)
    features = (centers[rng.integers(0, C, B)] + noise * rng.normal(size=(B, D))).astype(dtype)
    return features, centers


SOURCES = {
    "tensor": tf.constant,
    "variable": tf.Variable,
    "keras": keras.Variable,
    "numpy": np.asarray,
    "list": lambda c: c.tolist(),
}


# How a traced function takes each.
TRACED = {
    "tensor": [calls._TENSOR],
    "variable": [calls._HANDLE],
    "keras": [calls._HANDLE],
    "numpy": [calls._KEY],
}


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [1, 4])
def test_every_source_of_centers_gives_the_same(source, mode, k):
    features, centers = problem()
    table = SOURCES[source](centers)

    def nearest(x):
        return tcl.nearest.predict(x, table, k=k, block=64)

    if mode != "eager":  # a batch size that is not known while tracing
        unknown = [tf.TensorSpec([None, D])]
        nearest = tf.function(nearest, input_signature=unknown, jit_compile=mode == "xla")
    assert_exact(nearest(features), features, centers, k)


@pytest.mark.parametrize("block", [7, 299, 300, 10**9])
def test_any_block_gives_the_same(block):
    # The last block has fewer rows than k.
    features, centers = problem()
    assert_exact(tcl.nearest.predict(features, centers, k=3, block=block), features, centers, 3)


def test_more_samples_than_are_read_at_a_time():
    rng = np.random.default_rng(1)
    features, centers = rng.normal(size=(1100, 3)).astype("f"), problem()[1][:, :3]
    assert_exact(tcl.nearest.predict(features, centers), features, centers)


@pytest.mark.parametrize(
    "offset, noise",
    [(1e4, 0.5), (1e4, 1e-2), (1e6, 1.0), (-3e15, 1e9)],
    ids=str,
)
def test_far_from_the_origin(offset, noise):
    # |x|^2 - 2 x.c + |c|^2 has no correct digit here.
    features, centers = problem(offset, noise)
    assert_exact(tcl.nearest.predict(features, centers, k=2), features, centers, 2)


def test_two_clusters_far_apart():
    # No common origin helps: each cluster is far from the mean of both.
    features, centers = problem(noise=1e-2)
    features[::2] += 5e3
    centers[::3] += 5e3
    assert_exact(tcl.nearest.predict(features, centers, k=5), features, centers, 5)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e30], ids=str)
def test_squares_that_over_and_underflow(scale):
    features, centers = (scale * part for part in problem())
    features, centers = features.astype("f"), centers.astype("f")
    assert_exact(tcl.nearest.predict(features, centers), features, centers)


def test_float64():
    features, centers = problem(1e7, dtype=np.float64)
    found = tcl.nearest.predict(features, centers, k=2)
    assert_exact(found, features, centers, 2, "float64")
    traced = tf.function(lambda x: tcl.nearest.predict(x, centers, k=2))
    assert_exact(traced(features), features, centers, 2, "float64")
    narrow = centers.astype(np.float32)
    assert_exact(tcl.nearest.predict(features, narrow), features, narrow, 1, "float64")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_features_and_tables_of_16_bits(dtype):
    features, centers = problem()
    features = features.astype(dtype)
    assert_exact(tcl.nearest.predict(features, tf.Variable(centers)), features, centers)
    table = centers.astype(dtype)
    assert_exact(tcl.nearest.predict(features, table, k=3), features, table, 3)


@pytest.fixture
def compared(monkeypatch):
    """How many pairs each search compares exactly, op by op."""
    counts, exact = [], search.pair_distances

    def counted(x, take, sample, label):
        counts.append(int(tf.size(label)))
        return exact(x, take, sample, label)

    monkeypatch.setattr(search, "pair_distances", counted)
    tf.config.run_functions_eagerly(True)
    yield counts
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e25], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("huge", ["center", "sample"])
def test_a_single_huge_norm_makes_no_other_row_a_candidate(compared, huge, k, size):
    features, centers = problem(noise=0.1)
    (centers if huge == "center" else features)[7] = size
    assert_exact(tcl.nearest.predict(features, centers, k=k, block=C), features, centers, k)
    # A huge sample is compared with every center, a huge center perhaps with every sample.
    assert sum(compared) < k * B + (2 * B if huge == "center" else C + B)


def test_few_pairs_are_compared_exactly(compared):
    features, centers = problem(100.0, noise=0.1)
    assert_exact(tcl.nearest.predict(features, centers, block=30), features, centers)
    assert sum(compared) < 4 * B  # the nearest so far of each block: 1 + 1/2 + 1/3 + ...


@pytest.mark.parametrize("source", ["tensor", "variable", "keras", "numpy"])
def test_eager_calls_share_one_trace_and_keep_no_table(source):
    calls._traced.cache_clear()
    tables = []
    for rows, width in ((C, D), (C - 1, D), (C, D - 1)):
        features, centers = (part[:rows, :width] for part in problem())
        table = SOURCES[source](centers.copy())
        assert_exact(tcl.nearest.predict(features, table, block=64), features, centers)
        tables.append(weakref.ref(table))
    del table
    gc.collect()
    assert [table() for table in tables] == [None] * 3
    assert calls._traced.cache_info().currsize == 1
    monitored = calls._traced(*TRACED[source], tf.float32, tf.float32, 1)
    assert calls._traced.cache_info().currsize == 1
    assert monitored.experimental_get_tracing_count() == 1
    assert not calls.ArrayByKey._arrays


def test_eager_calls_in_several_threads():
    features, centers = problem()
    tables = [np.roll(centers, shift, axis=0) for shift in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda table: tcl.nearest.predict(features, table, block=64), tables)
    for part, table in zip(found, tables, strict=True):
        assert_exact(part, features, table)


def test_functions_that_run_eagerly(compared):
    features, centers = problem()
    for source in SOURCES.values():
        found = tcl.nearest.predict(features, source(centers), k=2, block=64)
        assert_exact(found, features, centers, 2)


def test_ties_go_to_the_lowest_label():
    centers = np.tile(np.float32([[3, 4], [0, 0], [-3, -4], [6, 8]]), (50, 1))
    labels, distances = tcl.nearest.predict(np.zeros([3, 2], "f"), centers, k=50, block=7)
    assert labels[2].numpy().tolist() == list(range(1, 200, 4))
    assert not distances.numpy().any()
    assert_exact(tcl.nearest.predict(np.ones([1, 2], "f"), centers, k=120), [[1, 1]], centers, 120)


@pytest.mark.parametrize("far, near", [(1e3, 1e-3), (1.0, 1e-5), (1.0, 1e-20), (1e-15, 1e-22)])
def test_distances_that_round_to_one_number(far, near):
    # Samples far from the centers, in all directions: most distances are equal as float32.
    features, centers = problem()
    features, centers = features * np.float32(far), centers * np.float32(near)
    for block in (300, 64):
        found = tcl.nearest.predict(features, centers, k=4, block=block)
        assert_exact(found, features, centers, 4)


@pytest.mark.parametrize("k", [1, 3])
def test_a_table_of_zeros(k):
    features = problem()[0]
    centers = np.zeros([500, D], "f")
    assert_exact(tcl.nearest.predict(features, centers, k=k), features, centers, k)
    centers[[0, 77, 400]] = 100
    assert_exact(tcl.nearest.predict(features, centers, k=k), features, centers, k)


def test_not_finite():
    features, centers = problem()
    bad = [1, 5, 6]
    features[1, 0], features[5], features[6, 2] = np.nan, np.inf, -np.inf
    centers[:3] = [[np.nan], [np.inf], [-np.inf]]
    labels, distances = (part.numpy() for part in tcl.nearest.predict(features, centers))
    assert labels[bad].tolist() == [-1] * 3 and np.isnan(distances[bad]).all()
    good = np.setdiff1d(np.arange(B), bad)
    expected = brute_force(features[good], centers[3:], 1)
    assert np.array_equal(labels[good], expected[0][:, 0] + 3)
    assert np.array_equal(distances[good], expected[1][:, 0])


def test_fewer_finite_centers_than_k():
    labels, distances = tcl.nearest.predict([[1.0]], [[np.nan], [3.0], [np.inf]], k=3)
    assert labels.numpy().tolist() == [[1, -1, -1]]
    assert distances.numpy().tolist() == [[2.0, np.inf, np.inf]]


def test_threshold():
    centers, features = [[0.0], [10.0]], [[1.0], [4.0], [9.5], [np.nan]]
    for threshold in (2, 2.0, tf.constant(2.0), tf.Variable(2.0)):
        labels, distances = tcl.nearest.predict(features, centers, threshold=threshold)
        assert labels.numpy().tolist() == [0, -1, 1, -1]
        np.testing.assert_array_equal(distances, np.float32([1, 4, 0.5, np.nan]))
    at = tcl.nearest.predict(features, centers, threshold=4.0)[0]
    assert at.numpy().tolist() == [0, 0, 1, -1]  # "beyond" leaves the threshold itself in


@pytest.mark.parametrize("shape", [[], [4], [2, 3], [0], [2, 0]], ids=str)
def test_shapes(shape):
    features, centers = np.ones([*shape, D], np.float32), problem()[1]
    for k, last in ((1, []), (2, [2])):
        labels, distances = tcl.nearest.predict(features, centers, k=k)
        assert labels.shape == distances.shape == shape + last
    labels = tcl.nearest.predict(features, centers)[0]
    assert tcl.nearest.distance_to_center(features, labels, centers).shape == shape


@pytest.mark.parametrize("source", SOURCES)
def test_distance_to_center(source):
    features, centers = problem(1e4)
    labels = np.random.default_rng(2).integers(0, C, B)
    labels[3], features[4, 0] = -1, np.nan
    expected = np.linalg.norm(features.astype("d") - centers[labels].astype("d"), axis=1)
    expected[3] = np.nan
    table = SOURCES[source](centers)

    def distance(x, y):
        return tcl.nearest.distance_to_center(x, y, table)

    for function in (distance, tf.function(distance), tf.function(distance, jit_compile=True)):
        found = function(features, labels)
        np.testing.assert_allclose(found, expected.astype("f"), rtol=EPSILON["float32"])


def test_xla_ties_and_what_is_not_finite():
    features, centers = (np.round(part) for part in problem())
    centers[:3] = [[np.nan], [np.inf], [-np.inf]]
    features[0, 0] = np.nan

    def nearest(x):
        return tcl.nearest.predict(x, centers, k=C, threshold=3.0, block=64)

    compiled = tf.function(nearest, jit_compile=True)(features)
    for actual, expected in zip(compiled, nearest(features), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_xla_labels_out_of_range():
    compiled = tf.function(tcl.nearest.distance_to_center, jit_compile=True)
    found = compiled(np.zeros([5, 1], "f"), [0, -1, 2, -2, 1], np.float32([[3], [4]]))
    np.testing.assert_array_equal(found, np.float32([3, np.nan, np.nan, np.nan, 4]))


def test_xla_keeps_no_array_of_all_differences():
    features, centers = np.zeros([500, 64], "f"), tf.Variable(tf.zeros([9000, 64]))
    compiled = tf.function(lambda x: tcl.nearest.predict(x, centers), jit_compile=True)
    program = compiled.experimental_get_compiler_ir(tf.constant(features))(stage="optimized_hlo")
    sizes = {s: math.prod(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", program)}
    assert max(sizes.values()) < 500 * 4096 * 2, sizes  # samples by a block of rows


def test_a_memory_mapped_file(tmp_path):
    features, centers = problem()
    np.save(tmp_path / "centers.npy", centers)
    mapped = np.load(tmp_path / "centers.npy", mmap_mode="r")
    assert_exact(tcl.nearest.predict(features, mapped, block=50), features, centers)
    traced = tf.function(lambda x: tcl.nearest.predict(x, mapped, block=50))
    assert_exact(traced(features), features, centers)
    operations = traced.get_concrete_function(features).graph.get_operations()
    sizes = [out.shape.num_elements() or 0 for op in operations for out in op.outputs]
    assert max(sizes) < C * D


def test_no_gradient_and_nothing_on_the_tape():
    features, centers = (tf.Variable(part) for part in problem())
    with tf.GradientTape(persistent=True) as tape:
        distances = tcl.nearest.predict(features, centers)[1]
        own = tcl.nearest.distance_to_center(features, tf.range(B), centers)
    for value in (distances, own):
        assert tape.gradient(value, [features, centers]) == [None, None]


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(k=0), ValueError, ["k", ">= 1", "0"]),
        (dict(k=301), ValueError, ["k", "C = 300", "301"]),
        (dict(k=1.5), TypeError, ["k", "int", "1.5"]),
        (dict(block=0), ValueError, ["block", ">= 1", "0"]),
        (dict(block="all"), TypeError, ["block", "int", "all"]),
        (dict(threshold=-1.0), ValueError, ["threshold", ">= 0", "-1.0"]),
        (dict(threshold=[1.0]), TypeError, ["threshold", "number", "[1.0]"]),
        (dict(threshold=tf.ones([2])), ValueError, ["threshold", "scalar", "(2,)"]),
        (dict(features=np.zeros([4, 6], "f")), ValueError, ["features", "[..., 7]", "(4, 6)"]),
        (dict(features=np.zeros([4, D], int)), TypeError, ["features", "float32", "int64"]),
        (dict(features=1.0), ValueError, ["features", "[..., D]", "()"]),
        (dict(centers=np.zeros([C, D], int)), TypeError, ["centers", "float32", "int64"]),
        (dict(centers=np.zeros([C], "f")), ValueError, ["centers", "[C, D]", "(300,)"]),
        (
            dict(centers=tcl.distribute.ShardedCenters(C, D)),
            TypeError,
            ["centers", "ShardedCenters"],
        ),
    ],
    ids=described,
)
def test_wrong_arguments_are_refused(wrong, error, words):
    features, centers = problem()
    arguments = dict(features=features, centers=centers) | wrong
    with pytest.raises(error, match=about(*words)):
        tcl.nearest.predict(**arguments)


@pytest.mark.parametrize("source", ["variable", "numpy"])
def test_wrong_labels_are_refused(source):
    features, centers = problem()
    table, labels = SOURCES[source](centers), np.zeros(B, np.int32)
    with pytest.raises(TypeError, match="labels: expected dtype int32 or int64, got float32"):
        tcl.nearest.distance_to_center(features, labels.astype("f"), table)
    with pytest.raises(ValueError, match=r"labels: expected shape \(40,\).* got \(39,\)"):
        tcl.nearest.distance_to_center(features, labels[1:], table)
    for value in (300, -2):
        labels[7] = value
        with pytest.raises(tf.errors.InvalidArgumentError, match="is outside") as caught:
            tcl.nearest.distance_to_center(features, labels, table)
        assert f"labels[7] = {value} is outside [0, 300)" in str(caught.value)


def test_the_scores_of_all_classes_are_never_in_memory(tmp_path):
    out = run_program("nearest_in_a_large_table", cwd=tmp_path)
    (tmp_path / "centers.npy").unlink()
    result = json.loads(out)
    assert result["good"]
    assert result["grown"] < 128 * 2**20  # half of the table, and half of all scores
