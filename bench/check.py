"""Compares an implementation with the tests' oracle, on every batch that it is timed on."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.cases import ALPHA

# Relative to the largest element. It allows for float32 sums of some million squares, and for
# hundreds of steps on one row.
TOLERANCE = 2e-5


class Outcome(NamedTuple):
    """Loss and gradient of the last batch, None if not computed, and the rows after all steps."""

    loss: np.ndarray | None
    gradient: np.ndarray | None
    rows: np.ndarray
    others_moved: bool  # whether a row next to these rows, which no label names, has changed

    @classmethod
    def of(cls, loss, gradient, table, rows):
        others = np.setdiff1d((rows + 1) % len(table), rows)
        return cls(loss, gradient, table[rows], bool(table[others].any()))


def expected(inputs):
    """Returns the correct outcome of one step on each batch, in order."""
    oracle = from_tests("oracle")
    # float64 is accurate enough to judge float32, and twice as fast as a wider type.
    options = dict(alpha=ALPHA, reduction="sum", precision=np.float64)
    rows = inputs.start.astype(np.float64)
    for features, labels in zip(inputs.features, inputs.labels, strict=True):
        touched, ids = np.unique(np.searchsorted(inputs.rows, labels), return_inverse=True)
        step = oracle.center_loss(features, ids, rows[touched], **options)
        rows[touched] = step.centers
    return Outcome(step.loss, step.feature_gradient, rows, others_moved=False)


def validate(name, runner, batches, truth):
    """Runs each batch once; raises AssertionError if the outcome differs from the oracle's."""
    runner.reset()
    runner.run(batches)
    outcome = runner.outcome()
    assert not outcome.others_moved, f"{name}: a row has changed that no label names"
    for what in ("loss", "gradient", "rows"):
        actual, wanted = getattr(outcome, what), getattr(truth, what)
        if actual is not None:
            error = np.abs(actual - wanted).max() / np.abs(wanted).max()
            assert error <= TOLERANCE, f"{name}: {what} is off by {error:.1e} of its largest"


def from_tests(name):
    """Loads the file tests/NAME.py as a separate module."""
    path = Path(__file__).parent.parent / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
