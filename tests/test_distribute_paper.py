"""The guide's table of 100 million labels is the command's output, and agrees with hand counts."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench_distribute(monkeypatch):
    """The command's module, which is not part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import distribute

    return distribute


def test_the_guide_holds_what_the_command_prints():
    command = [sys.executable, "-m", "bench.distribute", "--paper"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) > 5
    assert done.stdout.strip() in (ROOT / "docs" / "distribution.md").read_text()


def test_the_estimate_agrees_with_a_count_by_hand(bench_distribute):
    # Two GPUs in one machine, 10 labels x 4, 3 samples each, 2-byte features; links 1 GB/s.
    options = Namespace(
        classes=10,
        dim=4,
        gpus=[2],
        batch=3,
        feature_bytes=2,
        gpus_per_machine=2,
        link_inside=1.0,
        link_outside=0.5,
        memory=1.0,
        hop_us=2.0,
        backbone_ms=1.0,
    )
    (row,) = bench_distribute.paper(options)
    assert row["table a GPU, GB"] == 80e-9  # 10 * 4 * 4 / 2 bytes
    assert row["gathered, MB"] == 48e-6  # to one other: 3 rows of 4 * 2 + 8
    assert row["residuals back, MB"] == 96e-6  # 2 * 1/2 of 6 rows of 16
    assert row["network, ms"] == pytest.approx((48 + 96) * 1e-6)
    # 6 rows read as features, 8, written and copied as residuals, 2 * 16; 3 centers, 2 * 16.
    assert row["memory, ms"] == pytest.approx((6 * (8 + 32) + 3 * 32) * 1e-6)
    assert row["hops, ms"] == pytest.approx(3 * 2e-3)


def test_the_guide_shows_what_was_measured(bench_distribute):
    import json

    results = json.loads(bench_distribute.RESULTS.read_text())
    table = bench_distribute.markdown(bench_distribute.measured(results["cases"]))
    assert table in (ROOT / "docs" / "distribution.md").read_text()
