"""Implementations of a step on a GPU: `build(workload)` returns `step(k)` -> (loss, gradient).

One step computes, for batch k, the loss (sum form), its gradient with respect to the features with
upstream gradient 1 in the centers' type, and the step of the centers by the paper's rule.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.cases import ALPHA
from bench.gpu.keys import ATOMIC, COMPILED, EMPTY, KERNEL
from bench.gpu.workload import Calls, Graph, LeftOut

ALIGNMENT = 256  # bytes


def fused(**options):
    """Builds a step with one launch of the kernel in cuda/; `options` go to `Device.workspace`."""

    def build(workload):
        case, device = workload.case, workload.device
        return launches(workload, device.workspace(case.batch, case.dim, **options))

    return build


def launches(workload, step):
    """Returns a function that launches `step`, a CudaStep, on a batch."""
    losses, gradients = workload.outputs()

    def run(k):
        step(
            workload.features[k],
            workload.labels[k],
            workload.table,
            losses[k],
            gradients[k],
            alpha=ALPHA,
            reduction="sum",
            stream=workload.device.stream,
        )
        return losses[k], gradients[k]

    return run


@torch.no_grad()
def by_hand(features, labels, centers, counts_of):
    """Computes the step in PyTorch, op by op."""
    residual = features.to(centers.dtype) - centers.index_select(0, labels)
    loss = residual.square().sum() / 2
    scale = ALPHA / (1 + counts_of(labels))
    centers.index_add_(0, labels, residual * scale.unsqueeze(1))
    return loss, residual


def by_unique(workload):
    """Counts labels by torch.unique, the usual way; the host waits for the number of labels."""

    def counts_of(labels):
        _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        return counts[index]

    return counts_of


def by_table(workload):
    """Counts labels in a zeroed array of one number per class, kept between steps; no wait."""
    table = torch.zeros([workload.case.classes], device=workload.device.place)
    ones = torch.ones([workload.case.batch], device=workload.device.place)

    def counts_of(labels):
        table.index_add_(0, labels, ones)
        counts = table.index_select(0, labels)
        table.index_fill_(0, labels, 0)
        return counts

    return counts_of


def by_pairs(workload):
    """Counts labels by comparing all pairs."""
    if workload.case.batch > 4096:
        raise LeftOut(f"expected at most 4096² comparisons, got {workload.case.batch}²")
    return lambda labels: (labels.unsqueeze(1) == labels).sum(1)


def pytorch(counting, *, compiled=False):
    """Builds the hand-written PyTorch step, or the program that torch.compile makes of it."""

    def build(workload):
        function, counts_of = _compiled(workload, counting) if compiled else (by_hand, None)
        counts_of = counts_of or counting(workload)

        def step(k):
            return function(workload.features[k], workload.labels[k], workload.table, counts_of)

        return step

    return build


def _compiled(workload, counting):
    """Returns the program of torch.compile and its counting function, once for each case."""
    if not workload.compiled:
        # torch.compile compiles a function for a few shapes only, and then stops without a message.
        torch.compiler.reset()
    if counting not in workload.compiled:
        counts_of = counting(workload)
        workload.compiled[counting] = torch.compile(by_hand, dynamic=False), counts_of
    return workload.compiled[counting]


def cupy(workload):
    """Computes the step in CuPy, kernel by kernel."""
    if workload.device.place != "cuda":
        raise LeftOut("no GPU")
    try:
        import cupy
    except ImportError as error:
        raise LeftOut("no CuPy") from error
    features, labels = (
        [cupy.from_dlpack(tensor) for tensor in tensors]
        for tensors in (workload.features, workload.labels)
    )
    centers = cupy.from_dlpack(workload.table)
    stream = cupy.cuda.ExternalStream(workload.device.stream)

    def step(k):
        with stream:
            residual = features[k] - centers[labels[k]]
            loss = cupy.square(residual).sum() / 2
            _, index, counts = cupy.unique(labels[k], return_inverse=True, return_counts=True)
            scale = cupy.float32(ALPHA) / (1 + counts[index]).astype(cupy.float32)
            cupy.add.at(centers, labels[k], residual * scale[:, None])
        return loss, residual

    return step


def copied_bytes(workload):
    """Copies as many bytes as a step must move, from buffer to buffer."""
    # A multiple of 256 bytes aligns every buffer; the device copies unaligned buffers more slowly.
    size = math.ceil(workload.bytes / 2 / ALIGNMENT) * ALIGNMENT
    shape = [workload.case.batches, 2, size]
    buffers = torch.zeros(shape, dtype=torch.uint8, device=workload.device.place).unbind()

    def step(k):
        buffers[k][1].copy_(buffers[k][0])
        return None, None

    return step


def empty(workload):
    """Launches a kernel that does nothing."""
    if workload.device.place != "cuda":
        raise LeftOut("no GPU")

    def step(k):
        torch.cuda._sleep(0)
        return None, None

    return step


class Implementation(NamedTuple):
    """An implementation, including the way it is called."""

    what: str
    runner: type  # Calls or Graph
    build: Callable
    computes: bool = True  # whether the oracle can validate it
    always: bool = False  # whether it also runs on skewed labels and 16-bit features

    @property
    def how(self):
        return {Calls: "call", Graph: "CUDA graph"}[self.runner]


COUNT_ARRAY = "hand-written PyTorch, count array"
IMPLEMENTATIONS = {
    KERNEL: Implementation("fused kernel", Graph, fused(), always=True),
    "kernel": Implementation("fused kernel", Calls, fused()),
    ATOMIC: Implementation("fused kernel, atomics", Graph, fused(atomic=True), always=True),
    "unique": Implementation("hand-written PyTorch", Calls, pytorch(by_unique)),
    "table": Implementation(COUNT_ARRAY, Calls, pytorch(by_table)),
    "table graph": Implementation(COUNT_ARRAY, Graph, pytorch(by_table), always=True),
}
variants = ((by_table, "count array"), (by_pairs, "all-pairs counts"))
for key, (counting, name) in zip(COMPILED, variants, strict=True):
    what = f"torch.compile, {name}"
    build = pytorch(counting, compiled=True)
    IMPLEMENTATIONS[key] = Implementation(what, Calls, build)
    IMPLEMENTATIONS[f"{key} graph"] = Implementation(what, Graph, build)
IMPLEMENTATIONS |= {
    "cupy": Implementation("CuPy", Calls, cupy),
    "copy": Implementation("copy of the same bytes", Graph, copied_bytes, False, True),
    EMPTY: Implementation("empty launch", Graph, empty, False, True),
    "empty call": Implementation("empty launch", Calls, empty, False),
}
