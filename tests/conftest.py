"""Fixtures: every test that takes `impl` runs on the native op and on pure TensorFlow."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

from implementations import GRAPH_ONLY, IMPLEMENTATIONS
from long_files import LONG_FILES


def pytest_configure(config):
    config.addinivalue_line("markers", "native: needs the compiled library or kernel module")


def pytest_report_header(config):
    return f"center loss implementations: {', '.join(IMPLEMENTATIONS)}"


def _place(item):
    name = item.path.name
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)
    if GRAPH_ONLY:
        native = [item for item in items if item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=native)
        items[:] = [item for item in items if item not in native]


@pytest.fixture(scope="session")
def native_library():
    """The built library's path; fails where the library cannot be used."""
    import tf_center_loss_op as tcl

    info = tcl.build_info()
    if not info["native"]:
        pytest.fail(
            f"the native library is not usable: {info['reason']} "
            "(TF_CENTER_LOSS_TEST_GRAPH_ONLY=1 tests without it)"
        )
    return info["library"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    """Each implementation in turn."""
    if request.param == "native":
        request.getfixturevalue("native_library")
    return request.param


@pytest.fixture
def implementations():
    """All implementations at once, for tests that compare them."""
    return IMPLEMENTATIONS


@pytest.fixture
def kernels(native_library):
    """The bare kernels on NumPy arrays."""
    from tf_center_loss_op import _kernels

    return _kernels


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every run and in any order of the tests."""
    tf.random.set_seed(0)
    np.random.seed(0)
