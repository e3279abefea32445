"""A few small steps, for compute-sanitizer: scanned and hashed, a class of each size, all types.

python sanitized.py [planted]    with "planted", features that are shorter than they say
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch

import device as gpu
import problems
from cuda_cases import CLASS_SIZES, batch_of


def steps(device):
    for distinct, dim in ((20, 7), (600, 12)):
        for dtype in problems.DTYPES:
            problem = batch_of(CLASS_SIZES, dim, dtype=dtype, distinct=distinct)
            for atomic in (False, True):
                centers = problem.centers.copy()
                loss, *_ = device.center_loss_step(
                    problem.features, problem.labels, centers, atomic=atomic
                )
                assert np.isfinite(loss) and (centers != problem.centers).any()


def read_too_far(device):
    # One row with a declared size of 32 MB, which is beyond all other allocations.
    batch, dim = 2048, 4096
    row = torch.ones([1, dim], device="cuda")
    said = row.__cuda_array_interface__ | {"shape": (batch, dim)}
    labels = torch.zeros([batch], dtype=torch.int64, device="cuda")
    centers = torch.zeros([1, dim], device="cuda")
    features = SimpleNamespace(__cuda_array_interface__=said)
    device.workspace(batch, dim)(features, labels, centers)
    torch.cuda.synchronize()


if __name__ == "__main__":
    work = read_too_far if sys.argv[1:] == ["planted"] else steps
    work(gpu.Device(gpu.load_kernels()))
    print("steps done")
