"""jit_compile=True on a GPU: the sweep of tests/test_sweep.py and the tests of tests/test_xla.py.

With --stand-in the program that XLA would get for a GPU runs on the CPU, with the emulated kernel.
XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 puts every step into a CUDA graph.
"""

import ctypes
import importlib.util

import pytest

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("no TensorFlow", allow_module_level=True)

import keras
import numpy as np
import tensorflow as tf

import emulated
import problems
import stepping
import test_sweep
import test_xla
import tf_center_loss_op as tcl
from pairwise import all_pairs

# Left out: tests with other results on a GPU, programs that run on the CPU, and matrix products,
# whose library may be missing on a machine that only tests kernels.
NOT_HERE = {
    "test_a_bad_label_raises_and_nothing_is_written",
    "test_a_bad_alpha_raises_and_nothing_is_written",
    "test_in_place",
    "test_the_package_may_be_imported_before_or_after_xla_is_used",
    "test_the_layer_in_a_compiled_model",
    "test_the_call_gives_the_bits_of_the_op",
    "test_the_step_waits_for_reads",
    "test_the_step_of_a_keras_variable_waits_for_reads",
}
globals().update(
    {
        name: test
        for name, test in vars(test_xla).items()
        if name.startswith("test_") and name not in NOT_HERE
    }
)


@pytest.fixture
def impl():
    return "native"


@pytest.fixture
def xla_library():
    assert tcl.build_info()["xla"]


@pytest.fixture(scope="module")
def stand_in(request):
    """Whether the emulator is in the GPU's place."""
    return request.config.getoption("--stand-in", False)


@pytest.fixture(autouse=True)
def place(stand_in):
    """Places everything that a test creates on the GPU."""
    if not (stand_in or tf.config.list_logical_devices("GPU")):
        pytest.skip("TensorFlow finds no GPU")
    with tf.device("/CPU:0" if stand_in else "/GPU:0"):
        yield


SWEEP = test_sweep.FACTORS | {"mode": ["function", "unknown"]}


@pytest.mark.parametrize("row", all_pairs(SWEEP, test_sweep.allowed), ids=test_sweep.name)
def test_the_sweep(impl, row):
    test_sweep.run_and_check(impl, row, jit=True)


@pytest.mark.parametrize("dtype", list(problems.DTYPES))
def test_the_bits_of_the_kernel(stand_in, dtype):
    problem = problems.make(test_xla.SHAPES[3], dtype, weights=True, ignore="outside")
    actual = stepping.run(problem, mode="function", jit=True, impl="native")
    if stand_in:
        centers = problem.centers.copy()
        loss, gradient, _ = emulated.Emulator().center_loss_step(
            problem.features,
            problem.labels,
            centers,
            sample_weight=problem.sample_weight,
            ignore_class=problem.ignore_class,
        )
        gradient = gradient.astype(problem.features.dtype).astype(np.float64)
        expected = loss, gradient, centers
    else:
        expected = stepping.run(problem, mode="function", impl="native")
    for a, b in zip(actual, expected, strict=False):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("holder", ["tf.Variable", "keras.Variable"])
@pytest.mark.parametrize(
    "program",
    [p for p in test_xla.PROGRAMS_WITH_READS if p is not test_xla.reads_before_a_while_loop],
)
def test_the_step_waits_for_reads(program, holder):
    test_xla.check_program(program, layer=holder == "keras.Variable")


def address(variable):
    """The address of the variable's buffer on the device."""
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    capsule = tf.experimental.dlpack.to_dlpack(variable.read_value())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # A DLTensor begins with the address of its numbers.
    return ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_void_p))[0]


def test_in_the_variables_own_buffer():
    centers = tf.Variable(tf.zeros([5003, 64]))
    features = tf.random.normal([256, 64])
    labels = tf.random.uniform([256], 0, 5000, tf.int64)

    def step(labels=labels):
        return tcl.center_loss(features, labels, centers, impl="native")

    def read(labels=labels):
        return tf.gather(centers, labels)

    def between_reads():
        return read(), step(), read()

    def sum_of_the_table():
        return tf.reduce_sum(centers), step()

    def loop_between_reads():
        whole, total = tf.reduce_sum(centers), read()
        for i in tf.range(3, dtype=tf.int64):
            total += read(labels + i)
            step(labels + i)
        return whole, total, step()

    before = address(centers)
    for program in (step, between_reads, sum_of_the_table, loop_between_reads):
        program = tf.function(program, jit_compile=True)
        for _ in range(2):
            program()
        assert address(centers) == before


def test_batches_that_grow_and_shrink():
    # Each batch size has its own program and its own workspace.
    centers, expected = tf.Variable(tf.zeros([50, 8])), tf.Variable(tf.zeros([50, 8]))
    rng = np.random.default_rng(0)

    @tf.function(jit_compile=True)
    def step(features, labels):
        return tcl.center_loss(features, labels, centers, impl="native")

    for batch in (3, 2100, 17, 5000, 2100, 1):
        features = tf.constant(rng.normal(size=[batch, 8]).astype(np.float32))
        labels = tf.constant(rng.integers(0, 50, batch))
        loss = step(features, labels)
        np.testing.assert_allclose(loss, tcl.center_loss(features, labels, expected), rtol=1e-5)
        np.testing.assert_allclose(centers.numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("ignore", [None, 9])
def test_a_bad_label_is_nan_and_moves_nothing(impl, reduction, ignore):
    test_xla.test_a_bad_label_is_nan_and_moves_nothing(impl, reduction, ignore)


@pytest.mark.parametrize("alpha", [-0.5, np.inf, np.nan])
def test_a_bad_alpha_is_nan_and_moves_nothing(impl, alpha):
    test_xla.test_a_bad_alpha_is_nan_and_moves_nothing(impl, alpha)


def model_without_products(jit_compile):
    """A layer and what is trained before it, without matrix products."""
    keras.utils.set_random_seed(0)
    word, label = keras.Input([], dtype="int32"), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(3, loss_weight=0.1)
    embedding = layer(keras.layers.Embedding(40, 8)(word), label)
    output = keras.layers.Activation("tanh")(embedding)
    model = keras.Model([word, label], keras.ops.mean(output, axis=-1))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    return model, layer


def test_fit_as_keras_compiles_it(stand_in):
    rng = np.random.default_rng(0)
    word, label = rng.integers(0, 40, 500), rng.integers(0, 3, 500)
    target = rng.normal(size=500).astype(np.float32)
    results = []
    # With a GPU, Keras uses XLA by default.
    for jit_compile in (True if stand_in else "auto", False):
        model, layer = model_without_products(jit_compile)
        assert model.jit_compile is (jit_compile is not False)
        # 500 samples in batches of 64: the last is smaller.
        history = model.fit(
            [word, label], target, batch_size=64, epochs=3, shuffle=False, verbose=0
        )
        results.append((history.history["loss"], layer.centers.numpy()))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert results[0][1].any()
