"""Without the library for XLA: everything else works, and XLA compiles pure TensorFlow instead."""

import json

import numpy as np
import pytest

import tf_center_loss_op as tcl
from child import run_program
from test_fallback import ARGUMENTS, EXPECTED, copy_as_if_built, copy_package


def run(directory):
    result = json.loads(run_program("call_under_xla", *ARGUMENTS, cwd=directory, paths=[directory]))
    assert result["loss"] == pytest.approx(EXPECTED.loss)
    assert np.allclose(result["centers"], EXPECTED.centers)
    return result


@pytest.mark.native
@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_library_for_xla(native_library, tmp_path, broken):
    copy = copy_package(tmp_path)
    library = copy / "libtf_center_loss_op.so"
    library.symlink_to(tcl.build_info()["library"])
    if broken:
        (copy / "libtf_center_loss_op_xla.so").write_bytes(b"not a library")
    result = run(tmp_path)
    assert result["info"]["native"] is True and result["info"]["xla"] == []
    assert result["supports_jit"] is False
    assert result["warnings"] == []
    assert "libtf_center_loss_op_xla.so" in result["error"] and "pip install" in result["error"]


def test_without_any_library(tmp_path):
    copy_package(tmp_path)
    result = run(tmp_path)
    assert result["info"]["native"] is False and result["info"]["xla"] == []
    assert len(result["warnings"]) == 1


@pytest.mark.native
def test_with_the_library_for_xla(native_library):
    info = tcl.build_info()
    assert info["xla"] == (["CPU", "GPU"] if info["cuda"] else ["CPU"])


@pytest.mark.native
@pytest.mark.parametrize("cuda", [["90"], None])
@pytest.mark.parametrize("device", ["CPU", "GPU", "TPU"])
def test_supports_jit_where_every_device_has_kernels(native_library, tmp_path, cuda, device):
    copy_as_if_built(tmp_path, cuda=cuda)
    out = run_program("supports_jit", device, cwd=tmp_path, paths=[tmp_path])
    expected = device == "CPU" or (device == "GPU" and cuda is not None)
    assert out == f"{expected}\n"
