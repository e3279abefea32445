"""`pytest bench` runs the quick cases with pytest-benchmark; `python -m bench` runs all cases."""

import pytest

from bench.cases import CASES
from bench.implementations import IMPLEMENTATIONS
from bench.together import prepare
from bench.workload import Tables

STEPS = 20


@pytest.fixture(scope="module")
def tables():
    return Tables()


@pytest.fixture(scope="module", params=CASES[:2], ids=lambda case: case.name)
def runners(request, tables):
    """Every implementation on one case, validated against the oracle."""
    case = request.param
    workload, runners = prepare(case, tables.of([case])[case], IMPLEMENTATIONS)
    yield case, runners
    workload.clear()


@pytest.mark.parametrize("key", IMPLEMENTATIONS)
def test_steps(benchmark, runners, key):
    """Runs 20 steps, each on another batch."""
    case, runners = runners
    benchmark.group = f"{case.name}, {STEPS} steps"
    benchmark.pedantic(runners[key].run, args=(STEPS,), rounds=20, warmup_rounds=2)
