"""What `python -m bench.gpu` makes of its times: the figures to reach, and the plot."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.gpu import report


def measured(batch, labels="uniform", how="CUDA graph", **microseconds):
    """A measurement of these times, `kernel_graph` for "kernel graph"."""
    return {
        "name": f"{batch} {labels}",
        "batch": batch,
        "dim": 512,
        "labels": labels,
        "dtype": "float32",
        "bytes": 16 * 512 * batch,
        "implementations": {
            key.replace("_", " "): {"what": key, "how": how, "seconds": [1e-6 * time] * 3}
            for key, time in microseconds.items()
        },
    }


CASES = [
    measured(256, kernel_graph=5, empty_launch=2.5, kernel=9, compiled_pairs=17),
    measured(256, "one label", kernel_graph=11),
    measured(4096, kernel_graph=20, compiled_table_graph=60, compiled_pairs_graph=41),
    measured(4096, "ten labels", kernel_graph=40),
    measured(16384, kernel_graph=100, compiled_table_graph=60),
    measured(
        65536, how="tf.while_loop", kernel_graph=200, tutorial_loop=95, fused_loop=15, empty_loop=5
    ),
]


def test_figures():
    found = {(f.what, f.where): (f.value, f.met) for f in report.figures(CASES, 2e12)}
    expected = {
        # 134,217,728 bytes in 100 µs at 2 TB/s; 536,870,912 in 200.
        ("% of the copy speed", "16384 uniform"): (67.1, False),
        ("% of the copy speed", "65536 uniform"): (134.2, True),
        ("µs above an empty launch", "256 uniform"): (2.5, False),
        ("pure TensorFlow / fused op, net", "65536 uniform"): (9.0, False),
        ("torch.compile / fused kernel, call", "256 uniform"): (17 / 9, False),
        ("torch.compile / fused kernel, graph", "4096 uniform"): (2.05, True),
        ("time / of uniform labels", "256 one label"): (2.2, False),
        ("time / of uniform labels", "4096 ten labels"): (2.0, True),
    }
    assert found.keys() == expected.keys()
    for key, (value, met) in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-3), met), key


def test_plot(tmp_path):
    conditions = {"gpu": "a GPU", "copy_gb_per_s": 2000}
    report.draw({"conditions": conditions, "cases": CASES}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
