"""Fixtures of the tests on a GPU.

pytest tests/gpu --confcutdir=tests/gpu runs them without tests/conftest.py, which needs TensorFlow.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

# The helpers of tests/.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import device as gpu


def pytest_addoption(parser):
    parser.addoption(
        "--stand-in",
        action="store_true",
        help="the emulator in the GPU's place, to check these tests themselves",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "native: needs the compiled library or kernel module")
    if config.getoption("--stand-in", False) and importlib.util.find_spec("tensorflow"):
        import stand_in_xla

        stand_in_xla.take_the_place_of_a_gpu()


def pytest_report_header(config):
    return f"GPU: {gpu.why_not() or gpu.module_path()}"


@pytest.fixture(scope="session")
def on_gpu():
    """Skips where there is no GPU."""
    if reason := gpu.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kernels(on_gpu):
    """The kernel module."""
    return gpu.load_kernels()


@pytest.fixture(scope="session")
def device(request):
    """The kernels on NumPy arrays."""
    if request.config.getoption("--stand-in", False):
        import stand_in

        return gpu.Device(stand_in, "cpu")
    return gpu.Device(request.getfixturevalue("kernels"))
