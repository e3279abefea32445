"""The tests of the emulated kernels, with the GPU in the emulator's place."""

import pytest

import emulated
import test_cuda_emulated

# The module has error messages of its own, see test_gpu_arrays.py, and its whole workspace is zero.
# A table in a file would be 8 GB to copy to the GPU and back.
LEFT_OUT = {
    "test_what_a_workspace_is_too_small_for_is_refused",
    "test_a_launch_constant_out_of_range_is_refused",
    "test_one_launch_needs_only_the_first_bytes_zero",
    "test_more_numbers_than_32_bits_count",
}

globals().update(
    {
        name: test
        for name, test in vars(test_cuda_emulated).items()
        if name.startswith("test_") and name not in LEFT_OUT
    }
)


@pytest.fixture(autouse=True)
def in_the_emulators_place(monkeypatch, device):
    monkeypatch.setattr(emulated, "Emulator", lambda **schedule: device)
