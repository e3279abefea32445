"""The cases: sizes, batches of features and labels, and the bytes that a step must move.

This module uses NumPy only, so that the PyTorch process creates the same inputs without TensorFlow.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

ALPHA = 0.5
ZIPF_EXPONENT = 1.1
# Result files contain these names of label distributions; `bench.report` has their titles.
SCATTERED = "ten thousand labels"
NEIGHBORS = "ten thousand neighboring labels"


class Inputs(NamedTuple):
    """The batches of a case, and the rows of the table that they use."""

    features: np.ndarray  # [batches, B, D] float32
    labels: np.ndarray  # [batches, B] int64
    rows: np.ndarray  # [R] every label that occurs, in ascending order
    start: np.ndarray  # [R, D] float32: initial values of these rows; all other rows are zero


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one measurement. Equal cases have equal inputs in every process."""

    batch: int
    dim: int
    classes: int
    labels: str = "uniform"  # or "power-law", "ten labels", "one label"
    rotation: int = 2**26  # bytes of features between two uses of the same batch

    @property
    def name(self):
        sizes = f"{self.batch}×{self.dim}×{short(self.classes)}"
        return sizes if self.labels == "uniform" else f"{sizes} {self.labels}"

    @property
    def batches(self):
        """The number of batches: too many for the last-level cache to keep their data."""
        return max(16, self.rotation // (self.batch * self.dim * 4))

    def make(self):
        """Returns the inputs."""
        rng = np.random.default_rng([self.batch, self.dim, self.classes])
        shape = (self.batches, self.batch)
        features = rng.standard_normal((*shape, self.dim), np.float32)
        labels = LABELS[self.labels](rng, self.classes, shape)
        rows = np.unique(labels)
        return Inputs(features, labels, rows, rng.standard_normal((len(rows), self.dim), "f"))


def bytes_moved(labels, dim, feature_bytes=4):
    """Returns the bytes that a step has to move, as the mean over the batches.

    It reads the features, reads and writes each distinct center once, and writes the gradient.
    """
    distinct = np.mean([len(np.unique(batch)) for batch in labels])
    return dim * ((feature_bytes + 4) * labels.shape[1] + 8 * distinct)


def short(number):
    """Abbreviates round numbers: 1000 to 1k, 1000000 to 1M."""
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)


def _power_law(rng, classes, shape):
    """Draws from Zipf's law, truncated at `classes`, with a random class for each rank."""
    cumulative = np.cumsum(np.arange(1.0, classes + 1) ** -ZIPF_EXPONENT)
    rank = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return rng.permutation(classes)[rank]


def _few(number):
    def draw(rng, classes, shape):
        return rng.integers(0, classes, number)[rng.integers(0, number, shape)]

    return draw


def _neighbors(number):
    def draw(rng, classes, shape):
        return rng.integers(0, classes - number + 1) + rng.integers(0, number, shape)

    return draw


LABELS = {
    "uniform": lambda rng, classes, shape: rng.integers(0, classes, shape),
    "power-law": _power_law,
    SCATTERED: _few(10_000),
    NEIGHBORS: _neighbors(10_000),
    "ten labels": _few(10),
    "one label": _few(1),
}

# 1. The tutorial's sizes. Their ten rows are always in the cache. A small rotation suffices,
#    because a preceding layer leaves its features in the cache, too.
# 2. A table that the caches hold in part.
# 3. Tables that no cache holds.
CASES = [
    Case(64, 200, 10, rotation=2**22),
    Case(256, 512, 100_000),
    Case(1024, 512, 1_000_000),
    Case(1024, 512, 1_000_000, "power-law"),
    Case(4096, 512, 1_000_000),
    Case(4096, 512, 1_000_000, "power-law"),
    Case(16384, 128, 1_000_000),
]


def label_sweep(numbers):
    """Returns cases of one batch size against tables of these numbers of labels.

    D = 64, so that a table of 10 million labels takes 2.6 GB. There are three series:

    - Labels are drawn from the whole table. The caches hold a smaller share of a larger table.
    - Ten thousand scattered labels are in use, as many rows as a table of ten thousand has,
      but on more pages in a larger table.
    - Ten thousand adjacent labels are in use, so that only the size of the table differs.
    """
    whole = [Case(1024, 64, classes, rotation=2**25) for classes in numbers]
    part = [case for case in whole if case.classes > 10_000]
    return whole + [
        dataclasses.replace(case, labels=labels)
        for labels in (SCATTERED, NEIGHBORS)
        for case in part
    ]
