"""The CUDA step against the oracle: what is varied, and the check after a call.

`device` is what runs the kernels on NumPy arrays, an emulated.Emulator.
"""

import numpy as np

import oracle
import problems
from problems import Shape
from tolerances import assert_near_oracle

SCANNED = 1024  # the largest batch whose labels are scanned; larger ones are hashed

# Class sizes around each threshold: one sample, a pair, one chunk of up to 32 samples, several
# chunks. A warp loads 12 or more rows of a chunk at once. They fit into a batch that is scanned.
CLASS_SIZES = [1, 2, 3, 12, 13, 32, 33, 64, 65, 300]
# 32 chunks are the most under one node of the reduction tree; one more needs a second level, one
# more than 32 * 32 a third.
ONE_LEVEL, TWO_LEVELS, THREE_LEVELS = 32**2, 32**2 + 1, 32**3 + 1

SHAPES = [
    Shape((64,), 200, 10, "uniform", "the tutorial's"),
    Shape((0,), 5, 4, "uniform", "nothing in the batch"),
    Shape((1,), 1, 1, "uniform", "one of everything"),
    Shape((1,), 513, 3, "uniform", "one sample; one number more than some passes"),
    Shape((37,), 1, 6, "uniform", "rows of one number"),
    Shape((41,), 3, 7, "uniform", "rows shorter than any vector"),
    Shape((50,), 17, 1000, "uniform", "rows that start between vectors; mostly distinct labels"),
    Shape((33,), 700, 3, "uniform", "two passes of whole vectors"),
    Shape((20,), 1100, 4, "uniform", "three passes"),
    Shape((300,), 8, 2, "equal", "one class of several chunks, scanned"),
    Shape((150,), 392, 3, "uniform", "chunks in slices of columns, the last one short"),
    Shape((SCANNED,), 24, 900, "power-law", "the largest batch that is scanned"),
    Shape((SCANNED + 1,), 24, 900, "power-law", "the smallest batch that is hashed"),
    Shape((SCANNED + 1,), 8, 3000, "distinct", "hashed, every class has one member"),
    Shape((SCANNED + 1,), 3, 10, "uniform", "hashed, ten labels"),
    Shape((1300,), 12, 4, "equal", "hashed, one class in a reduction tree of two levels"),
    Shape((1100,), 700, 560, "mixed", "hashed, two passes, one class heavy"),
]

FACTORS = {
    "shape": SHAPES,
    "order": ["any", "sorted"],  # equal labels side by side
    "dtype": list(problems.DTYPES),
    "labels": ["int32", "int64"],
    "rule": ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"],
    "reduction": ["mean", "sum", "none"],
    "weights": [False, True],
    "ignore": [None, "outside", "class"],
    "bad": [None, "rows", "labels"],
    "update_centers": [True, False],
    "features_are_residuals": [False, True],
    "numbers_in_memory": [False, True],
    "loss_weight": [1.0, 0.25],
    "unaligned": [False, True],
    "atomic": [False, True],
    "seed": [0, 1, 2, 3],
    "multiprocessors": [1, 2, 3, 5],
}
DEVICE = ("seed", "multiprocessors")  # factors that the device is made of


def name(row):
    """A test's name."""
    return "-".join(str(value) for value in row.values())


def make(row):
    """The problem of a row of FACTORS."""
    problem = problems.make(
        row["shape"], row["dtype"], row["labels"], row["weights"], row["ignore"], row["seed"]
    )
    rng = np.random.default_rng(row["seed"])
    labels, features = problem.labels, problem.features
    if row["order"] == "sorted":
        labels = np.sort(labels)
    if row["bad"] == "rows" and features.size:
        at = rng.random(len(labels)) < 0.1
        at[-1] = True
        columns = rng.integers(0, features.shape[1], at.sum())
        features[at, columns] = rng.choice([np.nan, np.inf, -np.inf], at.sum())
    if row["bad"] == "labels" and len(labels):
        at = rng.random(len(labels)) < 0.1
        at[0] = True
        outside = [-2, -(2**31), problem.centers.shape[0], 2**31 - 1]
        if labels.dtype == np.int64:
            outside += [-(2**63), 2**63 - 1, 2**32]
        labels[at] = rng.choice(np.array(outside, labels.dtype), at.sum())
    return problem._replace(labels=labels, features=features)


def run(device, row):
    """Runs the row's problem on the device and checks the results."""
    options = {key: row[key] for key in ("rule", "reduction", "update_centers", "loss_weight")}
    options |= {key: row[key] for key in ("features_are_residuals", "numbers_in_memory", "atomic")}
    return check(device, make(row), unaligned=row["unaligned"], alpha=0.3, **options)


def check(device, problem, *, unaligned=False, workspace=None, atomic=False, **options):
    """A step of the problem against the oracle. Returns the bytes of all results."""
    features, labels = problem.features, problem.labels
    if unaligned:
        features = off_by_one(features)
    # The table has rows before and after it that no step may write.
    rows, dim = problem.centers.shape
    memory = np.full([rows + 2, dim], 77, problem.centers.dtype)
    memory[1:-1] = problem.centers
    centers = memory[1:-1]
    inputs = dict(sample_weight=problem.sample_weight, ignore_class=problem.ignore_class)
    loss, residual, squared = device.center_loss_step(
        features, labels, centers, workspace=workspace, atomic=atomic, **inputs, **options
    )
    assert (memory[[0, -1]] == 77).all(), "outside the table"
    truth, distances = expected(problem, **options)
    plain, _ = expected(problem, precision=problem.centers.dtype.type, **options)
    dtype, terms = centers.dtype.name, max(len(labels), 1)
    # A distance is a sum of D squares; atomics add the samples one by one, in any order.
    for actual, yardstick, exact, what, count in (
        (loss, plain.loss, truth.loss, "loss", terms * dim),
        (residual, plain.feature_gradient, truth.feature_gradient, "residual", 1),
        (squared, distances, distances, "squared distance", dim),
        (centers, plain.centers, truth.centers, "centers", terms if atomic else 1),
    ):
        assert_same_kind(actual, exact, what)
        finite = np.isfinite(exact)
        actual, yardstick, exact = np.asarray(actual), np.asarray(yardstick), np.asarray(exact)
        assert_near_oracle(actual[finite], yardstick[finite], exact[finite], dtype, what, count)
    still = np.ones(rows, bool)
    if options.get("update_centers", True) and options.get("alpha", 0.5) != 0:
        valid = (labels >= 0) & (labels < rows) & np.isfinite(features.astype(np.float64)).all(1)
        if problem.ignore_class is not None:
            valid &= labels != problem.ignore_class
        still[labels[valid]] = False
    assert centers[still].tobytes() == problem.centers[still].tobytes(), "a center without samples"
    return loss.tobytes() + residual.tobytes() + squared.tobytes() + centers.tobytes()


def expected(
    problem,
    *,
    loss_weight=1.0,
    update_centers=True,
    features_are_residuals=False,
    numbers_in_memory=False,
    precision=oracle.WIDE,
    **options,
):
    """The oracle's step and the squared distances, with a GPU's treatment of bad labels."""
    del numbers_in_memory
    rows, dim = problem.centers.shape
    # A label outside the table gets an extra row of NaN, so all of its results are NaN.
    labels = problem.labels.astype(np.int64)
    outside = (labels < 0) | (labels >= rows)
    if problem.ignore_class is not None:
        outside &= labels != problem.ignore_class
    labels = np.where(outside, rows, labels)
    centers = np.concatenate([problem.centers, np.full([1, dim], np.nan)])
    features = problem.features.astype(precision)
    ignored = np.zeros(len(labels), bool)
    if problem.ignore_class is not None:
        ignored = labels == problem.ignore_class
    own = np.where(ignored, 0, labels)
    if features_are_residuals:
        features = features + centers[own].astype(precision)
        features[outside] = 0
    step = oracle.center_loss(
        features,
        labels,
        centers,
        sample_weight=problem.sample_weight,
        ignore_class=problem.ignore_class,
        upstream=loss_weight,
        precision=precision,
        **options,
    )
    with np.errstate(invalid="ignore", over="ignore"):
        distances = ((features - centers[own].astype(precision)) ** 2).sum(1)
    after = step.centers[:-1] if update_centers else problem.centers
    step = step._replace(loss=np.asarray(step.loss * loss_weight), centers=after)
    return step, np.where(ignored, 0, distances).astype(np.float64)


def assert_same_kind(actual, exact, what):
    """NaN and infinities are in the same places."""
    actual = np.asarray(actual).astype(np.float64)
    assert np.array_equal(np.isnan(actual), np.isnan(exact)), f"{what}: NaN elsewhere"
    for value in (np.inf, -np.inf):
        assert np.array_equal(actual == value, exact == value), f"{what}: {value} elsewhere"


def off_by_one(array):
    """The same numbers, one element after the beginning of an array."""
    moved = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    moved[...] = array
    return moved


def batch_of(sizes, dim, *, dtype="float32", distinct=0, seed=0):
    """A problem with classes of these sizes and `distinct` more of one sample, in random order."""
    rng = np.random.default_rng(seed)
    classes = len(sizes) + distinct
    labels = np.repeat(rng.permutation(classes), [*sizes, *([1] * distinct)]).astype(np.int64)
    shape = Shape((len(labels),), dim, classes, "uniform", "")
    labels = rng.permutation(labels)
    return problems.make(shape, dtype, seed=seed)._replace(labels=labels, ids=labels)
