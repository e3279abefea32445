"""The opt-in to atomics on a GPU: off by default, refused under op determinism."""

import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from gpu_option import traced_atomic

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def restore():
    yield
    tcl.training.set_gpu_atomics(False)


def test_off_unless_asked_for(native_library):
    assert not traced_atomic()
    tcl.training.set_gpu_atomics(True)
    assert traced_atomic()
    tcl.training.set_gpu_atomics(False)
    assert not traced_atomic()


def test_on_the_cpu_the_option_changes_nothing(native_library):
    tcl.training.set_gpu_atomics(True)
    centers = tf.Variable(tf.zeros([3, 2]))
    tcl.center_loss(tf.ones([2, 2]), [1, 1], centers, alpha=0.3, impl="native")
    assert centers.numpy().tolist() == [[0, 0], pytest.approx([0.2, 0.2]), [0, 0]]


def test_only_a_bool_is_accepted(native_library):
    with pytest.raises(TypeError, match="enabled: expected True or False, got 1"):
        tcl.training.set_gpu_atomics(1)


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False)])
def test_the_environment_decides_until_a_call(native_library, tmp_path, value, expected):
    out = run_program(
        "gpu_atomics_from_the_environment", cwd=tmp_path, TF_CENTER_LOSS_GPU_ATOMICS=value
    )
    assert out.split() == [str(expected), "False"]


def test_atomics_are_refused_under_op_determinism(native_library, tmp_path):
    run_program("gpu_atomics_under_determinism", cwd=tmp_path)


@pytest.mark.parametrize(
    "value, words",
    [
        ("1", "TF_CENTER_LOSS_GPU_ATOMICS: expected False"),
        ("yes", "TF_CENTER_LOSS_GPU_ATOMICS (environment): expected one of '0', '1'"),
    ],
)
def test_the_environment_is_refused_under_op_determinism(native_library, tmp_path, value, words):
    out = run_program("step_under_determinism", cwd=tmp_path, TF_CENTER_LOSS_GPU_ATOMICS=value)
    assert words in out
