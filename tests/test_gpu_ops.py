"""TensorFlow's side of the GPU kernels, run on the CPU with the emulated launchers.

csrc/tensorflow/gpu_kernels.cc is compiled as it is, for the CPU's device and under the kernel label
"emulated": its pointers, workspaces, buffers and variables are those a GPU would get.
"""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import emulated
import problems
import stepping
import tf_center_loss_op as tcl
from stepping import wide

pytestmark = pytest.mark.native

OPS = ["TclCenterLossStep", "TclCenterLoss", "TclUpdateCenters", "TclCenterLossBackward"]


@pytest.fixture(scope="module", autouse=True)
def emulated_kernels(native_library):
    tcl.build_info()  # the ops come before their kernels
    flags = (
        f"-isystem{tf.sysconfig.get_include()}",
        *("-D_GLIBCXX_USE_CXX11_ABI=1", "-DEIGEN_MAX_ALIGN_BYTES=64", "-DNDEBUG"),
        *('-DTCL_KERNEL_LABEL="emulated"', "-DTCL_GPU_DEVICE=tensorflow::DEVICE_CPU"),
        f"{tf.sysconfig.get_lib()}/libtensorflow_framework.so.2",
        "-Wl,--no-undefined",
    )
    file = emulated.ROOT / "csrc" / "tensorflow" / "gpu_kernels.cc"
    tf.load_library(str(emulated.build(entry=(file, flags), flags=("-fvisibility=hidden",))))


@contextlib.contextmanager
def on_the_emulator():
    """Ops made in this context, in a tf.function, run with the GPU's kernels."""
    graph = tf.compat.v1.get_default_graph()
    with graph._kernel_label_map(dict.fromkeys(OPS, "emulated")):
        yield


def outcome_of(problem, centers, upstream=None, **options):
    """As stepping.run."""

    @tf.function
    def step(features, labels):
        with on_the_emulator(), tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features,
                labels,
                centers,
                sample_weight=problem.sample_weight,
                ignore_class=problem.ignore_class,
                impl="native",
                **options,
            )
            with tape.stop_recording():
                up = None if upstream is None else tf.constant(upstream, loss.dtype)
                return loss, tape.gradient(loss, features, up)

    loss, gradient = step(tf.constant(problem.features), tf.constant(problem.labels))
    return stepping.Outcome(
        wide(loss), wide(gradient), wide(centers), loss.dtype.name, gradient.dtype.name
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", ["int32", "int64"])
@pytest.mark.parametrize("dtype", list(problems.DTYPES))
def test_step_and_gradient_equal_the_oracle(dtype, labels, reduction):
    shape = next(s for s in problems.SHAPES if s.leading == (29,))
    for update in (True, False):
        for upstream in (None, -1.7):
            problem = problems.make(shape, dtype, labels, weights=True, ignore="class")
            if upstream is not None and reduction == "none":
                upstream = problem.upstream
            options = dict(reduction=reduction, update_centers=update, alpha=0.3, rule="mean")
            outcome = outcome_of(problem, tf.Variable(problem.centers), upstream, **options)
            stepping.check(problem, outcome, dtype=dtype, upstream=upstream, **options)


def test_batches_that_grow_and_shrink_in_one_op():
    # The workspace is kept from call to call, and reallocated for a larger batch.
    dim, classes = 8, 50
    rng = np.random.default_rng(0)
    emulated_centers = tf.Variable(rng.normal(size=[classes, dim]).astype(np.float32))
    centers = tf.Variable(emulated_centers)

    @tf.function(input_signature=[tf.TensorSpec([None, dim]), tf.TensorSpec([None], tf.int32)])
    def step(features, labels):
        with on_the_emulator():
            return tcl.center_loss(features, labels, emulated_centers, impl="native")

    for batch in (3, 2100, 0, 17, 2500, 2100, 1):
        features = tf.constant(rng.normal(size=[batch, dim]).astype(np.float32))
        labels = tf.constant(rng.integers(0, classes, batch), tf.int32)
        loss = step(features, labels)
        expected = tcl.center_loss(features, labels, centers)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(emulated_centers.numpy(), centers.numpy(), rtol=1e-4, atol=1e-6)


def test_a_table_that_another_tensor_shares_is_copied_once():
    centers = tf.Variable(tf.zeros([4, 2]))
    before = centers.read_value()

    @tf.function
    def step():
        with on_the_emulator():
            tcl.update_centers(tf.ones([1, 2]), [1], centers, alpha=1.0, rule="sum", impl="native")

    step()
    step()
    assert not before.numpy().any()
    assert centers.numpy().tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_a_label_out_of_range_cannot_raise_and_moves_nothing():
    centers = tf.Variable(tf.zeros([3, 2]))

    @tf.function
    def step(features):
        with on_the_emulator(), tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features, [0, 3, -1], centers, reduction="none", alpha=0.5, impl="native"
            )
            with tape.stop_recording():
                return loss, tape.gradient(loss, features)

    loss, gradient = step(tf.ones([3, 2]))
    assert np.isfinite(loss.numpy()).tolist() == [True, False, False]
    assert np.isfinite(gradient.numpy()).all(axis=1).tolist() == [True, False, False]
    assert centers.numpy().tolist() == [[0.25, 0.25], [0, 0], [0, 0]]


def test_a_bad_alpha_shows_in_the_loss():
    centers = tf.Variable(tf.zeros([3, 2]))

    @tf.function
    def step(alpha):
        with on_the_emulator():
            return tcl.center_loss(tf.ones([1, 2]), [1], centers, alpha=alpha, impl="native")

    for alpha in (-0.5, np.nan, np.inf):
        assert np.isnan(step(tf.constant(alpha, tf.float32)))
        assert not centers.numpy().any()


def test_atomics_give_the_step_but_for_rounding():
    rng = np.random.default_rng(1)
    features = rng.normal(size=[200, 8]).astype(np.float32)
    labels = rng.integers(0, 10, 200)
    centers, expected = tf.Variable(tf.zeros([10, 8])), tf.Variable(tf.zeros([10, 8]))
    tcl.update_centers(features, labels, expected)
    try:
        tcl.training.set_gpu_atomics(True)

        @tf.function
        def step():
            with on_the_emulator():
                tcl.update_centers(features, labels, centers, impl="native")

        step()
    finally:
        tcl.training.set_gpu_atomics(False)
    np.testing.assert_allclose(centers.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_wrong_lengths_are_refused_at_run_time():
    centers = tf.Variable(tf.zeros([3, 2]))

    @tf.function(input_signature=[tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)])
    def step(features, labels):
        with on_the_emulator():
            return tcl.center_loss(features, labels, centers, impl="native")

    with pytest.raises(tf.errors.InvalidArgumentError, match="labels: expected shape"):
        step(tf.ones([2, 2]), tf.constant([1]))
    assert not centers.numpy().any()


def test_more_samples_than_a_launch_takes_are_refused():
    centers = tf.Variable(tf.zeros([2, 1]))

    @tf.function(input_signature=[tf.TensorSpec([None, 1]), tf.TensorSpec([None], tf.int32)])
    def step(features, labels):
        with on_the_emulator():
            return tcl.center_loss(features, labels, centers, impl="native")

    batch = 2**22 + 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 4194304 samples .* 4194305"):
        step(tf.ones([batch, 1]), tf.ones([batch], tf.int32))
    assert not centers.numpy().any()
