"""What is measured: sizes, batches of features and labels, the bytes that a step must move.

NumPy only, so that the PyTorch script makes the same inputs without TensorFlow.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

ALPHA = 0.5
ZIPF_EXPONENT = 1.1
SCATTERED = "ten thousand labels"
NEIGHBORS = "ten thousand neighboring labels"


class Inputs(NamedTuple):
    """The batches of a case and the rows of the table that they touch."""

    features: np.ndarray  # [batches, B, D] float32
    labels: np.ndarray  # [batches, B] int64
    rows: np.ndarray  # [R] every label that occurs, ascending
    start: np.ndarray  # [R, D] float32: these rows before the first step; all others are zero


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one measurement; the same case gives the same inputs in every process."""

    batch: int
    dim: int
    classes: int
    labels: str = "uniform"  # or "power-law", "ten labels", "one label"
    rotation: int = 2**26  # bytes of features gone through before a batch comes again

    @property
    def name(self):
        sizes = f"{self.batch}×{self.dim}×{short(self.classes)}"
        return sizes if self.labels == "uniform" else f"{sizes} {self.labels}"

    @property
    def batches(self):
        """Enough that features, rows and so on do not stay in the last-level cache."""
        return max(16, self.rotation // (self.batch * self.dim * 4))

    def make(self):
        """The inputs."""
        rng = np.random.default_rng([self.batch, self.dim, self.classes])
        shape = (self.batches, self.batch)
        features = rng.standard_normal((*shape, self.dim), np.float32)
        labels = LABELS[self.labels](rng, self.classes, shape)
        rows = np.unique(labels)
        return Inputs(features, labels, rows, rng.standard_normal((len(rows), self.dim), "f"))


def bytes_moved(labels, dim, feature_bytes=4):
    """What a step cannot avoid, mean of the batches: features read, each distinct center read and
    written once, gradient written."""
    distinct = np.mean([len(np.unique(batch)) for batch in labels])
    return dim * ((feature_bytes + 4) * labels.shape[1] + 8 * distinct)


def short(number):
    """1000 -> 1k, 1000000 -> 1M."""
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)


def _power_law(rng, classes, shape):
    """Zipf's law cut off at `classes`; which class is the k-th most frequent is random."""
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

# The tutorial's sizes, whose ten rows are always in cache: its features need not be colder than a
# layer that has just made them leaves them. A table that caches hold in part. One that none holds.
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
    """The same batch against tables of so many labels. D = 64, so that 10 million are 2.6 GB.

    Labels are drawn from the whole table, whose rows lie in ever fewer caches; from ten thousand of
    them, as many rows as the table of ten thousand has, but on ever more pages; and from ten
    thousand neighboring ones, so that nothing but the size of the table differs.
    """
    whole = [Case(1024, 64, classes, rotation=2**25) for classes in numbers]
    part = [case for case in whole if case.classes > 10_000]
    return whole + [
        dataclasses.replace(case, labels=labels)
        for labels in (SCATTERED, NEIGHBORS)
        for case in part
    ]
