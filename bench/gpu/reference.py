"""What a step must give, on the device: float64 in plain PyTorch.

The tests' oracle takes ten seconds of the host for the largest case, and as much again goes to
copies of its arrays. So the oracle judges this reference, on whole classes of one batch, and the
reference judges every batch of every implementation, where the arrays are.
"""

import numpy as np
import torch

from bench.cases import ALPHA
from bench.check import TOLERANCE, Outcome, from_tests

# The reference is as exact as the oracle; only the order of its sums is another.
EXACT = 1e-11
CHECKED = 256  # samples whose classes the oracle works out,
ENOUGH = 4096  # and no further class once it has so many samples: it takes 20 µs for each


def expected(workload):
    """The outcome of one step on each batch, in order."""
    rows = workload.start.double()
    for k, (features, index) in enumerate(zip(workload.features, workload.index, strict=True)):
        before = rows[index] if k == 0 else None
        loss, residual = step(features, index, rows)
        if k == 0:
            _check_by_oracle(features, index, before, residual, rows[index])
    return Outcome(loss, residual, rows, others_moved=False)


def step(features, index, rows):
    """Loss and residual; moves the rows. `index` says which row a sample has."""
    residual = features.double() - rows[index]
    counts = torch.bincount(index, minlength=len(rows)).double()[index]
    rows.index_add_(0, index, residual * (ALPHA / (1 + counts)).unsqueeze(1))
    return residual.square().sum() / 2, residual


def judge(name, outcome, truth, start):
    """Raises AssertionError where the outcome is not the reference's."""
    assert not outcome.others_moved, f"{name}: a row that no label names has changed"
    # A row's error comes from numbers of the size that it began with.
    floor = {"rows": float(start.abs().max())}
    for what in ("loss", "gradient", "rows"):
        actual, wanted = getattr(outcome, what), getattr(truth, what)
        if actual is not None:
            largest = max(float(wanted.abs().max()), floor.get(what, 0))
            error = float((actual.double() - wanted).abs().max()) / largest
            assert error <= TOLERANCE, f"{name}: {what} is off by {error:.1e} of its largest"


def validate(name, runner, workload, truth):
    """Runs each batch once and judges the outcome, which it returns."""
    runner.reset()
    runner.run(workload.case.batches)
    outcome = runner.outcome()
    judge(name, outcome, truth, workload.start)
    return outcome


def same_bits(one, other):
    """Whether two outcomes agree in every bit."""
    pairs = zip(one[:3], other[:3], strict=True)
    return all(a is None or torch.equal(a, b) for a, b in pairs)


def _check_by_oracle(features, index, before, residual, after):
    """Holds a step against the oracle, on all samples of the classes of the first few samples.

    Classes do not depend on each other: neither a residual nor a moved row.
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
