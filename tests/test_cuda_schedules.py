"""Each barrier, release and acquire of the CUDA kernels is needed: without it a test fails.

The same holds for what a block or launch leaves to the next one.
"""

import functools
import re

import numpy as np
import pytest

import cuda_cases
import emulated
import problems
from child import run_program
from pairwise import all_pairs

pytestmark = pytest.mark.native


def sites(pattern):
    """The lines of cuda/ that match `pattern`, as "file:line"."""
    found = [
        f"{file.name}:{number}"
        for file in sorted(emulated.KERNELS.iterdir())
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found, pattern
    return found


BARRIERS = sites(r"__sync(threads|threads_or|warp)\(")
ORDERS = sites(r"TCL_(RELEASE|ACQUIRE)\(\);")

# The barriers that only order memory, by their comments. A shuffle synchronizes the lanes anyway,
# so in no schedule of the emulator do the results depend on the barrier.
ONLY_ORDER = [
    "// orders the arrival before the other lanes' reads",
    "// all lanes have read the members of the previous task",
]

# Scanned, hashed, hashed with atomics: batch and whether atomic.
LAUNCHES = [(300, False), (cuda_cases.SCANNED + 1, False), (300, True)]
DIM = 70  # three slices of columns


def built(*changes, **options):
    """The kernels with `changes`. A block adds up several segments of losses, and the hash of a
    label is its low 6 bits, so that labels share slots."""
    few = ("kLossSegment = 4096;", "kLossSegment = 64;")
    crowded = ("0x9e3779b97f4a7c15u", "uint64_t{1} << 58")
    return emulated.build(kernels=emulated.changed(few, crowded, *changes), **options)


def breakable():
    """The barriers that do more than order memory."""
    kept, left_out = [], []
    for site in BARRIERS:
        file, number = site.split(":")
        line = (emulated.KERNELS / file).read_text().splitlines()[int(number) - 1]
        (left_out if any(comment in line for comment in ONLY_ORDER) else kept).append(site)
    assert len(left_out) == len(ONLY_ORDER), left_out
    return kept


@functools.cache
def problem(batch, seed=0):
    shape = problems.Shape((batch,), DIM, 400, "power-law", "")
    inputs = problems.make(shape, seed=seed)
    if seed == 2:
        inputs.features[::7, 5] = np.nan
    return inputs


@functools.cache
def racing_library():
    return built(races=True)


def step(inputs, atomic, **schedule):
    device = emulated.Emulator(library=racing_library(), races=True, **schedule)
    centers = inputs.centers.copy()
    device.center_loss_step(inputs.features, inputs.labels, centers, atomic=atomic)


RACING = cuda_cases.FACTORS | {
    "shape": [shape for shape in cuda_cases.SHAPES if shape.leading[0] * shape.dim < 49_000],
    "dtype": ["float32"],
    "rule": ["paper"],
    "reduction": ["mean", "none"],
    "ignore": [None, "class"],
    "bad": [None, "rows"],
    "weight": [0.25],
    "seed": [1, 3],
    "multiprocessors": [1, 2],
}


@pytest.mark.parametrize("row", all_pairs(RACING), ids=cuda_cases.name)
def test_nothing_races(row):
    schedule = {key: row[key] for key in cuda_cases.DEVICE}
    cuda_cases.run(emulated.Emulator(library=racing_library(), races=True, **schedule), row)


@pytest.mark.parametrize("site", BARRIERS + ORDERS)
def test_without_this_barrier_or_order_there_is_a_race(site):
    with pytest.raises(emulated.EmulatorError, match="^race: "):
        for batch, atomic in LAUNCHES:
            step(problem(batch), atomic, seed=1, multiprocessors=1, skip=site)


def launch_after_launch(library, skip=""):
    """Compares launches that share a workspace with the oracle, under schedules that make a missing
    barrier visible. Races are not checked."""
    for seed in (0, 1, 3, 5, 7, 11, 15, 19, 23):
        for batch, atomic in LAUNCHES:
            device = emulated.Emulator(
                library=library, seed=seed, multiprocessors=1 + seed % 2, skip=skip
            )
            workspace = device.workspace(batch, DIM, atomic=atomic)
            for number in range(3):
                inputs = problem(batch, number)
                cuda_cases.check(device, inputs, workspace=workspace, atomic=atomic)


def broken(cwd, library, skip=""):
    """The error of `launch_after_launch` in a process of its own, which may crash; "" if none."""
    done = run_program("run_emulated_launches", library, skip, cwd=cwd, check=False)
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    last = done.stderr.strip().splitlines()[-1]
    assert "AssertionError" in last or "EmulatorError" in last, done.stderr
    return last


def test_nothing_breaks(tmp_path):
    assert broken(tmp_path, built()) == ""


@pytest.mark.parametrize("site", breakable())
def test_without_this_barrier_a_schedule_breaks_results(tmp_path, site):
    assert broken(tmp_path, built(), site), "nothing broke"


MUTATIONS = {
    # Grid barriers and arrivals.
    "counts are not waited for": (
        "WaitForBlocks(&counters.labels_counted.value, blocks, p.tuning.wait_ns);",
        "",
    ),
    "samples are not waited for": (
        "WaitForBlocks(&counters.centers_read.value, blocks, p.tuning.wait_ns);",
        "",
    ),
    "the last but one at a node takes itself for the last": (
        "last = static_cast<int>(now & 0xffffffff) == arrivals;",
        "last = static_cast<int>(now & 0xffffffff) == arrivals - 1;",
    ),
    "every warp takes itself for the last at a node": (
        "if (!LastWarpToArrive(counter, children, finite)) return false;",
        "LastWarpToArrive(counter, children, finite);",
    ),
    "the center moves before the last sample has read it": (
        "return static_cast<int>(now & 0xffffffff) == samples;",
        "return static_cast<int>(now & 0xffffffff) == samples - 1;",
    ),
    "every atomic adder takes itself for the last": (
        "if (!LastWarpToArrive(p_.arrivals + row, count, &finite)) return;",
        "LastWarpToArrive(p_.arrivals + row, count, &finite);",
    ),
    "the counter at a node is not set back": ("if (last) *counter = 0;", ""),
    "the counter at a chunk is not set back": (
        "if (static_cast<int>(now & 0xffffffff) == samples) *counter = 0;",
        "",
    ),
    "slices share a counter": ("* slices + slice;", "* slices;"),
    "chunks share a counter": ("p.chunk_arrivals + offset + chunk,", "p.chunk_arrivals + offset,"),
    # Losses.
    "a loss is not waited for": ("if (all) break;", "break;"),
    "half a loss is not waited for": (
        "full = full && (word & 1) != 0;",
        "if (k == 0) full = (word & 1) != 0;",
    ),
    "a mailbox is not emptied": ("Empty(&mailboxes[i]);", ""),
    # From one launch to the next.
    "the sets are not exchanged": ("p.header->parity = 1 - parity;", ""),
    "the next counters of the barriers are not cleared": (
        "counters.labels_counted.value = counters.centers_read.value = 0;",
        "",
    ),
    "the next list of chunks is not cleared": (
        "counters.chunks.value = counters.partial_sums.value = counters.counted.value = 0;",
        "",
    ),
    "the next tickets are not cleared": ("counters.tickets.value = 0;", ""),
    "the next hash table is not cleared": (
        "for (int k = thread; k < slots; k += threads) p.table[parity][k] = 0;",
        "",
    ),
    "the next counts are not cleared": (
        "for (int k = thread; k < samples; k += threads) p.duplicates[parity][k] = 0;",
        "",
    ),
    "the slots to clear are not noted": ("p.header->slots[parity] = p.slots;", ""),
    "the samples to clear are not noted": ("p.header->samples[parity] = p.batch;", ""),
    "the partial sum of atomics is not cleared": (
        "StoreRow<Width, Cache::kNormal>(p_.PartialSum(row), column, p_.dim, zeros);",
        "",
    ),
    # Classes, chunks and ranks.
    "a slot with another label is taken": ("if (entered >> 32 == own >> 32 && (", "if ((true || "),
    "the owner is counted among its duplicates": (
        "number = atomicAdd(&duplicates_[owner], duplicates) - owns;",
        "number = atomicAdd(&duplicates_[owner], duplicates);",
    ),
    "scanned classes share partial sums": (
        "own.first_partial_sum = offset / kSamplesPerPartialSum;",
        "own.first_partial_sum = offset / (4 * kSamplesPerPartialSum);",
    ),
    "hashed classes share partial sums": (
        "Reserve(&counters_->partial_sums.value, chunks > 1 ? chunks : 0);",
        "Reserve(&counters_->partial_sums.value, chunks > 1 ? 1 : 0);",
    ),
    "a scanned chunk has the samples of the first one": (
        "labels.GatherRanks(chunk * kChunk, in_chunk,",
        "labels.GatherRanks(0, in_chunk,",
    ),
    "a hashed chunk takes itself for the first one": (
        "chunk.chunk = index - __ldcg(&p_.first_chunk[owner]);",
        "chunk.chunk = 0;",
    ),
    "samples of a class share a place in their tile": (
        "p_.tile_order[begin + smaller + before] = i;",
        "p_.tile_order[begin + smaller] = i;",
    ),
    "classes share places in a tile": (
        "p_.tile_order[begin + smaller + before] = i;",
        "p_.tile_order[begin + before] = i;",
    ),
    "a multi-chunk class has no index": ("p_.multi_chunk_index[owner] = index;", ""),
    "the tile ranges of a multi-chunk class are not cleared": (
        "ranges[k] = uint4{0, 0, 0, 0};",
        "if (false) ranges[k] = uint4{0, 0, 0, 0};",
    ),
    # Pairs, tickets, and rows that are not finite.
    "a scanned pair is done by both": ("if (labels.rank() == 0) {", "if (true) {"),
    "a hashed pair is done by both": (
        "const bool takes = i < p.batch && (kAtomic || count != 2 || owner == i);",
        "const bool takes = i < p.batch;",
    ),
    "a sample is done twice": (
        "const int begin = min(assigned * warps, p.batch);",
        "const int begin = min(assigned * warps, p.batch) - 1;",
    ),
    "a sample is not done": (
        "const int begin = min(assigned * warps, p.batch);",
        "const int begin = min(assigned * warps + 1, p.batch);",
    ),
    "a row that is not finite is added": (
        "if (!step_.RowIsFinite(members[m])) finite &= ~(1u << m);",
        "",
    ),
    "a partner that is not finite is added": (
        "is_pair && ((unsure & 2) == 0 || RowIsFinite(partner));",
        "is_pair;",
    ),
    "the first of a pair is added though it is not finite": (
        "if (!adds) rows.row[e] = 0;",
        "",
    ),
    "a scanned row that is not finite is not counted": (
        "kOneArrival + (1 - finite) * kOneSummed;",
        "kOneArrival;",
    ),
    "a hashed row that is not finite is not counted": (
        "if (finite == 0 && Lane() == 0) labels.CountNonFinite(its_owner);",
        "",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_breaks_results(tmp_path, mutation):
    assert broken(tmp_path, built(MUTATIONS[mutation])), "nothing broke"


def test_a_mutation_of_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="0 places"):
        emulated.changed(("this is nowhere in the kernels", ""))
    with pytest.raises(ValueError, match="places"):
        emulated.changed(("__device__", ""))


# Small batches and a few hashed ones: the emulator's stack switches are slow under the sanitizer.
SANITIZED = cuda_cases.FACTORS | {
    "rule": ["paper"],
    "numbers_in_memory": [True],
    "weight": [0.25],
    "seed": [0, 1],
    "multiprocessors": [1],
}
SMALL = [shape for shape in cuda_cases.SHAPES if shape.leading[0] <= 300]
HASHED = [s for s in cuda_cases.SHAPES if s.leading[0] > cuda_cases.SCANNED and s.dim < 100]
ROWS = all_pairs(SANITIZED | {"shape": SMALL}) + all_pairs(SANITIZED | {"shape": HASHED})[:6]
MOVING = SANITIZED | {"dtype": ["float32"], "update_centers": [True], "bad": [None]}
FLOAT_ROWS = all_pairs(MOVING | {"shape": SMALL}) + all_pairs(MOVING | {"shape": HASHED})[:3]


def sanitized_rows(library, rows):
    """Runs the rows. Under AddressSanitizer the process ends at the first error."""
    for row in rows:
        schedule = {key: row[key] for key in cuda_cases.DEVICE}
        cuda_cases.run(emulated.Emulator(library=library, **schedule), row)


def under_address_sanitizer(cwd, library, rows):
    """The finished process, without TensorFlow, which does not run under the sanitizer."""
    return run_program(
        "run_sanitized_rows",
        library,
        rows,
        cwd=cwd,
        check=False,
        LD_PRELOAD=" ".join(map(str, emulated.sanitizer_libraries())),
        # The space between arrays, larger than the shared memory of four warps.
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:redzone=1024",
    )


def test_no_access_out_of_bounds(tmp_path):
    done = under_address_sanitizer(tmp_path, emulated.build(flags=emulated.SANITIZE), "ROWS")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("if (at < dim) StoreVector", "StoreVector"),
        (
            "partial_sum_rows = batch / (workspace.atomic ? 2 : kSamplesPerPartialSum) + 1;",
            "partial_sum_rows = 1;",
        ),
        ("int64_t shared = warps * kChunk * kInt;", "int64_t shared = 0;"),
    ],
    ids=["rows", "partial-sums", "shared-memory"],
)
def test_an_access_out_of_bounds_is_found(tmp_path, change):
    library = emulated.build(kernels=emulated.changed(change), flags=emulated.SANITIZE)
    done = under_address_sanitizer(tmp_path, library, "FLOAT_ROWS")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert re.search(r"\w+\.cuh?:\d+", done.stderr), done.stderr
