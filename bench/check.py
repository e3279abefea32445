"""Holds an implementation against the tests' oracle, on every batch it will be timed on."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.cases import ALPHA

# Of the largest element. float32 sums of some million squares, and hundreds of steps on one row.
TOLERANCE = 2e-5


class Outcome(NamedTuple):
    """The last batch's loss and gradient, None where not computed, and the rows after all steps."""

    loss: np.ndarray | None
    gradient: np.ndarray | None
    rows: np.ndarray
    others_moved: bool  # whether a neighbour of these rows, which no label names, has changed

    @classmethod
    def of(cls, loss, gradient, table, rows):
        others = np.setdiff1d((rows + 1) % len(table), rows)
        return cls(loss, gradient, table[rows], bool(table[others].any()))


def expected(inputs):
    """What one step on each batch, in order, must give."""
    oracle = from_tests("oracle")
    # float64 is wide enough to judge float32, and twice as fast as what is wider.
    options = dict(alpha=ALPHA, reduction="sum", precision=np.float64)
    rows = inputs.start.astype(np.float64)
    for features, labels in zip(inputs.features, inputs.labels, strict=True):
        touched, ids = np.unique(np.searchsorted(inputs.rows, labels), return_inverse=True)
        step = oracle.center_loss(features, ids, rows[touched], **options)
        rows[touched] = step.centers
    return Outcome(step.loss, step.feature_gradient, rows, others_moved=False)


def validate(name, runner, batches, truth):
    """Runs each batch once; raises AssertionError where the outcome is not the oracle's."""
    runner.reset()
    runner.run(batches)
    outcome = runner.outcome()
    assert not outcome.others_moved, f"{name}: a row that no label names has changed"
    for what in ("loss", "gradient", "rows"):
        actual, wanted = getattr(outcome, what), getattr(truth, what)
        if actual is not None:
            error = np.abs(actual - wanted).max() / np.abs(wanted).max()
            assert error <= TOLERANCE, f"{name}: {what} is off by {error:.1e} of its largest"


def from_tests(name):
    """A module of its own from the file tests/NAME.py."""
    path = Path(__file__).parent.parent / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
