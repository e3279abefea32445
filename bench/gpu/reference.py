"""The reference result of a step, computed on the device in float64 by plain PyTorch.

For the largest case the tests' oracle takes ten seconds on the host, and copying its arrays takes
as long again. Therefore the oracle validates this reference, on whole classes of one batch, and the
reference validates every batch of every implementation on the device.
"""

import numpy as np
import torch

from bench.cases import ALPHA
from bench.check import TOLERANCE, Outcome, from_tests

# The reference is as accurate as the oracle; only the order of its sums differs.
EXACT = 1e-11
CHECKED = 256  # the oracle computes the classes of this many samples, at most
ENOUGH = 4096  # it adds no further class beyond this many samples, which take 20 µs each


def expected(workload):
    """Returns the outcome of one step on each batch, in order."""
    rows = workload.start.double()
    for k, (features, index) in enumerate(zip(workload.features, workload.index, strict=True)):
        before = rows[index] if k == 0 else None
        loss, residual = step(features, index, rows)
        if k == 0:
            _check_by_oracle(features, index, before, residual, rows[index])
    return Outcome(loss, residual, rows, others_moved=False)


def step(features, index, rows):
    """Returns loss and residual, and moves the rows; `index` holds the row of each sample."""
    residual = features.double() - rows[index]
    counts = torch.bincount(index, minlength=len(rows)).double()[index]
    rows.index_add_(0, index, residual * (ALPHA / (1 + counts)).unsqueeze(1))
    return residual.square().sum() / 2, residual


def judge(name, outcome, truth, start):
    """Raises AssertionError if the outcome differs from the reference."""
    assert not outcome.others_moved, f"{name}: a row has changed that no label names"
    # The error of a row scales with its initial values.
    floor = {"rows": float(start.abs().max())}
    for what in ("loss", "gradient", "rows"):
        actual, wanted = getattr(outcome, what), getattr(truth, what)
        if actual is not None:
            largest = max(float(wanted.abs().max()), floor.get(what, 0))
            error = float((actual.double() - wanted).abs().max()) / largest
            assert error <= TOLERANCE, f"{name}: {what} is off by {error:.1e} of its largest"


def validate(name, runner, workload, truth):
    """Runs each batch once, compares the outcome with the reference, and returns it."""
    runner.reset()
    runner.run(workload.case.batches)
    outcome = runner.outcome()
    judge(name, outcome, truth, workload.start)
    return outcome


def same_bits(one, other):
    """Returns whether two outcomes are equal bit for bit."""
    pairs = zip(one[:3], other[:3], strict=True)
    return all(a is None or torch.equal(a, b) for a, b in pairs)


def _check_by_oracle(features, index, before, residual, after):
    """Compares a step with the oracle, on all samples of the classes of the first few samples.

    This is enough because residuals and rows of a class do not depend on other classes.
    """
    ids = index.cpu().numpy()
    classes = list(dict.fromkeys(ids[:CHECKED].tolist()))
    sizes = np.cumsum(np.bincount(ids)[classes])
    members = np.flatnonzero(np.isin(ids, classes[: 1 + np.searchsorted(sizes, ENOUGH)]))
    _, first, sub_ids = np.unique(ids[members], return_index=True, return_inverse=True)
    at = torch.from_numpy(members).to(index.device)
    features, before, residual, after = (
        tensor[at].double().cpu().numpy() for tensor in (features, before, residual, after)
    )
    truth = from_tests("oracle").center_loss(
        features, sub_ids, before[first], alpha=ALPHA, reduction="sum", precision=np.float64
    )
    for what, actual, wanted in (
        ("gradient", residual, truth.feature_gradient),
        ("rows", after[first], truth.centers),
        ("loss", (residual**2).sum() / 2, truth.loss),
    ):
        error = np.abs(actual - wanted).max() / np.abs(wanted).max()
        if not error <= EXACT:
            raise RuntimeError(f"the reference's {what} is off by {error:.1e} from the oracle's")
