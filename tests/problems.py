"""Inputs for the sweeps: shapes with their reasons, label distributions, dtypes."""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Shape(NamedTuple):
    """Sizes of a batch and a table; `leading` replaces [B] for features of a higher rank."""

    leading: tuple
    dim: int
    classes: int
    labels: str
    reason: str

    def __str__(self):
        return f"{'x'.join(map(str, self.leading))}x{self.dim}x{self.classes}-{self.labels}"


SHAPES = [
    Shape((64,), 200, 10, "uniform", "the tutorial's"),
    Shape((0,), 5, 4, "uniform", "nothing in the batch"),
    Shape((1,), 1, 1, "uniform", "one of everything"),
    Shape((1,), 513, 3, "uniform", "one sample: no group, no split"),
    Shape((37,), 1, 6, "uniform", "rows of one number"),
    Shape((41,), 3, 7, "uniform", "rows shorter than any vector"),
    Shape((50,), 17, 1000, "uniform", "one more than a vector of 16; mostly distinct labels"),
    Shape((29,), 513, 12, "uniform", "one more than a multiple of every vector width"),
    Shape((4097,), 8, 5000, "distinct", "every group has one member"),
    Shape((6000,), 24, 3, "equal", "one group: it must be split by rows"),
    Shape((5000,), 1, 2, "equal", "one group with a single column"),
    Shape((2100,), 700, 2, "equal", "one group that can be split by columns"),
    Shape((5000,), 33, 9000, "power-law", "few large groups and many small ones"),
    Shape((4500,), 12, 3000, "mixed", "half of the batch in one group, the rest distinct"),
    Shape((4, 9), 12, 5, "uniform", "features of rank 3"),
    Shape((2, 3, 4), 6, 5, "uniform", "features of rank 4"),
]

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


class Problem(NamedTuple):
    """NumPy inputs of one call."""

    features: np.ndarray
    labels: np.ndarray  # as the caller passes them
    ids: np.ndarray  # the same as class ids
    centers: np.ndarray
    sample_weight: np.ndarray | None
    ignore_class: int | None
    upstream: np.ndarray  # of the labels' shape


def make_ids(rng, shape):
    """Class ids [B] of the shape's distribution, in random order."""
    batch, classes = int(np.prod(shape.leading)), shape.classes
    if shape.labels == "equal":
        ids = np.full(batch, classes - 1)
    elif shape.labels == "distinct":
        ids = rng.permutation(classes)[:batch]
    elif shape.labels == "power-law":
        ids = (rng.zipf(1.3, batch) - 1) % classes
    elif shape.labels == "mixed":
        ids = np.concatenate([np.full(batch // 2, 1), rng.permutation(classes)])[:batch]
        ids = rng.permutation(ids)
    else:
        ids = rng.integers(0, classes, batch)
    return ids.astype(np.int64)


def make(shape, dtype="float32", labels="int64", weights=False, ignore=None, seed=0):
    """A problem; labels: int32, int64 or "onehot-TYPE"; ignore: None, "outside" or "class"."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*shape.leading, shape.dim)).astype(DTYPES[dtype])
    table_dtype = np.float64 if dtype == "float64" else np.float32
    centers = rng.normal(size=(shape.classes, shape.dim)).astype(table_dtype)
    ids = make_ids(rng, shape)
    ignore_class = None
    if ignore == "outside":  # a label that no table row has
        ignore_class = -1
        ids[rng.random(len(ids)) < 0.3] = -1
    elif ignore == "class":  # a label that has a row, which must stay as it is
        ignore_class = int(ids[0]) if len(ids) else 0
    ids = ids.reshape(shape.leading)
    sample_weight = None
    if weights:
        sample_weight = rng.uniform(0, 2, shape.leading).astype(table_dtype)
        sample_weight[rng.random(shape.leading) < 0.2] = 0
    if labels.startswith("onehot"):
        passed = np.eye(shape.classes)[ids].astype(labels.removeprefix("onehot-"))
    elif labels == "probabilities":
        passed = (0.5 * np.eye(shape.classes)[ids] + 0.4 / shape.classes).astype(np.float32)
    else:
        passed = ids.astype(labels)
    upstream = rng.uniform(-2, 2, shape.leading).astype(table_dtype)
    return Problem(features, passed, ids, centers, sample_weight, ignore_class, upstream)
