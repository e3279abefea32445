"""Without a usable library: one warning that says why and what to do, and the same results."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import oracle
import tf_center_loss_op as tcl
from child import run_program

FEATURES = [[2.0, 4.0], [4.0, 8.0], [10.0, 16.0]]
LABELS = [0, 0, 1]
ARGUMENTS = json.dumps(FEATURES), json.dumps(LABELS)
EXPECTED = oracle.center_loss(FEATURES, LABELS, np.zeros([2, 2]))


def copy_package(directory, broken=False):
    """A copy of the package without its libraries, or with unusable ones."""
    package = Path(tcl.__file__).parent
    copy = directory / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    if broken:
        for library in package.rglob("*.so"):
            (copy / library.relative_to(package)).write_bytes(b"not a library")
    return copy


def run(directory, **options):
    result = json.loads(
        run_program("call_every_path", *ARGUMENTS, cwd=directory, paths=[directory], **options)
    )
    np.testing.assert_allclose(result["loss"], EXPECTED.loss, rtol=1e-6)
    np.testing.assert_allclose(result["centers"], EXPECTED.centers, rtol=1e-6)
    return result


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_library(tmp_path, broken):
    copy = copy_package(tmp_path, broken)
    result = run(tmp_path)
    assert Path(result["file"]).parent == copy
    assert result["info"]["native"] is False
    assert result["info"]["reason"]
    (warning,) = result["warnings"]
    assert result["info"]["reason"] in warning
    assert "pip install" in warning
    assert result["error"] and result["info"]["reason"] in result["error"]
    assert "pip install" in result["error"]


@pytest.mark.native
@pytest.mark.parametrize("means", ["graph", "native", "auto"])
def test_asked_for_by_the_environment(native_library, tmp_path, means):
    result = run(tmp_path, TF_CENTER_LOSS_IMPL=means)
    assert result["warnings"] == [] and result["error"] is None
    assert result["info"]["native"] is True
    # An op that TensorFlow does not know by itself.
    assert bool(result["own_ops"]) == (means != "graph")


def test_asked_for_by_the_environment_without_the_library(tmp_path):
    copy_package(tmp_path)
    result = run(tmp_path, TF_CENTER_LOSS_IMPL="graph")
    assert result["warnings"] == []
    assert result["error"]


def test_native_asked_for_by_the_environment_without_the_library(tmp_path):
    copy_package(tmp_path)
    done = run_program(
        "call_every_path",
        *ARGUMENTS,
        cwd=tmp_path,
        paths=[tmp_path],
        check=False,
        TF_CENTER_LOSS_IMPL="native",
    )
    assert done.returncode != 0
    assert "pip install" in done.stderr


def test_nonsense_in_the_environment(tmp_path):
    done = run_program(
        "call_every_path", *ARGUMENTS, cwd=tmp_path, check=False, TF_CENTER_LOSS_IMPL="fastest"
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for word in ("TF_CENTER_LOSS_IMPL", "fastest", "auto", "native", "graph"):
        assert word in last


@pytest.mark.native
@pytest.mark.parametrize("in_xla", [False, True])
def test_centers_on_a_device_that_the_library_was_not_built_for(
    native_library, monkeypatch, in_xla
):
    # Here no centers can lie on one: the choice alone is looked at.
    from tf_center_loss_op import _native

    cpu, gpu, tpu = (f"/job:localhost/task:0/device:{kind}:0" for kind in ("CPU", "GPU", "TPU"))
    with_cuda, without = _native._record() | {"cuda": ["90"]}, _native._record() | {"cuda": None}
    monkeypatch.setattr(_native, "in_xla", lambda: in_xla)
    for record, there, missing in ((with_cuda, [cpu, gpu, ""], [tpu]), (without, [cpu], [gpu])):
        monkeypatch.setattr(_native, "_record", lambda record=record: record)
        for device in there:
            assert _native.choose("auto", device) == "native"
        for device in missing:
            _native._warn_once.cache_clear()
            with pytest.warns(RuntimeWarning, match=f"the centers lie on {device}, and it was"):
                assert _native.choose("auto", device) == "graph"
            with pytest.raises(RuntimeError, match="'native' cannot run: the centers lie on"):
                _native.choose("native", device)
