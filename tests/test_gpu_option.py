"""The opt-in to atomics on a GPU: off by default, refused under op determinism."""

import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_python

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def restore():
    yield
    tcl.training.set_gpu_atomics(False)


def traced_atomic():
    """The attribute of the op that a call makes now."""
    centers = tf.Variable(tf.zeros([3, 2]))

    @tf.function
    def step():
        loss = tcl.center_loss(tf.ones([1, 2]), [1], centers, impl="native")
        tcl.update_centers(tf.ones([1, 2]), [1], centers, impl="native")
        return loss

    ops = step.get_concrete_function().graph.get_operations()
    values = {op.get_attr("atomic") for op in ops if op.type.startswith("Tcl")}
    assert len(values) == 1
    return values.pop()


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


def test_only_a_bool(native_library):
    with pytest.raises(TypeError, match="enabled: expected True or False, got 1"):
        tcl.training.set_gpu_atomics(1)


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False)])
def test_the_environment_decides_where_nobody_called(native_library, tmp_path, value, expected):
    out = run_python(
        """
        import tf_center_loss_op as tcl
        from tf_center_loss_op._core import native as _native

        print(_native.gpu_atomics())
        tcl.training.set_gpu_atomics(False)
        print(_native.gpu_atomics())
        """,
        tmp_path,
        TF_CENTER_LOSS_GPU_ATOMICS=value,
    )
    assert out.split() == [str(expected), "False"]


def test_refused_under_op_determinism(native_library, tmp_path):
    run_python(
        """
        import tensorflow as tf
        import tf_center_loss_op as tcl

        def refused(call, name):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                assert name in str(error), error
            else:
                raise AssertionError(name)

        centers = tf.Variable(tf.zeros([3, 2]))
        step = lambda: tcl.center_loss(tf.ones([1, 2]), [1], centers)
        tcl.training.set_gpu_atomics(True)
        step()
        tf.keras.utils.set_random_seed(0)
        tf.config.experimental.enable_op_determinism()
        refused(step, "set_gpu_atomics: expected False")
        refused(lambda: tcl.training.set_gpu_atomics(True), "enabled: expected False")
        tcl.training.set_gpu_atomics(False)
        step()
        import os
        from tf_center_loss_op._core import native as _native
        _native._gpu_atomics = None
        os.environ["TF_CENTER_LOSS_GPU_ATOMICS"] = "1"
        refused(step, "TF_CENTER_LOSS_GPU_ATOMICS: expected False")
        os.environ["TF_CENTER_LOSS_GPU_ATOMICS"] = "yes"
        refused(step, "TF_CENTER_LOSS_GPU_ATOMICS (environment): expected one of '0', '1'")
        """,
        tmp_path,
    )
