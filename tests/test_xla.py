"""jit_compile=True gives the same numbers in the same buffer, with the kernel and in plain ops.

tests/gpu/test_gpu_xla.py runs most of this on a GPU, or with the emulator in its place.
"""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import plain
import problems
import stepping
import tf_center_loss_op as tcl
from child import run_program
from implementations import IMPLEMENTATIONS
from pairwise import all_pairs
from tolerances import assert_close


@pytest.fixture
def xla_library(native_library):
    if not tcl.build_info()["xla"]:
        pytest.fail("the XLA library was not built or does not load")


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    if request.param == "native":
        request.getfixturevalue("xla_library")
    return request.param


def compiled(function):
    return tf.function(function, jit_compile=True, autograph=True)


SHAPES = [
    problems.Shape((64,), 200, 10, "uniform", "the tutorial's"),
    problems.Shape((1,), 1, 1, "uniform", "one of everything"),
    problems.Shape((2, 3, 4), 6, 5, "uniform", "features of rank 4"),
    problems.Shape((1500,), 33, 4000, "power-law", "groups of all sizes"),
    problems.Shape((300,), 8, 3, "equal", "one group"),
]

FACTORS = {
    "shape": SHAPES,
    "rule": ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"],
    "dtype": list(problems.DTYPES),
    "labels": ["int32", "int64", "onehot-uint8"],
    "reduction": ["mean", "sum", "none"],
    "ignore": [None, "outside", "class"],
    "weights": [False, True],
    "update_centers": [True, False],
    "upstream": [False, True],
    "mode": ["function", "unknown"],
}


def allowed(row):
    ids = row["labels"] != "onehot-uint8"
    return ids or (row["ignore"] != "outside" and row["shape"].classes <= 1000)


def name(row):
    return "-".join(str(value) for value in row.values())


@pytest.mark.parametrize("row", all_pairs(FACTORS, allowed), ids=name)
def test_every_pair_of_choices(impl, row):
    row = dict(row)
    problem = problems.make(
        *(row.pop(k) for k in ("shape", "dtype", "labels", "weights", "ignore"))
    )
    options = {key: row[key] for key in ("rule", "reduction", "update_centers")} | {"alpha": 0.3}
    upstream = None
    if row["upstream"]:
        upstream = problem.upstream if row["reduction"] == "none" else np.float64(-1.7)
    outcome = stepping.run(
        problem, mode=row["mode"], jit=True, upstream=upstream, impl=impl, **options
    )
    dtype = problem.features.dtype.name
    stepping.check(problem, outcome, dtype=dtype, upstream=upstream, **options)


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_call_gives_the_bits_of_the_op(xla_library, dtype):
    problem = problems.make(SHAPES[3], dtype, weights=True, ignore="outside")
    expected, actual = (
        stepping.run(problem, mode="function", jit=jit, impl="native") for jit in (None, True)
    )
    for a, b in zip(actual, expected, strict=True):
        assert np.array_equal(a, b)


def test_the_same_bits_in_every_run(impl):
    problem = problems.make(SHAPES[3], weights=True)
    first, second = (stepping.run(problem, mode="function", jit=True, impl=impl) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


def loss_and_gradient(impl, centers, **options):
    """A compiled function of features and labels."""

    def call(features, labels, alpha=0.5):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(features, labels, centers, alpha=alpha, impl=impl, **options)
        return loss, tape.gradient(loss, features)

    return compiled(call)


@pytest.mark.native
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_bad_label_raises_and_nothing_is_written(xla_library, bad, update):
    centers = tf.Variable(tf.ones([3, 2]))
    step = loss_and_gradient("native", centers, update_centers=update, ignore_class=9)
    text = re.escape(f"labels[2] = {bad} is outside [0, 3)")
    with pytest.raises(tf.errors.InvalidArgumentError, match=text):
        step(tf.zeros([4, 2]), tf.constant([0, 9, bad, -7], tf.int64))
    assert (centers.numpy() == 1).all()
    loss, _ = step(tf.zeros([1, 2]), tf.constant([1], tf.int64))
    assert loss == 1


@pytest.mark.native
@pytest.mark.parametrize("alpha", [-0.5, np.inf, np.nan])
def test_a_bad_alpha_raises_and_nothing_is_written(xla_library, alpha):
    centers = tf.Variable(tf.ones([3, 2]))
    step = loss_and_gradient("native", centers)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="alpha: expected a finite number >= 0"
    ):
        step(tf.zeros([2, 2]), tf.constant([0, 1]), tf.constant(alpha))
    assert (centers.numpy() == 1).all()


# Plain ops that XLA compiles, and the kernel on a GPU, cannot raise.
CANNOT_RAISE = pytest.mark.parametrize("impl", ["graph"])


@CANNOT_RAISE
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("ignore", [None, 9])
def test_a_bad_label_is_nan_and_moves_nothing(impl, reduction, ignore):
    features = tf.random.normal([7, 5])
    labels = tf.constant([2, -1, 2, 3, 0, 2**40, 9], tf.int64)
    before = np.random.default_rng(0).normal(size=[3, 5]).astype(np.float32)
    centers = tf.Variable(before)
    loss, gradient = loss_and_gradient(impl, centers, reduction=reduction, ignore_class=ignore)(
        features, labels
    )
    # All other results are those of bad samples with features of NaN, which count in N.
    bad = np.array([False, True, False, True, False, True, ignore is None])
    truth = oracle.center_loss(
        np.where(bad[:, None], np.nan, features),
        np.where(bad, 0, labels),
        before,
        reduction=reduction,
        ignore_class=ignore,
    )
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, truth.feature_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centers.numpy(), truth.centers, rtol=1e-5, atol=1e-6)
    assert np.isnan(gradient).all(axis=1).tolist() == bad.tolist()


@CANNOT_RAISE
@pytest.mark.parametrize("alpha", [-0.5, np.inf, np.nan])
def test_a_bad_alpha_is_nan_and_moves_nothing(impl, alpha):
    centers = tf.Variable(tf.ones([3, 2]))
    step = loss_and_gradient(impl, centers)
    loss, gradient = step(tf.zeros([2, 2]), tf.constant([0, 1]), tf.constant(alpha))
    assert np.isnan(loss) and np.isnan(gradient).all()
    assert (centers.numpy() == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_rows(impl, bad):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 17)).astype(np.float32)
    features[4, 3] = bad
    labels = [0, 1, 0, 2, 1, 1, 0, 2, 3]
    before = rng.normal(size=(5, 17)).astype(np.float32)
    centers = tf.Variable(before)
    loss, gradient = loss_and_gradient(impl, centers, reduction="none")(
        tf.constant(features), tf.constant(labels)
    )
    truth = oracle.center_loss(features, labels, before, reduction="none")
    good = np.arange(9) != 4
    assert not np.isfinite(loss[4]) and not np.isfinite(gradient[4, 3])
    np.testing.assert_allclose(loss.numpy()[good], truth.loss[good], rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy()[good], truth.feature_gradient[good], rtol=1e-5)
    np.testing.assert_allclose(centers.numpy(), truth.centers, rtol=1e-5, atol=1e-6)


def test_any_batch_size(impl):
    centers = tf.Variable(tf.random.normal([4, 3]))
    step = loss_and_gradient(impl, centers)
    for batch in (5, 0, 3):
        features, before = tf.random.normal([batch, 3]), centers.numpy()
        labels = np.arange(batch) % 2
        loss, gradient = step(features, tf.constant(labels))
        truth = oracle.center_loss(features, labels, before)
        assert_close(loss, truth.loss, "float32")
        assert_close(gradient, truth.feature_gradient, "float32")
        assert_close(centers.numpy(), truth.centers, "float32")


def test_steps_of_two_tables_in_one_program(impl):
    # XLA may run both at the same time.
    features, labels = tf.random.normal([300, 8]), np.arange(300) % 5
    tables = [tf.Variable(tf.random.normal([5, 8])) for _ in range(2)]
    before = [table.numpy() for table in tables]

    @compiled
    def steps():
        return [tcl.center_loss(features, labels, table, impl=impl) for table in tables]

    for loss, table, start in zip(steps(), tables, before, strict=True):
        truth = oracle.center_loss(features, labels, start)
        np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
        np.testing.assert_allclose(table.numpy(), truth.centers, rtol=1e-5, atol=1e-6)


def test_update_centers(impl):
    features, labels = tf.random.normal([6, 3]), [0, 1, 1, -1, 0, 1]
    before = np.random.default_rng(0).normal(size=[4, 3])
    centers = tf.Variable(before, dtype=tf.float32)

    @compiled
    def step():
        tcl.update_centers(features, labels, centers, rule="mean", ignore_class=-1, impl=impl)

    step()
    truth = oracle.center_loss(features, labels, before, rule="mean", ignore_class=-1)
    assert_close(centers.numpy(), truth.centers, "float32")


def test_tape_outside_of_the_compiled_function(impl):
    problem = problems.make(SHAPES[0])
    features, centers = tf.constant(problem.features), tf.Variable(problem.centers)

    @compiled
    def loss(features):
        return tcl.center_loss(features, problem.labels, centers, impl=impl)

    with tf.GradientTape() as tape:
        tape.watch(features)
        value = loss(features)
    truth = oracle.center_loss(problem.features, problem.ids, problem.centers)
    assert_close(value, truth.loss, "float32")
    assert_close(tape.gradient(value, features), truth.feature_gradient, "float32")
    assert_close(centers.numpy(), truth.centers, "float32")


def test_second_derivatives(impl):
    features = tf.random.normal([6, 5], dtype=tf.float64)
    centers = tf.Variable(tf.random.normal([4, 5], dtype=tf.float64))
    labels, weights = tf.constant([2, 0, 2, 1, 2, 0]), tf.constant([1.0, 0.5, 0.0, 2.0, 3.0, 1.0])

    def derivatives(loss_function, **options):
        def compute(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = loss_function(
                        x, labels, centers, sample_weight=weights, ignore_class=0, **options
                    )
                    loss = loss**2
                gradients = inner.gradient(loss, [x, centers])
                total = sum(tf.reduce_sum(tf.convert_to_tensor(g) ** 3) for g in gradients)
            return [tf.convert_to_tensor(g) for g in outer.gradient(total, [x, centers])]

        return compute

    ours = compiled(derivatives(tcl.center_loss, update_centers=False, impl=impl))(features)
    for actual, expected in zip(ours, derivatives(plain.loss)(features), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradient_to_the_centers(impl):
    # Applied as by an optimizer: rows of ignored labels must not change.
    features = tf.random.normal([6, 3])
    labels = tf.constant([1, -1, 1, 2, -1, -1])
    centers = tf.Variable(tf.zeros([4, 3]))

    @compiled
    def descend():
        with tf.GradientTape() as tape:
            loss = tcl.center_loss(
                features,
                labels,
                centers,
                reduction="sum",
                ignore_class=-1,
                impl=impl,
                update_centers=False,
            )
        centers.scatter_sub(tape.gradient(loss, centers))

    descend()
    expected = np.zeros([4, 3], np.float32)
    np.add.at(expected, [1, 1, 2], features.numpy()[[0, 2, 3]])
    np.testing.assert_allclose(centers.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("loop", ["for", "while_loop", "cond"])
def test_loops(impl, loop):
    features, labels = tf.random.normal([6, 3]), [0, 1, 1, 2, 0, 1]
    centers = tf.Variable(tf.zeros([4, 3]))

    def one(total):
        return total + tcl.center_loss(features, labels, centers, impl=impl)

    def steps():
        total = tf.constant(0.0)
        if loop == "for":
            for _ in tf.range(4):
                total = one(total)
            return total
        if loop == "cond":
            for _ in range(4):
                total = tf.cond(total >= 0, lambda t=total: one(t), lambda t=total: t)
            return total
        return tf.while_loop(lambda i, _: i < 4, lambda i, t: (i + 1, one(t)), (0, total))[1]

    total = compiled(steps)()
    table, expected = np.zeros([4, 3]), 0
    for _ in range(4):
        truth = oracle.center_loss(features, labels, table)
        table, expected = truth.centers, expected + truth.loss
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(centers.numpy(), table, rtol=1e-5)


def test_a_large_batch_needs_no_matrix_and_no_second_table(impl):
    batch, dim, classes = 16384, 3, 70001
    shape = problems.Shape((batch,), dim, classes, "power-law", "too large for its square")
    problem = problems.make(shape)
    centers = tf.Variable(problem.centers)
    step = loss_and_gradient(impl, centers)
    arguments = tf.constant(problem.features), tf.constant(problem.labels), tf.constant(0.5)
    loss, gradient = step(*arguments)
    truth = oracle.center_loss(problem.features, problem.ids, problem.centers)
    assert_close(loss, truth.loss, "float32")
    assert_close(gradient, truth.feature_gradient, "float32")
    np.testing.assert_allclose(centers.numpy(), truth.centers, rtol=1e-4, atol=1e-4)

    program = step.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    # All sizes but those of bytes, which are a GPU's workspace.
    sizes = re.findall(r"\w(?<!\bu8)\[([\d,]+)\]", program)
    sizes = {tuple(map(int, s.split(","))) for s in sizes}
    assert all(np.prod(s) <= 2 * batch * dim for s in sizes if s != (classes, dim)), sizes
    assert not re.search(rf"\[{classes},{dim}\]\S* copy\(", program)


@pytest.mark.native
def test_in_place(xla_library, tmp_path):
    run_program("xla_steps_in_place", cwd=tmp_path)


def whole_reads_before_each_step(step, centers):
    first = tf.reduce_sum(centers * centers)
    step()
    norms = tf.norm(centers, axis=1)
    step()
    return first, tf.reduce_max(norms), tf.reduce_sum(centers**3)


def a_whole_read_in_a_loop(step, centers):
    total = tf.constant(0.0)
    for _ in tf.range(3):
        total += tf.reduce_sum(centers * centers)
        step()
    return total


def reads_before_a_for_loop(step, centers):
    rows, total = tf.gather(centers, [0, 1]), tf.reduce_sum(centers)
    for _ in tf.range(3):
        step()
    return rows, total, tf.reduce_sum(centers**3)


def reads_before_a_while_loop(step, centers):
    products = centers.read_value() @ tf.ones([3, 2])
    last = tf.while_loop(lambda i, _: i < 3, lambda i, t: (i + 1, t + step()), (0, 0.0))[1]
    return products, last


def reads_before_nested_loops(step, centers):
    first, total = tf.reduce_sum(centers * centers), tf.constant(0.0)
    for _ in tf.range(2):
        norms = tf.norm(centers, axis=1)
        for _ in tf.range(2):
            step()
        total += tf.reduce_max(norms)
    return first, total


def a_loop_of_one_round_or_none_in_a_loop(step, centers):
    total = tf.reduce_sum(centers * centers)
    for i in tf.range(4):
        due = i % 2 == 0
        while due:
            step()
            due = tf.constant(False)
    return total


def an_alpha_of_zero_in_a_loop(step, centers):
    total = tf.reduce_sum(centers * centers)
    for i in tf.range(4):
        step(alpha=tf.where(i % 2 == 0, 0.5, 0.0))
    return total


def a_gradient_through_a_loop(step, centers):
    first, x = tf.reduce_sum(centers * centers), tf.ones([6, 3])
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = first * tf.reduce_sum(x)
        for _ in tf.range(3):
            total += step(x)
    return first, tape.gradient(total, x)


PROGRAMS_WITH_READS = [
    whole_reads_before_each_step,
    a_whole_read_in_a_loop,
    reads_before_a_for_loop,
    reads_before_a_while_loop,
    reads_before_nested_loops,
    a_loop_of_one_round_or_none_in_a_loop,
    an_alpha_of_zero_in_a_loop,
    a_gradient_through_a_loop,
]


def check_program(program, *, in_place=True, layer=False):
    """The numbers equal those without XLA, and XLA does not copy the table."""
    features, labels = tf.random.normal([6, 3]), tf.constant([0, 1, 1, 2, 0, 1])
    before = tf.random.normal([5003, 3])

    def run(jit):
        centers = stepping.make_variable(before, "keras.Variable" if layer else "tf.Variable")

        def step(features=features, **options):
            return tcl.center_loss(features, labels, centers, impl="native", **options)

        return centers, tf.function(lambda: program(step, centers), jit_compile=jit)

    (actual_centers, actual), (expected_centers, expected) = run(True), run(None)
    optimized = actual.experimental_get_compiler_ir()(stage="optimized_hlo")
    assert not (in_place and re.search(r"\[5003,3\]\S* copy\(", optimized))
    results = tf.nest.flatten(actual()), tf.nest.flatten(expected())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(actual_centers.numpy(), expected_centers.numpy(), rtol=1e-5)


@pytest.mark.native
@pytest.mark.parametrize("program", PROGRAMS_WITH_READS)
def test_the_step_waits_for_reads(xla_library, program):
    check_program(program)


@pytest.mark.native
@pytest.mark.parametrize("program", PROGRAMS_WITH_READS[:3])
def test_the_step_of_a_keras_variable_waits_for_reads(xla_library, program):
    check_program(program, layer=True)


@pytest.mark.native
def test_the_step_in_a_function_waits_for_reads_outside(xla_library):
    def program(step, centers):
        rows, total = tf.gather(centers, [0, 1]), tf.reduce_sum(centers * centers)
        tf.function(step)()
        return rows, total

    check_program(program)


@pytest.mark.native
def test_reads_before_a_branch(xla_library):
    def program(step, centers):
        total = tf.reduce_sum(centers * centers)
        for i in tf.range(4):
            rows = tf.gather(centers, [0, 1])
            if i % 2 == 0:
                total += step()
            total += tf.reduce_sum(rows)
        return total

    check_program(program, in_place=False)


@pytest.mark.native
def test_a_read_of_a_number_of_rows_that_xla_does_not_know(xla_library):
    some = tf.Variable([True, False, True])

    def program(step, centers):
        rows = tf.gather(centers, tf.boolean_mask([0, 1, 2], some))
        step()
        return rows

    check_program(program, in_place=False)


@pytest.mark.native
@pytest.mark.parametrize("first", ["package", "xla"])
def test_the_package_may_be_imported_before_or_after_xla_is_used(xla_library, tmp_path, first):
    run_program("import_before_or_after_xla", first, cwd=tmp_path)


class StepsAfterTheOptimizer(tcl.training.UpdateCentersAfterStep, keras.Model):
    pass


def layer_model(impl, jit, **options):
    keras.utils.set_random_seed(0)
    image, label = keras.Input([8]), keras.Input([], dtype="int32")
    embedding = keras.layers.Dense(4)(image)
    layer = tcl.CenterLoss(3, impl=impl, **{"loss_weight": 0.1} | options)
    outputs = keras.layers.Dense(3)(layer(embedding, label))
    model = StepsAfterTheOptimizer([image, label], outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit)
    return model, layer


def everything():
    decay = keras.optimizers.schedules.ExponentialDecay
    schedules = {"loss_weight": decay(0.1, 2, 0.9), "alpha": decay(0.5, 2, 0.5)}
    return schedules | {"deferred_update": True, "ignore_class": 2, "reduction": "sum"}


@pytest.mark.parametrize("options", [dict, everything])
def test_the_layer_in_a_compiled_model(impl, options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    y = rng.integers(0, 3, 40).astype(np.int32)
    results = []
    for jit in (True, False):
        model, layer = layer_model(impl, jit, **options())
        # 40 samples in batches of 16: the last is smaller.
        history = model.fit([x, y], y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        trained = layer.centers.numpy()
        evaluated = model.evaluate([x, y], y, batch_size=16, verbose=0)
        assert np.array_equal(layer.centers.numpy(), trained)
        distance = history.history[layer.distance.name]
        results.append((history.history["loss"], distance, evaluated, trained))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert trained.any()
