"""`python -m bench.gpu` computes figures, the plot and launch constants from measured times.

Without PyTorch; tests/test_gpu_bench.py runs the program.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.gpu import cases, report, tune


def measured(batch, labels="uniform", dtype="float32", **microseconds):
    """A measurement of these times, `kernel_graph` for "kernel graph"."""
    return {
        "name": f"{batch} {labels}" if dtype == "float32" else f"{batch} {labels} {dtype}",
        "batch": batch,
        "dim": 512,
        "labels": labels,
        "dtype": dtype,
        "bytes": 16 * 512 * batch,
        "implementations": {
            key.replace("_", " "): {"what": key, "how": "CUDA graph", "seconds": [1e-6 * time] * 3}
            for key, time in microseconds.items()
        },
    }


CASES = [
    measured(256, kernel_graph=5, kernel=9, compiled_pairs=17, compiled_table_graph=8),
    measured(256, "one label", kernel_graph=8),
    measured(4096, kernel_graph=14, atomic_graph=12, copy=7),
    measured(4096, "ten labels", kernel_graph=24, atomic_graph=18),
    measured(4096, dtype="float16", kernel_graph=13),
    measured(4096, dtype="bfloat16", kernel_graph=12.5),
    measured(65536, kernel_graph=160, tutorial_busy=900, fused_busy=150),
    measured(65536, dtype="float16", kernel_graph=300),
]


def test_figures():
    found = {(f.what, f.where): (f.value, f.met, f.beside) for f in report.figures(CASES)}
    expected = {
        ("µs a step", "256 uniform"): (5, False, "torch.compile, best: 8.0"),
        ("µs a step", "4096 uniform"): (14, True, "50 % of a copy's speed"),
        ("µs a step", "65536 uniform"): (160, False, ""),
        ("time / of uniform labels", "256 one label"): (1.6, True, ""),
        ("time / of uniform labels", "4096 ten labels"): (24 / 14, False, ""),
        ("time / of bfloat16", "4096 uniform float16"): (1.04, True, ""),
        ("tutorial's ops / fused op, the device's time", "65536 uniform"): (6, False, ""),
    }
    assert found.keys() == expected.keys()
    for key, (value, met, beside) in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-3), met, beside), key


def test_rounds_of_their_own_are_compared_by_their_medians():
    few = measured(256, tutorial_busy=100, fused_busy=10)
    few["implementations"]["fused busy"]["seconds"] = [1e-5]
    figures = {figure.what: figure.value for figure in report.figures([few])}
    assert figures["tutorial's ops / fused op, the device's time"] == pytest.approx(10)


@pytest.mark.parametrize(
    "kept",
    [
        lambda m: True,
        lambda m: m["dtype"] == "float16",
        lambda m: m["dtype"] == "float32" and m["labels"] == "uniform",
        lambda m: m["labels"] == "one label",
        lambda m: False,
    ],
    ids=["all", "no uniform one", "uniform only", "one", "none"],
)
def test_plot(kept, tmp_path):
    conditions = {"gpu": "a GPU", "copy_gb_per_s": 2000}
    results = {"conditions": conditions, "cases": list(filter(kept, CASES))}
    report.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_results_are_drawn_from_a_file(tmp_path, monkeypatch):
    from bench.gpu.__main__ import main

    conditions = {"gpu": "a GPU", "copy_gb_per_s": 2000}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"conditions": conditions, "cases": CASES}))
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--draw", str(path)])
    assert not main()
    assert path.with_suffix(".png").exists()


def test_busy_time_counts_what_runs_side_by_side_once():
    assert report.covered([]) == 0
    assert report.covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5


@pytest.mark.parametrize("case", cases.cases(2**26), ids=lambda case: case.name)
def test_batches_go_round_through_twice_the_cache(case):
    size = cases.ITEM_BYTES[case.dtype] + cases.CENTER_BYTES
    touched = case.batch * case.dim * size
    if case.labels == "uniform":
        touched += min(case.batch, case.classes) * case.dim * cases.CENTER_BYTES
    assert case.batches >= cases.FEWEST and case.batches * touched >= case.rotation
    # Nor much more, which would take time.
    assert case.batches == cases.FEWEST or (case.batches - 2) * touched < case.rotation


def test_the_cases_that_matter_most_come_first():
    names = [case.name for case in cases.cases(2**26)]
    assert len(set(names)) == len(names) == 20
    assert names[:2] == ["4096×512×1M", "65536×512×1M"]


DEFAULTS = {"scan_batch": 2048, "wait_ns": 20, "hash_blocks": 2, "new": 7}


class Times:
    """Times of settings: `seconds(setting with the defaults)`, None for one that is refused."""

    def __init__(self, seconds):
        self._seconds, self.asked = seconds, []

    def __call__(self, settings):
        assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == len(settings)
        self.asked += settings
        times = [self._seconds(DEFAULTS | setting) for setting in settings]
        return [None if time is None else np.full(3, float(time)) for time in times]


def test_the_search_takes_one_constant_after_the_other():
    def seconds(s):
        return None if s["wait_ns"] == 200 else abs(s["wait_ns"] - 100) + abs(s["hash_blocks"] - 4)

    times = Times(lambda s: None if seconds(s) is None else 10 + seconds(s))
    assert tune.search(65536, DEFAULTS, times) == {"wait_ns": 100, "hash_blocks": 4}
    # Not those that the module lacks, nor those that the search does not know.
    assert {name for setting in times.asked for name in setting} == {"wait_ns", "hash_blocks"}


def test_a_gain_within_the_noise_leaves_the_defaults():
    assert tune.search(65536, DEFAULTS, Times(lambda s: 10 - s["wait_ns"] / 2500)) == {}


@pytest.mark.parametrize("batch, value", [(1024, 1023), (4096, 4096)])
def test_both_kernels_are_tried(batch, value):
    def seconds(s):
        default = (batch <= s["scan_batch"]) == (batch <= DEFAULTS["scan_batch"])
        return 10 if default else 12 - 3 * (s["hash_blocks"] == 1)

    found = tune.search(batch, DEFAULTS, Times(seconds))
    assert found == {"scan_batch": value, "hash_blocks": 1}


def test_a_kernel_that_is_refused_is_left_out():
    refused = Times(lambda s: None if s["scan_batch"] != 2048 else 10)
    assert tune.search(1024, DEFAULTS, refused) == {}


def test_the_search_ends_when_the_time_is_over():
    times = Times(lambda s: s["wait_ns"])
    assert tune.search(1024, {"wait_ns": 20}, times, over=lambda: True) == {}
    assert not times.asked
