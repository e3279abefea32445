"""A step is one launch, does not wait for the device, runs in CUDA graphs and repeats its bits."""

import collections
import json

import numpy as np
import pytest

import problems
from cuda_cases import CLASS_SIZES, TWO_LEVELS, batch_of
from device import to_host

OPTIONS = dict(rule="paper", alpha=0.3, reduction="mean")
BATCHES = {"scanned": 256, "hashed": 4096}


class Arrays:
    """A problem's arrays on the GPU, and those that a step writes."""

    def __init__(self, device, problem, atomic=False):
        batch, dim = problem.features.shape
        dtype = problem.centers.dtype
        self.device = device
        self.step = device.workspace(batch, dim, dtype, atomic)
        self.inputs = [
            device.tensor(a) for a in (problem.features, problem.labels, problem.centers)
        ]
        self.outputs = [device.unwritten(shape, dtype) for shape in ([], [batch, dim], [batch])]

    def launch(self):
        self.step(*self.inputs, *self.outputs, stream=self.device.stream, **OPTIONS)

    def set(self, problem):
        new = (problem.features, problem.labels, problem.centers)
        for tensor, array in zip(self.inputs, new, strict=True):
            tensor.copy_(self.device.tensor(array))

    def bits(self):
        return b"".join(to_host(tensor).tobytes() for tensor in (*self.outputs, self.inputs[2]))


def power_law(batch, seed, dtype="float32"):
    shape = problems.Shape((batch,), 132, 5000, "power-law", "")
    return problems.make(shape, dtype, seed=seed)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_captured_graph_replays_the_step(kernels, device, batch):
    import torch

    arrays = Arrays(device, power_law(batch, 0))
    arrays.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arrays.launch()
    for seed in range(1, 6):
        problem = power_law(batch, seed)
        directly = Arrays(device, problem)
        directly.launch()
        arrays.set(problem)
        graph.replay()
        torch.cuda.synchronize()
        assert arrays.bits() == directly.bits()
    # The centers move: three replays are three consecutive steps.
    for _ in range(3):
        graph.replay()
        directly.launch()
    assert arrays.bits() == directly.bits()


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize(
    "sizes, distinct",
    [(CLASS_SIZES, 100), ([*CLASS_SIZES, TWO_LEVELS], 1500)],
    ids=["scanned", "hashed"],
)
def test_the_same_bits_whatever_else_runs(kernels, device, sizes, distinct, dtype):
    import torch

    problem = batch_of(sizes, 516, dtype=dtype, distinct=distinct)
    arrays, other = Arrays(device, problem), torch.cuda.Stream()
    busy = torch.ones([2048, 2048], device="cuda")
    seen = set()
    for repeat in range(40):
        arrays.set(problem)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            for _ in range(repeat % 4):
                busy.mm(busy)
        arrays.launch()
        seen.add(arrays.bits())
    assert len(seen) == 1


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_step_is_one_launch(kernels, device, batch, atomic, tmp_path):
    import torch

    arrays, steps = Arrays(device, power_law(batch, 0), atomic), 7
    features, labels, centers = arrays.inputs

    def by_hand():
        residual = features - centers[labels]
        return centers.index_add_(0, labels, residual * 0.5), (residual * residual).sum()

    counted = {}
    for what, work in (("step", arrays.launch), ("by hand", by_hand)):
        work()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("steps"):
                for _ in range(steps):
                    work()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        counted[what] = _count(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    if not counted["by hand"]["kernel"]:
        pytest.skip("the profiler records no kernels here")
    assert counted["by hand"]["kernel"] > steps
    calls = counted["step"]
    assert (calls["kernel"], calls["gpu_memcpy"], calls["gpu_memset"]) == (steps, 0, 0)
    assert not [call for call in calls if "Synchronize" in call or "Memcpy" in call]


def _count(events):
    """Counts of operations on the device, and of runtime calls while the steps were launched."""
    given = next(e for e in events if e.get("name") == "steps" and e["cat"] == "user_annotation")
    counts = collections.Counter()
    for event in events:
        kind = event.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            counts[kind] += 1
        elif kind in ("cuda_runtime", "cuda_driver"):
            if given["ts"] <= event["ts"] <= given["ts"] + given["dur"]:
                counts[event["name"]] += 1
    return counts


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_launch_does_not_wait(kernels, device, batch):
    import torch

    arrays = Arrays(device, power_law(batch, 0))
    arrays.launch()
    torch.cuda.synchronize()
    stream, before = torch.cuda.Stream(), to_host(arrays.inputs[2])
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)  # cycles: about half a second
        arrays.launch()
        assert not stream.query(), "the device was through when the launch returned"
    stream.synchronize()
    assert not np.array_equal(to_host(arrays.inputs[2]), before)
