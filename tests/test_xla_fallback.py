"""Without the library for XLA everything else works, and XLA compiles plain TensorFlow ops."""

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
def test_without_the_library_xla_compiles_plain_ops(native_library, tmp_path, broken):
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


def test_without_any_library_there_is_one_warning(tmp_path):
    copy_package(tmp_path)
    result = run(tmp_path)
    assert result["info"]["native"] is False and result["info"]["xla"] == []
    assert len(result["warnings"]) == 1


@pytest.mark.native
def test_the_library_for_xla_names_its_devices(native_library):
    info = tcl.build_info()
    assert info["xla"] == (["CPU", "GPU"] if info["cuda"] else ["CPU"])


@pytest.fixture(scope="module", params=["90", None], ids=["cuda", "no cuda"])
def as_if_built(request, tmp_path_factory):
    """Whether the package was built for CUDA, and `supports_jit` with each kind of device."""
    directory = tmp_path_factory.mktemp("package")
    copy_as_if_built(directory, cuda=request.param and [request.param])
    out = run_program("supports_jit", "CPU", "GPU", "TPU", cwd=directory, paths=[directory])
    return request.param is not None, json.loads(out)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["CPU", "GPU", "TPU"])
def test_supports_jit_where_every_device_has_kernels(native_library, as_if_built, kind):
    cuda, supports_jit = as_if_built
    assert supports_jit[kind] is (kind == "CPU" or (kind == "GPU" and cuda))
