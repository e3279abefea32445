"""Without a usable library: one warning that says why and what to do, and the same results."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import oracle
import tf_center_loss_op as tcl
from child import run_program
from tf_center_loss_op._core import native

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


def copy_as_if_built(directory, **record):
    """A copy of the package whose build recorded something else."""
    copy = copy_package(directory)
    package = Path(tcl.__file__).parent
    for library in package.glob("lib*.so"):
        (copy / library.name).symlink_to(library)
    changed = json.loads((package / "_build.json").read_text()) | record
    (copy / "_build.json").write_text(json.dumps(changed))


def run(directory, **options):
    result = json.loads(
        run_program("call_every_path", *ARGUMENTS, cwd=directory, paths=[directory], **options)
    )
    np.testing.assert_allclose(result["loss"], EXPECTED.loss, rtol=1e-6)
    np.testing.assert_allclose(result["centers"], EXPECTED.centers, rtol=1e-6)
    return result


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_library_one_warning_says_why(tmp_path, broken):
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
def test_the_environment_chooses_the_implementation(native_library, tmp_path, means):
    result = run(tmp_path, TF_CENTER_LOSS_IMPL=means)
    assert result["warnings"] == [] and result["error"] is None
    assert result["info"]["native"] is True
    # Ops that are not TensorFlow's.
    assert bool(result["own_ops"]) == (means != "graph")


def wrong_file(package, how):
    """A file that is not the op library, though the loader may take it."""
    if how == "half":
        whole = (package / "libtf_center_loss_op.so").read_bytes()
        return whole[: len(whole) // 2]
    if how == "another library":  # It loads, and aborts in XLA, because its ops are not there.
        return (package / "libtf_center_loss_op_xla.so").read_bytes()
    changed = bytearray((package / "libtf_center_loss_op.so").read_bytes())
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


@pytest.mark.native
@pytest.mark.parametrize(
    "how, words",
    [
        ("half", "bytes, [0-9]+ were built"),
        ("another library", "bytes, [0-9]+ were built"),
        ("one bit", "is not the file that was built"),
    ],
)
def test_a_library_that_was_not_built_is_not_loaded(native_library, tmp_path, how, words):
    copy, package = copy_package(tmp_path), Path(tcl.__file__).parent
    (copy / "libtf_center_loss_op.so").write_bytes(wrong_file(package, how))
    info = run(tmp_path)["info"]
    assert info["native"] is False and info["xla"] == []
    assert re.search(rf"libtf_center_loss_op\.so.* {words}", info["reason"])


LIBRARIES = {"libtf_center_loss_op.so": {"size": 3, "sha256": "0"}}
RECORDS = dict(
    missing=None,
    cut=b'{"tensorflow": "2.2',
    bytes=b"\xff\xfe",
    deep=b"[" * 100_000,
    null=b"null",
    list=b"[]",
    text=b'"2.21.0"',
    number=b"2.21",
    empty=b"{}",
    version=json.dumps(dict(tensorflow=2.21, libraries=LIBRARIES)).encode(),
    cuda=json.dumps(dict(tensorflow="2.21.0", cuda=90, libraries=LIBRARIES)).encode(),
    architectures=json.dumps(dict(cuda=[90], libraries=LIBRARIES)).encode(),
    reason=json.dumps(dict(reason=["no"], libraries=LIBRARIES)).encode(),
    libraries=json.dumps(dict(tensorflow="2.21.0", libraries=["libtf"])).encode(),
    size=json.dumps(dict(libraries={"a.so": {"size": "3", "sha256": "0"}})).encode(),
    hash=json.dumps(dict(libraries={"a.so": {"size": 3}})).encode(),
)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The path of a record of the build that the package reads instead of its own."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(native, "_RECORD", path)
    monkeypatch.setattr(native, "_record", native._record.__wrapped__)
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    return path


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_of_the_build_is_the_reason(record, content):
    if content is not None:
        record.write_bytes(content)
    info = tcl.build_info()
    assert info["native"] is False and info["tf_built"] is None and info["cuda"] is None
    assert info["xla"] == []
    assert info["reason"] == f"{record}, which names the libraries, is missing or damaged"


def test_a_record_without_native_libraries_says_why(record):
    written = dict(tensorflow=None, native=False, reason="no compiler", cuda=None, libraries={})
    record.write_text(json.dumps(written))
    assert tcl.build_info()["reason"] == "it was not built: no compiler"
    record.write_text(json.dumps(written | dict(reason=None)))
    assert "libtf_center_loss_op.so" in tcl.build_info()["reason"]


def test_graph_in_the_environment_needs_no_library(tmp_path):
    copy_package(tmp_path)
    result = run(tmp_path, TF_CENTER_LOSS_IMPL="graph")
    assert result["warnings"] == []
    assert result["error"]


def test_native_in_the_environment_needs_the_library(tmp_path):
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


def test_an_unknown_value_in_the_environment_is_refused(tmp_path):
    done = run_program(
        "call_every_path", *ARGUMENTS, cwd=tmp_path, check=False, TF_CENTER_LOSS_IMPL="fastest"
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for word in ("TF_CENTER_LOSS_IMPL", "fastest", "auto", "native", "graph"):
        assert word in last


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Function of what the build recorded and of how a step runs: what is chosen on each device."""

    @functools.cache
    def run_once(cuda, how):
        directory = tmp_path_factory.mktemp("package")
        copy_as_if_built(directory, cuda=cuda and [cuda])
        return json.loads(run_program("choose_by_device", how, cwd=directory, paths=[directory]))

    return run_once


@pytest.mark.native
@pytest.mark.parametrize("how", ["ops", "xla"])
@pytest.mark.parametrize(
    "cuda, kind, built_for_it",
    [
        ("90", "CPU", True),
        ("90", "GPU", True),
        ("90", "TPU", False),
        (None, "CPU", True),
        (None, "GPU", False),
    ],
)
def test_a_device_without_kernels_gets_the_graph_and_a_warning(
    native_library, choices, how, cuda, kind, built_for_it
):
    result = choices(cuda, how)[kind]
    if built_for_it:
        assert result["auto"] == result["native"] == ["TclCenterLossStep"]
        assert result["warnings"] == []
        return
    assert result["auto"] == []
    (warning,) = result["warnings"]
    assert f"the centers lie on a {kind}, and it was" in warning
    assert "'native' cannot run: the centers lie on" in result["error"]


def test_the_warning_points_to_the_callers_line(tmp_path):
    copy_package(tmp_path)
    out = run_program("warning_of_the_fallback", cwd=tmp_path, paths=[tmp_path])
    assert out == "True\nTrue\n"
