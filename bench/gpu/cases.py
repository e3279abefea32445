"""What is measured on a GPU."""

import dataclasses

import ml_dtypes
import numpy as np

from bench.cases import Case, bytes_moved

TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class GpuCase(Case):
    """A case whose features may have 16 bits."""

    dtype: str = "float32"

    @property
    def name(self):
        return super().name if self.dtype == "float32" else f"{super().name} {self.dtype}"

    @property
    def batches(self):
        return max(2, -(-self.rotation // (self.batch * self.dim * 4)))

    def make(self):
        inputs = super().make()
        return inputs._replace(features=inputs.features.astype(TYPES[self.dtype]))

    def bytes(self, labels):
        """What a step must move."""
        return bytes_moved(labels, self.dim, np.dtype(TYPES[self.dtype]).itemsize)


def cases(cache_bytes):
    """All cases, features going round through twice the cache; what matters most comes first."""

    def case(batch, *rest, dim=512, classes=1_000_000, **more):
        return GpuCase(batch, dim, classes, *rest, **({"rotation": 2 * cache_bytes} | more))

    # The tutorial's ten rows are always in cache, see bench.cases.
    all_cases = [case(64, dim=200, classes=10, rotation=2**22)]
    all_cases += [case(batch) for batch in (256, 1024, 4096, 8192, 16384, 65536)]
    for batch in (4096, 65536, 256):
        all_cases += [case(batch, labels) for labels in ("power-law", "ten labels", "one label")]
    for batch in (4096, 65536):
        all_cases += [case(batch, dtype=dtype) for dtype in ("float16", "bfloat16")]
    return all_cases


# With the emulator in the GPU's place.
STAND_IN = [
    GpuCase(64, 200, 10, rotation=2**17),
    GpuCase(40, 12, 1000, "power-law", rotation=2**13),
    GpuCase(40, 12, 1000, "one label", rotation=2**13),
    GpuCase(40, 12, 1000, rotation=2**13, dtype="bfloat16"),
]
