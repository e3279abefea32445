"""The CUDA kernels, run by the emulator, against the oracle."""

import ml_dtypes
import numpy as np
import pytest

import cuda_cases
import emulated
import problems
from cuda_cases import (
    CLASS_SIZES,
    ONE_LEVEL,
    SCANNED,
    THREE_LEVELS,
    TWO_LEVELS,
    batch_of,
    check,
)
from pairwise import all_pairs

pytestmark = pytest.mark.native


@pytest.mark.parametrize("row", all_pairs(cuda_cases.FACTORS), ids=cuda_cases.name)
def test_every_pair_of_choices(row):
    cuda_cases.run(emulated.Emulator(**{key: row[key] for key in cuda_cases.DEVICE}), row)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    "sizes, distinct",
    [(CLASS_SIZES, 0), (CLASS_SIZES, 700), ([*CLASS_SIZES, ONE_LEVEL, TWO_LEVELS], 3)],
    ids=["scanned", "hashed", "two-levels"],
)
@pytest.mark.parametrize("dim", [5, 8, 132])
def test_sizes_of_classes(sizes, distinct, dim, atomic):
    problem = batch_of(sizes, dim, distinct=distinct)
    check(emulated.Emulator(seed=dim), problem, rule="mean", atomic=atomic)


def test_a_reduction_tree_of_three_levels():
    problem = batch_of([*CLASS_SIZES, THREE_LEVELS], 5)
    check(emulated.Emulator(seed=2), problem, rule="mean")


@pytest.mark.parametrize(
    "problem",
    [
        batch_of(CLASS_SIZES, 24),
        batch_of(CLASS_SIZES, 513, distinct=20),
        batch_of(CLASS_SIZES, 6, distinct=700),
        batch_of([TWO_LEVELS], 4),
        batch_of([*CLASS_SIZES, 300], 132, distinct=300),
    ],
    ids=["scanned", "passes", "hashed", "one-label", "slices"],
)
def test_bits_do_not_depend_on_the_schedule(problem):
    schedules = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 1), (7, 2), (7, 2)]
    results = set()
    for seed, multiprocessors in schedules:
        device = emulated.Emulator(seed=seed, multiprocessors=multiprocessors)
        centers = problem.centers.copy()
        outputs = device.center_loss_step(problem.features, problem.labels, centers)
        results.add(b"".join(array.tobytes() for array in (*outputs, centers)))
    assert len(results) == 1


def test_labels_that_fall_into_one_slot():
    # The kernel's hash. All labels hash to the last slot, so the search wraps around to the first.
    batch = SCANNED + 300
    slots = hash_slots(batch)
    classes = np.arange(3_000_000, dtype=np.uint64)
    hashes = (classes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    slot = (hashes * np.uint64(slots)) >> np.uint64(32)
    crowded = np.flatnonzero(slot == slots - 1)
    assert len(crowded) > 80
    rng = np.random.default_rng(0)
    labels = rng.choice(crowded, batch)
    table = np.zeros([len(classes), 2], np.float32)
    features = rng.normal(size=(batch, 2)).astype(np.float32)
    for atomic in (False, True):
        centers = table.copy()
        emulated.Emulator(seed=1).center_loss_step(
            features, labels, centers, alpha=1.0, rule="mean", atomic=atomic
        )
        means = [features[labels == label].mean(0) for label in np.unique(labels)]
        np.testing.assert_allclose(centers[np.unique(labels)], means, rtol=1e-5, atol=1e-6)
        assert np.count_nonzero(centers.any(1)) == len(means)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("distinct", [20, 600], ids=["scanned", "hashed"])
@pytest.mark.parametrize("dim", [7, 132, 513])
def test_rows_that_are_not_finite(dim, distinct, atomic):
    # Not finite in every second class: the first and the last row; then all rows.
    problem = batch_of(CLASS_SIZES, dim, distinct=distinct)
    for every in (False, True):
        features = problem.features.copy()
        for k, label in enumerate(np.unique(problem.labels)[::2]):
            rows = np.flatnonzero(problem.labels == label)
            if not every:
                rows = rows[[0, -1]]
            features[rows, (-k if k % 2 else k) % dim] = [np.nan, np.inf, -np.inf][k % 3]
        check(emulated.Emulator(seed=2), problem._replace(features=features), atomic=atomic)


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("pairs", [20, 600], ids=["scanned", "hashed"])
@pytest.mark.parametrize("dim", [7, 513])
def test_one_sample_of_a_pair_is_not_finite(dim, pairs, bad):
    problem = batch_of([2] * pairs, dim)
    features = problem.features.copy()
    for label in np.unique(problem.labels)[::2]:
        features[np.flatnonzero(problem.labels == label)[bad], dim // 2] = np.nan
    check(emulated.Emulator(seed=2), problem._replace(features=features))


@pytest.mark.parametrize("batch", [70, SCANNED + 10])
@pytest.mark.parametrize("numbers_in_memory", [False, True])
@pytest.mark.parametrize("alpha", [-1.0, np.nan, np.inf])
def test_a_bad_alpha_shows_in_the_loss_and_moves_nothing(alpha, numbers_in_memory, batch):
    problem = batch_of([batch - 3], 6, distinct=3)
    device = emulated.Emulator(seed=1)
    for reduction in emulated.REDUCTIONS:
        centers = problem.centers.copy()
        options = dict(alpha=alpha, reduction=reduction, numbers_in_memory=numbers_in_memory)
        loss, residual, squared = device.center_loss_step(
            problem.features, problem.labels, centers, **options
        )
        assert np.isnan(loss).all() and np.isnan(residual).all()
        assert np.isfinite(squared).all()
        assert centers.tobytes() == problem.centers.tobytes()
        # Without an update alpha does not matter.
        loss, residual, _ = device.center_loss_step(
            problem.features, problem.labels, centers, update_centers=False, **options
        )
        assert np.isfinite(loss).all() and np.isfinite(residual).all()


@pytest.mark.parametrize("sizes", [CLASS_SIZES, [*CLASS_SIZES, SCANNED]], ids=["scanned", "hashed"])
def test_alpha_zero_moves_nothing(sizes):
    problem = batch_of(sizes, 9, distinct=4)
    check(emulated.Emulator(seed=3), problem, alpha=0.0)


@pytest.mark.parametrize("dtype", emulated.FEATURE_TYPES, ids=list(map(str, problems.DTYPES)))
@pytest.mark.parametrize("batch, dim", [(0, 3), (1, 1), (40, 7), (21, 513)])
def test_backward(batch, dim, dtype):
    rng = np.random.default_rng(0)
    table_dtype = np.float64 if dtype is np.float64 else np.float32
    residual = rng.normal(size=(batch, dim)).astype(table_dtype)
    for upstream in (np.array(-1.7), np.array(1.0), rng.normal(size=batch)):
        upstream = upstream.astype(table_dtype)
        rounded = (upstream[..., None] * residual).astype(dtype)
        for in_place in {False, dtype is table_dtype}:
            given = residual.copy()
            gradient = emulated.Emulator(seed=1).backward(upstream, given, dtype, in_place)
            assert gradient.dtype == dtype
            assert gradient.tobytes() == rounded.tobytes()
            assert in_place or given.tobytes() == residual.tobytes()


def test_backward_keeps_what_is_not_finite():
    # Rounding to 16 bits gives infinity beyond the largest number; NaN stays NaN.
    residual = np.array([[65519.0, 65520.0, np.inf, -np.inf, np.nan, 1e-8]], np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        gradient = emulated.Emulator().backward(np.array(1, np.float32), residual, dtype)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(
                gradient.astype(np.float32), residual.astype(dtype).astype(np.float32)
            )


# Larger and smaller batches, scanned and hashed in turns: each launch starts from the workspace
# that another one left.
BATCHES = [SCANNED + 300, 30, SCANNED + 1, 0, SCANNED + 300, SCANNED + 300, 1, SCANNED, SCANNED + 2]


@pytest.mark.parametrize("atomic", [False, True])
def test_a_workspace_serves_launch_after_launch(atomic):
    largest, dim = max(BATCHES), 6
    workspace = emulated.Emulator().workspace(largest, dim, atomic=atomic)
    for k, batch in enumerate(BATCHES):
        shape = problems.Shape((batch,), dim, 500, "power-law", "")
        problem = problems.make(shape, weights=True, ignore="class", seed=k)
        device = emulated.Emulator(seed=k)
        check(device, problem, workspace=workspace, atomic=atomic)
        for part, numbers in must_be_zero(device.memory_of(workspace), largest, dim, atomic):
            assert not numbers.any(), f"after {BATCHES[: k + 1]}: {part}"
    assert device.memory_of(workspace).any()


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("sizes", [CLASS_SIZES, [*CLASS_SIZES, TWO_LEVELS]], ids=["small", "large"])
def test_one_launch_needs_only_the_first_bytes_zero(sizes, atomic):
    problem = batch_of(sizes, 7, distinct=5)
    device = emulated.Emulator(seed=2)
    workspace = device.workspace(len(problem.labels), 7, atomic=atomic)
    assert 0 < workspace.clear_size <= workspace.size
    device.memory_of(workspace)[workspace.clear_size :] = 0xA7
    check(device, problem, workspace=workspace, atomic=atomic)


def must_be_zero(memory, batch, dim, atomic):
    """The bytes that must be zero between launches, by PlaceArrays of workspace.cuh."""
    chunk, tiles, slots = 32, 128, hash_slots(batch)
    levels = 1
    while chunk ** (levels + 1) < batch:
        levels += 1
    partial_sum_rows = batch // (2 if atomic else 16) + 1
    sizes = dict(header=2068, table0=8 * slots, duplicates0=4 * batch)
    sizes |= dict(arrivals=8 * levels * partial_sum_rows * ((dim + 31) // 32))
    sizes |= dict(chunk_arrivals=8 * batch, sample_loss=8 * batch)
    sizes |= dict(segment_loss=16 * (batch // 4096 + 1))
    sizes |= dict(table1=8 * slots, duplicates1=4 * batch)
    sizes |= dict(duplicate_positions=4 * batch * chunk)
    sizes |= dict(owner_of=4 * batch, multi_chunk_index=4 * batch)
    sizes |= dict(tile_ranges=4 * (batch // chunk + 1) * tiles, tile_order=4 * batch)
    sizes |= dict(first_chunk=4 * batch, first_partial_sum=4 * batch)
    sizes |= dict(owner_of_chunk=4 * (batch // 3 + 1), non_finite=4 * batch)
    sizes |= dict(partial_sums=4 * partial_sum_rows * dim)
    parts, at = {}, 0
    for part, size in sizes.items():
        parts[part] = memory[at : at + size]
        at += (size + 255) // 256 * 256
    assert at == len(memory), "another layout"
    # Two sets of 8 counters on cache lines of 128 bytes, parity, slots [2], samples [2]. The set of
    # the next launch is cleared.
    header = parts["header"].view(np.int32)
    parity = header[512]
    yield "counters", header[:512].reshape(2, 256)[parity]
    cleared = [f"table{parity}", f"duplicates{parity}", "arrivals", "chunk_arrivals"]
    cleared += ["sample_loss", "segment_loss", *(["partial_sums"] if atomic else [])]
    for part in cleared:
        yield part, parts[part]


def hash_slots(batch):
    """HashSlots of workspace.cuh."""
    slots = 1
    while slots < 8 * batch or (slots < 16 * batch and slots < 2**17):
        slots *= 2
    return slots


# Each launch constant at its extremes; True if the losses are added in the order of the defaults.
CONSTANTS = [
    ("scan_batch", 0, False),
    ("scan_batch", 4096, False),
    ("scan_threads", 64, False),
    ("hash_threads", 64, False),
    ("hash_threads", 128, False),
    ("hash_blocks", 1, True),
    ("hash_blocks", 4, True),
    ("hash_blocks", 8, True),
    ("wait_ns", 0, True),
    ("wait_ns", 1000, True),
    ("overlap", 0, True),
]


@pytest.mark.parametrize("sizes", [CLASS_SIZES, [*CLASS_SIZES, TWO_LEVELS]], ids=["small", "large"])
@pytest.mark.parametrize("constant, value, same_loss", CONSTANTS)
def test_launch_constants(constant, value, same_loss, sizes):
    problem = batch_of(sizes, 12, distinct=100)
    device, results = emulated.Emulator(seed=6), []
    assert constant in device.tuning()
    for tuning in ({}, {constant: value}):
        workspace = device.workspace(len(problem.labels), 12, tuning=tuning)
        results.append(check(device, problem, workspace=workspace))
    loss = 0 if same_loss else problem.centers.itemsize  # bytes at the beginning of the results
    default, other = results
    assert default[loss:] == other[loss:]


@pytest.mark.parametrize(
    "constant, value",
    [
        *[("scan_batch", value) for value in (-1, 4097)],
        *[("scan_threads", value) for value in (0, 32, 96, 256)],
        *[("hash_threads", value) for value in (0, 32, 96, 192, 512)],
        *[("hash_blocks", value) for value in (0, 9)],
        *[("wait_ns", value) for value in (-1, 1001)],
        *[("overlap", value) for value in (-1, 2)],
    ],
)
def test_a_launch_constant_out_of_range_is_refused(constant, value):
    problem = batch_of([20], 8)
    device = emulated.Emulator()
    workspace = device.workspace(20, 8, tuning={constant: value})
    centers = problem.centers.copy()
    with pytest.raises(emulated.EmulatorError, match="invalid argument"):
        device.center_loss_step(problem.features, problem.labels, centers, workspace=workspace)
    assert centers.tobytes() == problem.centers.tobytes()
    assert not device.memory_of(workspace).any()


PHASES = [
    ([20, 2, 1], ["begun", "labels here", "own samples", "loss"]),
    ([SCANNED + 1], ["begun", "labels here", "labels counted", "ranks known", "own samples"]),
]


@pytest.mark.parametrize("sizes, expected", PHASES, ids=["scanned", "hashed"])
def test_the_phase_clock(sizes, expected):
    problem = batch_of(sizes, 8)
    device = emulated.Emulator(seed=2)
    workspace = device.workspace(len(problem.labels), 8, phases=True)
    check(device, problem, workspace=workspace)
    names, first, last = zip(*device.phases(workspace), strict=True)
    if len(problem.labels) > SCANNED:
        expected = [*expected, "all samples", "class sums", "loss"]
    assert list(names) == expected
    assert first[0] == 0 and all(a <= b for a, b in zip(first, last, strict=True))
    # Every block passes each point in this order, but only the block with the highest index stores
    # the loss.
    assert sorted(last[:-1]) == list(last[:-1]) and sorted(first) == list(first)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("distinct", [20, SCANNED], ids=["scanned", "hashed"])
def test_labels_that_differ_above_32_bits(distinct, atomic):
    # A slot of the hash table holds the low 32 bits of a label. Every class gets bad labels with
    # the same low bits, most of them before its own samples.
    problem = batch_of([1, 2, 3, 40], 6, distinct=distinct)
    rng = np.random.default_rng(0)
    high = rng.choice(np.array([1, 2, -1, 2**31 - 1, -(2**31)]), len(problem.labels)) * 2**32
    bad = rng.random(len(problem.labels)) < np.linspace(0.9, 0.1, len(problem.labels))
    problem = problem._replace(labels=np.where(bad, problem.labels + high, problem.labels))
    for seed in (0, 1):
        check(emulated.Emulator(seed=seed), problem, reduction="none", atomic=atomic)


def test_more_numbers_than_32_bits_count(tmp_path):
    # C * D > 2^31, and byte offsets beyond 2^33. A sparse file costs only the pages touched.
    rows, dim = 2**22 + 5, 513
    centers = np.memmap(tmp_path / "centers", np.float32, "w+", shape=(rows, dim))
    for labels in ([rows - 1, 0, rows - 1, rows // 2], [rows - 1, 0, rows // 2] * 700):
        centers[[0, rows // 2, rows - 1]] = 0
        features = np.full([len(labels), dim], 3, np.float32)
        emulated.Emulator().center_loss_step(
            features, np.array(labels), centers, rule="mean", alpha=1.0
        )
        for j in (0, rows // 2, rows - 1):
            assert (centers[j] == 3).all()
        for j in (1, rows // 2 - 1, rows // 2 + 1, rows - 2):
            assert not centers[j].any()


def test_what_a_workspace_is_too_small_for_is_refused():
    problem = batch_of([20], 8)
    device = emulated.Emulator()
    for small in (
        device.workspace(19, 8),
        device.workspace(20, 7),
        device.workspace(20, 8, np.float64),
        device.workspace(20, 8, atomic=True),
    ):
        centers = problem.centers.copy()
        with pytest.raises(emulated.EmulatorError, match="invalid argument"):
            device.center_loss_step(problem.features, problem.labels, centers, workspace=small)
        assert centers.tobytes() == problem.centers.tobytes()
