"""The kernel module accepts arrays of every library, and refuses wrong ones."""

import importlib.util

import numpy as np
import pytest

from device import to_host


def tensors(batch=2, dim=4, classes=3):
    import torch

    return dict(
        features=torch.ones([batch, dim], device="cuda"),
        labels=torch.arange(batch, device="cuda"),
        centers=torch.zeros([classes, dim], device="cuda"),
    )


class Interface:
    """An array of a library without DLPack."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def as_cupy(tensor):
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("no CuPy")
    import cupy

    return cupy.from_dlpack(tensor)


@pytest.mark.parametrize("wrap", [Interface, as_cupy], ids=["interface", "CuPy"])
def test_arrays_of_any_library(kernels, wrap):
    import torch

    given = tensors()
    loss = torch.zeros([], device="cuda")
    arrays = [wrap(tensor) for tensor in (*given.values(), loss)]
    torch.cuda.synchronize()
    kernels.CudaStep(2, 4)(*arrays, rule="mean", reduction="sum")
    torch.cuda.synchronize()
    assert loss.item() == 4
    np.testing.assert_array_equal(to_host(given["centers"]), np.repeat([[0.5], [0.5], [0]], 4, 1))


WRONG = {
    "labels of a float type": (dict(labels=lambda t: t.float()), "labels: expected dtype int32"),
    "too few labels": (dict(labels=lambda t: t[:1]), r"labels: expected shape \[2\], got \[1\]"),
    "columns": (dict(centers=lambda t: t[:, :3].contiguous()), r"centers: expected shape \[3, 4\]"),
    "centers of 64 bits": (dict(centers=lambda t: t.double()), "centers: expected dtype float32"),
    "features of 64 bits": (dict(features=lambda t: t.double()), "features: float64 needs"),
    "whole numbers": (dict(features=lambda t: t.int()), "features: expected dtype float32"),
    "rank": (dict(features=lambda t: t[0]), r"features: expected shape \[B, D\], got \[4\]"),
    "a view": (dict(features=lambda t: t.t().contiguous().t()), "features: expected a C-contig"),
    "host memory": (dict(features=lambda t: t.cpu()), "features: expected an array in the memory"),
    "NumPy": (dict(features=lambda t: t.cpu().numpy()), "features: expected an array in the mem"),
    "no array": (dict(features=lambda t: [1.0]), "features: expected an array with DLPack"),
    "larger batch": (
        dict(features=lambda t: t.repeat(2, 1), labels=lambda t: t.repeat(2)),
        r"features: expected at most shape \[2, 4\], got \[4, 4\]",
    ),
    "rule": (dict(rule=lambda t: "papr"), "rule: unknown rule 'papr'"),
    "reduction": (dict(reduction=lambda t: "avg"), "reduction: unknown reduction 'avg'"),
    "alpha": (dict(alpha=lambda t: -1.0), "alpha: expected a finite number >= 0, got -1"),
    "loss": (dict(loss=lambda t: tensors()["labels"]), "loss: expected dtype float32"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_errors_write_nothing(kernels, changes, message):
    given = tensors()
    centers = given["centers"]
    for name, change in changes.items():
        given[name] = change(given.get(name))
    with pytest.raises(ValueError, match=message):
        kernels.CudaStep(2, 4)(**given)
    assert not centers.any()


@pytest.mark.parametrize("wrong", [(-1, 4), (2, 0), (2, 4, "float16")], ids=str)
def test_sizes_of_no_workspace(kernels, wrong):
    with pytest.raises(ValueError, match="expected"):
        kernels.CudaStep(*wrong)


@pytest.mark.parametrize(
    "tuning, message",
    [
        (dict(hash_threads=512), "tuning: expected hash_threads from 64 to 256, got 512"),
        (dict(overlap=-1), "tuning: expected overlap from 0 to 1, got -1"),
        (dict(lookahead=2), "tuning: unknown constant 'lookahead'"),
    ],
    ids=str,
)
def test_launch_constants_out_of_range(kernels, tuning, message):
    with pytest.raises(ValueError, match=message):
        kernels.CudaStep(2, 4, tuning=tuning)


@pytest.mark.parametrize("repeats", [1, 1024], ids=["scanned", "hashed"])
def test_more_numbers_than_32_bits_count(kernels, repeats):
    # C * D > 2^31, and byte offsets beyond 2^33.
    import torch

    rows, dim = 2**22 + 5, 513
    if torch.cuda.mem_get_info()[0] < 1.1 * rows * dim * 4:
        pytest.skip("less than 9.5 GB free on the GPU")
    centers = torch.zeros([rows, dim], device="cuda")
    labels = torch.tensor([rows - 1, 0, rows // 2, rows - 1], device="cuda").repeat(repeats)
    features = torch.full([len(labels), dim], 3.0, device="cuda")
    kernels.CudaStep(len(labels), dim)(features, labels, centers, rule="mean", alpha=1.0)
    moved = torch.zeros([rows], dtype=torch.bool, device="cuda")
    moved[labels] = True
    assert (centers[labels] == 3).all()
    assert torch.equal(centers.any(1), moved)
