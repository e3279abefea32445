"""With another backend of Keras, or Keras 2 as tf.keras, the Keras objects are refused."""

import pytest

import tf_center_loss_op as tcl
from child import run_program

OBJECTS = ["CenterLoss", "GlobalBatchLoss", "CentersMonitor", "AtomicBackup"]


@pytest.mark.parametrize("backend, legacy", [("jax", None), ("torch", None), ("", "1")])
def test_an_error_at_construction(tmp_path, backend, legacy):
    changes = {} if legacy is None else {"TF_USE_LEGACY_KERAS": legacy}
    *errors, functions = run_program(
        "keras_elsewhere", backend, cwd=tmp_path, **changes
    ).splitlines()
    got = f"got the backend '{backend}'" if backend else "got TF_USE_LEGACY_KERAS=1"
    assert len(errors) == len(OBJECTS)
    for name, error in zip(OBJECTS, errors, strict=True):
        assert error.startswith(f"{name}: expected Keras 3 on TensorFlow, {got}")
    assert functions == "7.5 [0.8, 1.2]"


@pytest.mark.parametrize("value, refused", [("1", True), ("true", True), ("0", False)])
def test_what_tensorflow_takes_for_true(monkeypatch, value, refused):
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", value)
    if refused:
        with pytest.raises(RuntimeError, match=f"^CenterLoss: .*got TF_USE_LEGACY_KERAS={value}"):
            tcl.CenterLoss(3)
    else:
        tcl.CenterLoss(3)
