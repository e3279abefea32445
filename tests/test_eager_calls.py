"""An eager call of each op takes TensorFlow's fast path, and shows in a profile."""

import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from tf_center_loss_op._core import native

pytestmark = pytest.mark.native

LABELS = [0, 1, 2, 1]
OPTIONS = {
    "defaults": {},
    "everything": dict(
        alpha=0.25, sample_weight=[1.0, 2.0, 3.0, 4.0], reduction="none", ignore_class=2
    ),
    "read only": dict(update_centers=False),
}


@pytest.fixture
def problem():
    return tf.ones([4, 3]), tf.Variable(tf.zeros([10, 3]))


def refused(*_, **__):
    raise AssertionError("TensorFlow left its fast path")


@pytest.fixture
def only_the_fast_path(monkeypatch):
    """TensorFlow calls these functions where an attribute has the wrong Python type."""
    names = [name for name in dir(native.ops()) if name.endswith("_eager_fallback")]
    assert len(names) >= 5
    for name in names:
        monkeypatch.setattr(native.ops(), name, refused)


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient(problem, only_the_fast_path, options):
    features, centers = problem
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = tcl.center_loss(features, LABELS, centers, **OPTIONS[options])
    assert tape.gradient(loss, features) is not None


def test_the_other_functions(problem, only_the_fast_path):
    features, centers = problem
    tcl.update_centers(features, LABELS, centers)
    tcl.tables.create(10, 3)


def test_a_profile_shows_the_ops(problem, tmp_path):
    features, centers = problem

    @tf.function
    def step(features):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(features, LABELS, centers, reduction="none")
        return tape.gradient(loss, features, output_gradients=tf.range(4.0))

    step(features)
    tf.profiler.experimental.start(str(tmp_path))
    step(features)
    tf.profiler.experimental.stop()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    for name in (b"TclCenterLossStep", b"TclCenterLossBackward"):
        assert name in trace.read_bytes()
