"""`python -m bench.gpu` runs with the emulator in the GPU's place; its times mean nothing."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("no PyTorch, which bench.gpu needs", allow_module_level=True)

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import cases
from bench.gpu import compare, implementations, reference, tuning, workload
from bench.gpu.cases import GpuCase

ROOT = Path(__file__).resolve().parent.parent
CASE = GpuCase(40, 12, 1000, rotation=2**14)


def run(tmp_path, *arguments):
    """The results file of the program, and its output."""
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench.gpu", "--stand-in", "--rounds", "2", "--json", path]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in tmp_path.iterdir()} <= {"results.json", "results.png"}
    return json.loads(path.read_text()), done.stdout


def test_comparison(tmp_path):
    results, _ = run(tmp_path, "--cases", "one label", "float16")
    labels = [(case["labels"], case["dtype"]) for case in results["cases"]]
    assert labels == [("one label", "float32"), ("uniform", "float16"), ("uniform", "bfloat16")]
    for case in results["cases"]:
        assert {"kernel graph", "atomic graph", "copy"} <= case["implementations"].keys()
    assert [figure["what"] for figure in results["figures"]] == ["time / of bfloat16"]


def test_tune(tmp_path):
    results, shown = run(tmp_path, "--tune", "--cases", "40x12")
    assert [case["name"] for case in results["cases"]] == ["40×12×1k", "40×12×1k one label"]
    for case in results["cases"]:
        assert (
            case["default_us"] > 0
            and case["tried"]
            and case["setting"].keys() <= case["defaults"].keys()
        )
        assert case["name"] in shown


def test_phases(tmp_path):
    results, shown = run(tmp_path, "--phases", "--cases", "one label")
    for case in results["cases"]:
        assert case["phases"] and case["name"] in shown
    assert results["cases"] or "takes no times" in str(results["left_out"])


def test_what_there_is_no_time_for_is_noted(tmp_path):
    results, _ = run(tmp_path, "--minutes", "0", "--cases", "one label")
    assert results["cases"] == []
    assert results["left_out"] == {"40×12×1k one label": "the 0 minutes were over"}


@pytest.fixture
def table():
    return torch.zeros([CASE.classes, CASE.dim])


class Step:
    """A kernel that a test makes slow, wrong or impossible by its constants."""

    def __init__(self, batch, dim, dtype, *, tuning=None, phases=False):
        self.setting = {"wait_ns": 20, "hash_blocks": 2} | (tuning or {})
        if self.setting["hash_blocks"] == 4:
            raise ValueError("hash_blocks: expected at most 3")

    def __call__(self, features, labels, centers, loss, residual, **options):
        time.sleep(0.001 if self.setting["wait_ns"] == 50 else 0.004)
        counts = torch.bincount(labels)[labels]
        error = {1: 1e-6, 3: 1e-2}.get(self.setting["hash_blocks"], 0)
        residual[...] = features - centers[labels]
        loss[...] = residual.square().sum() / 2 * (1 + error)
        centers.index_add_(0, labels, residual * (options["alpha"] / (1 + counts))[:, None])

    def phases(self):
        return [("counted", 1.0, 2.0), ("done", 3.0, 5.0)]


class Kernels:
    CudaStep = Step

    @staticmethod
    def cuda_tuning():
        return {"wait_ns": 20, "hash_blocks": 2}


@pytest.fixture
def device():
    return workload.gpu.Device(Kernels, "cpu")


def test_tuned(device, table):
    found = tuning.tuned(CASE, table, device, workload.wall_seconds, lambda: False)
    assert found["setting"] == {"wait_ns": 50} and found["bits"] == "equal"
    assert found["best_us"] < found["default_us"] / 2
    tried = {one["setting"].get("hash_blocks"): one for one in found["tried"]}
    assert tried[1]["bits"] == "differ"  # and near enough
    assert "loss is off" in tried[3]["left_out"] and "expected at most 3" in tried[4]["left_out"]
    assert not table.any()


def test_phases_of_a_launch(device, table):
    found = tuning.phases(CASE, table, device)
    assert [list(point.values()) for point in found["phases"]] == [
        ["counted", 1, 2],
        ["done", 3, 5],
    ]


@pytest.mark.parametrize("labels", cases.LABELS)
def test_the_reference_is_the_oracle(device, table, labels):
    case = GpuCase(40, 12, 30_000, labels, rotation=2**14)
    made = workload.Workload(case, torch.zeros([case.classes, case.dim]), device)
    reference.expected(made)  # which checks itself
    wrong = made.start.double()
    loss, residual = reference.step(made.features[0], made.index[0], wrong)
    before, after = made.start.double()[made.index[0]], wrong[made.index[0]] * (1 + 1e-9)
    with pytest.raises(RuntimeError, match="rows is off"):
        reference._check_by_oracle(made.features[0], made.index[0], before, residual, after)


def test_a_wrong_implementation_is_not_timed(device, table):
    made = workload.Workload(CASE, table, device)
    truth = reference.expected(made)
    for bad in ("loss", "gradient", "rows", "others_moved"):
        runner = workload.Calls(
            made, implementations.pytorch(implementations.by_unique)(made), workload.wall_seconds
        )
        outcome = reference.validate("right", runner, made, truth)
        value = True if bad == "others_moved" else getattr(outcome, bad) * 1.001
        with pytest.raises(AssertionError, match="changed" if value is True else bad):
            reference.judge("wrong", outcome._replace(**{bad: value}), truth, made.start)


def test_copies_are_aligned(device, table, monkeypatch):
    made = workload.Workload(CASE, table, device)
    made.bytes += 3
    seen = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: seen.append((self, other)))
    copy = implementations.copied_bytes(made)
    for k in range(CASE.batches):
        copy(k)
    first = seen[0][1].data_ptr()
    for pair in seen:
        for buffer in pair:
            assert (buffer.data_ptr() - first) % implementations.ALIGNMENT == 0
            assert 0 <= 2 * len(buffer) - made.bytes < 2 * implementations.ALIGNMENT


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="no TensorFlow")
def test_steps_in_tensorflow(device, table):
    from bench.gpu import tensorflow_steps

    made = workload.Workload(CASE, table, device)
    tf, clocks = tensorflow_steps.load("/CPU:0"), {"busy": workload.wall_seconds}
    truth = reference.expected(made)
    found, left_out = tensorflow_steps.measured(tf, made, truth, "/CPU:0", clocks)
    assert not left_out, {key: compare.words(why) for key, why in left_out.items()}
    assert {"fused busy", "fused xla busy", "tutorial busy"} <= found.keys()
    for _, seconds in found.values():
        assert min(seconds) > 0
