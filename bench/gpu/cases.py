"""The cases that are measured on a GPU."""

import dataclasses

import numpy as np

from bench.cases import LABELS, Case, bytes_moved

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CENTER_BYTES = 4
# The smallest number of batches of a case. A CUDA graph has one launch per batch, and takes 1 µs
# more than the launches.
FEWEST = 12
SKEWED = ("power-law", "ten labels", "one label")


@dataclasses.dataclass(frozen=True)
class GpuCase(Case):
    """A case whose features may have 16 bits.

    Its `rotation` counts the bytes of features, gradients and rows.
    """

    dtype: str = "float32"

    @property
    def name(self):
        return super().name if self.dtype == "float32" else f"{super().name} {self.dtype}"

    @property
    def batches(self):
        # Skewed labels use few distinct rows and therefore need more batches.
        touched = ITEM_BYTES[self.dtype] + CENTER_BYTES
        if self.labels == "uniform":
            touched += CENTER_BYTES * min(1, self.classes / self.batch)
        return max(FEWEST, -(-self.rotation // int(self.batch * self.dim * touched)))

    def draw(self):
        """Returns labels [batches, B] int64, the same in every process."""
        rng = np.random.default_rng([self.batch, self.dim, self.classes])
        return LABELS[self.labels](rng, self.classes, (self.batches, self.batch))

    def bytes(self, labels):
        """Returns the bytes that a step must move."""
        return bytes_moved(labels, self.dim, ITEM_BYTES[self.dtype])


def cases(cache_bytes):
    """Returns all cases, the most important first; their rotation is twice the cache's size."""

    def case(batch, *rest, dim=512, classes=1_000_000, **more):
        return GpuCase(batch, dim, classes, *rest, **({"rotation": 2 * cache_bytes} | more))

    all_cases = [case(batch) for batch in (4096, 65536, 256)]
    # The tutorial's ten rows are always in cache, see bench.cases.
    all_cases += [case(64, dim=200, classes=10, rotation=2**22)]
    all_cases += [case(batch) for batch in (1024, 8192, 16384)]
    for batch in (4096, 65536, 256):
        all_cases += [case(batch, labels) for labels in SKEWED]
    for batch in (65536, 4096):
        all_cases += [case(batch, dtype=dtype) for dtype in ("float16", "bfloat16")]
    return all_cases


def tuned(cases):
    """Returns the cases for `--tune`: all sizes, and skewed labels at sizes of both forms."""
    return [
        case
        for case in cases
        if case.dtype == "float32" and (case.labels == "uniform" or case.batch <= 4096)
    ]


# Cases for the emulator in place of a GPU.
STAND_IN = [
    GpuCase(64, 200, 10, rotation=2**17),
    GpuCase(40, 12, 1000, rotation=2**14),
    GpuCase(40, 12, 1000, "one label", rotation=2**14),
    GpuCase(40, 12, 1000, rotation=2**14, dtype="float16"),
    GpuCase(40, 12, 1000, rotation=2**14, dtype="bfloat16"),
]
