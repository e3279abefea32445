"""The built library links TensorFlow's framework, and nothing that only some machines have."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

import tf_center_loss_op as tcl

pytestmark = pytest.mark.native


def lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def needed(path):
    """Lines of readelf with the shared libraries that a file needs."""
    return [line for line in lines("readelf", "-d", path) if "(NEEDED)" in line]


def test_no_undefined_cuda_symbols(native_library):
    undefined = lines("nm", "-D", "--undefined-only", native_library)
    assert undefined
    assert [line for line in undefined if "cuda" in line.lower()] == []


def test_asks_for_the_framework_only(native_library):
    tensorflow = [line for line in needed(native_library) if "tensorflow" in line]
    assert len(tensorflow) == 1
    assert "libtensorflow_framework.so.2" in tensorflow[0]


def test_leaks_no_symbols_of_its_own(native_library):
    # Another op library in the process must not link to this one's functions.
    exported = lines("nm", "-D", "--defined-only", "-C", native_library)
    assert [line for line in exported if "center_loss" in line and " T " in line] == []


def test_kernel_module_knows_no_tensorflow(kernels):
    assert [line for line in needed(kernels.__file__) if "tensorflow" in line] == []
    undefined = lines("nm", "-D", "--undefined-only", "-C", kernels.__file__)
    assert [line for line in undefined if "tensorflow" in line or "absl" in line] == []


def test_build_info_of_a_working_library(native_library):
    info = tcl.build_info()
    minor = tf.__version__.rsplit(".", 1)[0]
    assert info["tf_running"].startswith(minor) and info["tf_built"].startswith(minor)


@pytest.mark.parametrize(
    "op", ["TclCenterLossStep", "TclCenterLoss", "TclUpdateCenters", "TclCenterLossBackward"]
)
def test_gpu_kernels_are_there_where_cuda_was_built(native_library, op):
    registered = get_registered_kernels_for_op(op).kernel

    def types(device):
        return {
            tuple((c.name, *c.allowed_values.list.type) for c in kernel.constraint)
            for kernel in registered
            if kernel.device_type == device
        }

    assert len(types("CPU")) == 8  # four types of features, two of labels
    assert types("GPU") == (types("CPU") if tcl.build_info()["cuda"] else set())


def test_the_record_of_the_build_has_every_library(native_library):
    package = Path(native_library).parent
    recorded = json.loads((package / "_build.json").read_text())["libraries"]
    files = {path.name: path.read_bytes() for path in package.glob("*.so")}
    assert set(recorded) == set(files) and len(files) == 3
    for name, content in files.items():
        hashed = hashlib.sha256(content).hexdigest()
        assert recorded[name] == {"size": len(content), "sha256": hashed}
