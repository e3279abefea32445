"""What holds the launch of the CUDA kernels together: each barrier, release, acquire and
hand-over from one block or launch to the next is found missing where it is left out."""

import functools
import re

import numpy as np
import pytest

import cuda_cases
import emulated
import problems
from child import run_python
from pairwise import all_pairs

pytestmark = pytest.mark.native


def sites(pattern):
    """The lines of cuda/ that match, as "file:line"."""
    found = [
        f"{file.name}:{number}"
        for file in sorted(emulated.KERNELS.iterdir())
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found, pattern
    return found


BARRIERS = sites(r"__sync(threads|warp)\(\)")
ORDERS = sites(r"TCL_(RELEASE|ACQUIRE)\(\);")

# The lines before or behind the barriers that only order memory: the lanes meet in a shuffle or a
# vote all the same, so no schedule of the emulator shows in the results what the barrier is for.
ONLY_ORDER = [
    "return members;",
    "return __ballot_sync(kAllLanes, last);",
    "if (Lane() == 0) Await(counter, arrivals);",
]

# Scanned, hashed, hashed with atomics: batch and whether atomic.
LAUNCHES = [(300, False), (cuda_cases.SCANNED + 1, False), (300, True)]
DIM = 70  # three parts of a chunk


def built(*changes, **options):
    """The kernels with `changes`, and with so few losses to a unit that a block has several."""
    few = ("kLossUnit = 2048;", "kLossUnit = 64;")
    return emulated.build(kernels=emulated.changed(few, *changes), **options)


def breakable():
    """The barriers that are there for more."""
    kept, left_out = [], []
    for site in BARRIERS:
        file, number = site.split(":")
        lines = (emulated.KERNELS / file).read_text().splitlines()
        beside = {lines[int(number) - 2].strip(), lines[int(number)].strip()}
        (left_out if beside & set(ONLY_ORDER) else kept).append(site)
    assert len(left_out) == len(ONLY_ORDER), left_out
    return kept


@functools.cache
def problem(batch, seed=0):
    shape = problems.Shape((batch,), DIM, 40, "power-law", "")
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
    """Launches that share a workspace, with the schedules that break what is broken, against the
    oracle; without the check of races."""
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
    """How `launch_after_launch` ends in a process of its own, which may crash; "" if well."""
    done = run_python(
        f"from test_cuda_schedules import launch_after_launch\n"
        f"launch_after_launch({str(library)!r}, {skip!r})",
        cwd,
        check=False,
    )
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
    "counts are not waited for": ("WaitAsBlock(&counters.counted_blocks.value, blocks);", ""),
    "ranks are not waited for": ("WaitAsWarp(&counters.ranked_blocks.value, blocks);", ""),
    "the last but one takes itself for the last": (
        "CountArrival(counter) == arrivals - 1;",
        "CountArrival(counter) == arrivals - 2;",
    ),
    "every part takes itself for the last of a chunk": (
        "if (last & 1) FinishChunk(members);",
        "FinishChunk(members);",
    ),
    "every chunk takes itself for the last of a node": ("if ((last & 2) == 0) return;", ""),
    "every part takes itself for the last of a node": (
        "if (!LastWarpToArrive(Arrivals(kAtNode, pool_row + node), p_.parts)) return;",
        "LastWarpToArrive(Arrivals(kAtNode, pool_row + node), p_.parts);",
    ),
    "every node takes itself for the last": (
        "if (!LastWarpToArrive(Arrivals(level, row), children)) return;",
        "LastWarpToArrive(Arrivals(level, row), children);",
    ),
    "a part knows nothing of the others' rows": ("if (again != 0) {", "if (false) {"),
    "a node's sum takes the place of its first chunk's": ("again |= 1;", "again |= 0;"),
    "a part does not see that a row is not finite": (
        "if (!all_finite) finite &= ~(1u << (first + v));",
        "",
    ),
    "classes share rows of the pool": (
        "return WarpSum(smaller) / kWholeMembers;",
        "return WarpSum(smaller) / (4 * kWholeMembers);",
    ),
    "every atomic adder takes itself for the last": (
        "if (!LastWarpToArrive(Arrivals(kAtChunk, row), members)) return;",
        "LastWarpToArrive(Arrivals(kAtChunk, row), members);",
    ),
    "the counter of arrivals is not set back": (
        "if (last) *counter = 0;",
        "",
    ),
    "the center moves before all have read it": (
        "if (index.count() <= kWholeMembers) {",
        "if (true) {",
    ),
    "a loss is not waited for": ("if (there) break;", "break;"),
    "half a loss is not waited for": (
        "there = there && (word & 1) != 0;",
        "if (k == 0) there = (word & 1) != 0;",
    ),
    "a box is not emptied": ("Empty(&boxes[i]);", ""),
    "the blocks' next counters are not cleared": (
        "counters.counted_blocks.value = counters.ranked_blocks.value = 0;",
        "",
    ),
    "the next rows of the pool and N are not cleared": (
        "counters.pool_rows.value = counters.counted.value = 0;",
        "",
    ),
    "the tables are not exchanged": ("p.header->parity = 1 - own_parity;", ""),
    "the next table is not cleared": ("index.Clear(p, 1 - parity);", ""),
    "the row of atomic sums is not cleared": (
        "StoreRow<Width, Cache::kNormal>(sum, column, p_.dim, zeros);",
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


# Small batches, then a few that are hashed: a change of stacks costs much more under the sanitizer.
SANITIZED = cuda_cases.FACTORS | {
    "rule": ["paper"],
    "numbers_in_memory": [True],
    "weight": [0.25],
    "seed": [0, 1],
    "multiprocessors": [1],
}
SMALL = [shape for shape in cuda_cases.SHAPES if shape.leading[0] <= 300]
HASHED = [shape for shape in cuda_cases.SHAPES if 2048 < shape.leading[0] and shape.dim < 100]
ROWS = all_pairs(SANITIZED | {"shape": SMALL}) + all_pairs(SANITIZED | {"shape": HASHED})[:6]
MOVING = SANITIZED | {"dtype": ["float32"], "update_centers": [True], "bad": [None]}
FLOAT_ROWS = all_pairs(MOVING | {"shape": SMALL}) + all_pairs(MOVING | {"shape": HASHED})[:3]


def sanitized_rows(library, rows):
    """Goes through the rows; a process that AddressSanitizer watches ends at the first error."""
    for row in rows:
        schedule = {key: row[key] for key in cuda_cases.DEVICE}
        cuda_cases.run(emulated.Emulator(library=library, **schedule), row)


def under_address_sanitizer(cwd, library, rows):
    """The finished process, without TensorFlow: it does not bear the sanitizer."""
    return run_python(
        f"import test_cuda_schedules as here\n"
        f"here.sanitized_rows({str(library)!r}, here.{rows})\n"
        f"print('done')",
        cwd,
        check=False,
        LD_PRELOAD=" ".join(map(str, emulated.sanitizer_libraries())),
        # Wide enough between arrays for what four warps keep in shared memory.
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
            "pool_rows = workspace.atomic ? batch / 2 + 1 : batch / kWholeMembers + 1;",
            "pool_rows = 1;",
        ),
        ("threads * static_cast<int64_t>(sizeof(int));", "0;"),
    ],
    ids=["rows", "pool", "shared-memory"],
)
def test_an_access_out_of_bounds_is_found(tmp_path, change):
    library = emulated.build(kernels=emulated.changed(change), flags=emulated.SANITIZE)
    done = under_address_sanitizer(tmp_path, library, "FLOAT_ROWS")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert re.search(r"\w+\.cuh?:\d+", done.stderr), done.stderr
