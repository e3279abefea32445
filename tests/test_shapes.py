"""A shape that tracing does not know is checked when the op runs, or when XLA compiles it."""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

CENTERS = [10, 4]
ERRORS = (ValueError, tf.errors.InvalidArgumentError)


def spec(*shape, dtype="float32"):
    return tf.TensorSpec(shape, dtype)


# name: (signature, arrays that fit, arrays that do not, the argument that the error names).
CASES = {
    "a column of class ids": (
        dict(features=spec(None, 4), labels=spec(None, None, dtype="int32")),
        dict(features=np.ones([3, 4], "f"), labels=np.eye(10, dtype="int32")[[5, 6, 2]]),
        dict(labels=np.array([[5], [6], [12]], "int32")),
        "labels",
    ),
    "one-hot rows too narrow": (
        dict(features=spec(None, 4), labels=spec(None, None)),
        dict(features=np.ones([3, 4], "f"), labels=np.eye(10, dtype="f")[[5, 6, 2]]),
        dict(labels=np.eye(9, dtype="f")[[5, 6, 2]]),
        "labels",
    ),
    "one-hot rows for other samples": (
        dict(features=spec(None, 4), labels=spec(None, 10)),
        dict(features=np.ones([3, 4], "f"), labels=np.eye(10, dtype="f")[[5, 6, 2]]),
        dict(labels=np.eye(10, dtype="f")[[5]]),
        "labels",
    ),
    "labels transposed": (
        dict(features=spec(None, None, 4), labels=spec(None, None, dtype="int32")),
        dict(features=np.ones([2, 3, 4], "f"), labels=np.arange(6, dtype="int32").reshape(2, 3)),
        dict(labels=np.arange(6, dtype="int32").reshape(3, 2)),
        "labels",
    ),
    "labels flat": (
        dict(features=spec(None, None, 4), labels=spec(None, None, dtype="int64")),
        dict(features=np.ones([2, 3, 4], "f"), labels=np.arange(6).reshape(2, 3)),
        dict(labels=np.arange(6).reshape(1, 6)),
        "labels",
    ),
    "weights transposed": (
        dict(
            features=spec(None, None, 4),
            labels=spec(None, None, dtype="int32"),
            sample_weight=spec(None, None),
        ),
        dict(
            features=np.ones([2, 3, 4], "f"),
            labels=np.arange(6, dtype="int32").reshape(2, 3),
            sample_weight=np.ones([2, 3], "f"),
        ),
        dict(sample_weight=np.ones([3, 2], "f")),
        "sample_weight",
    ),
    "one weight for all": (
        dict(features=spec(None, 4), labels=spec(None, dtype="int32"), sample_weight=spec(None)),
        dict(
            features=np.ones([6, 4], "f"),
            labels=np.arange(6, dtype="int32"),
            sample_weight=np.ones([6], "f"),
        ),
        dict(sample_weight=np.ones([1], "f")),
        "sample_weight",
    ),
    "one label for all": (
        dict(features=spec(None, 4), labels=spec(None, dtype="int32")),
        dict(features=np.ones([6, 4], "f"), labels=np.arange(6, dtype="int32")),
        dict(labels=np.array([3], "int32")),
        "labels",
    ),
    "features of one number": (
        dict(features=spec(None, None), labels=spec(None, dtype="int32")),
        dict(features=np.ones([6, 4], "f"), labels=np.arange(6, dtype="int32")),
        dict(features=np.ones([6, 1], "f")),
        "features",
    ),
    "features regrouped": (
        dict(features=spec(None, None, None), labels=spec(None, None, dtype="int32")),
        dict(features=np.ones([2, 3, 4], "f"), labels=np.arange(6, dtype="int32").reshape(2, 3)),
        dict(features=np.ones([2, 6, 2], "f")),
        "features",
    ),
}


def function_of(name, signature, centers, impl, jit):
    names = list(signature)

    @tf.function(input_signature=list(signature.values()), jit_compile=jit, autograph=False)
    def run(*arrays):
        given = dict(zip(names, arrays, strict=True))
        if name == "update_centers":
            given.pop("sample_weight", None)
            tcl.update_centers(**given, centers=centers, impl=impl)
            return tf.constant(0.0)
        return tcl.center_loss(**given, centers=centers, impl=impl)

    return lambda given: run(*(given[each] for each in names))


@pytest.mark.parametrize("jit", [False, True], ids=["function", "xla"])
@pytest.mark.parametrize("name", ["center_loss", "update_centers"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_shape_is_an_error_and_writes_nothing(impl, case, name, jit):
    signature, good, wrong, argument = CASES[case]
    if name == "update_centers" and argument == "sample_weight":
        return  # That function takes no weights.
    centers = tf.Variable(tf.zeros(CENTERS))
    run = function_of(name, signature, centers, impl, jit)
    run(good)
    before = centers.numpy()
    assert before.any()
    with pytest.raises(ERRORS, match=argument):
        run(good | wrong)
    assert np.array_equal(centers.numpy(), before)


@pytest.mark.parametrize("jit", [False, True], ids=["function", "xla"])
def test_a_table_with_an_unknown_number_of_classes(impl, jit):
    centers = tf.Variable(tf.zeros([5, 2]), shape=[None, 2])
    signature = dict(features=spec(None, 2), labels=spec(None, None))
    run = function_of("center_loss", signature, centers, impl, jit)
    features = np.ones([2, 2], "f")
    assert run(dict(features=features, labels=np.eye(5, dtype="f")[[1, 4]])) == 1.0
    with pytest.raises(ERRORS, match="labels"):
        run(dict(features=features, labels=np.eye(6, dtype="f")[[1, 5]]))


# One-hot rows without a largest number.

ROWS = {
    "all zero": [0.0, 0.0, 0.0],
    "negative zero": [0.0, -0.0, 0.0],
    "nan": [0.0, np.nan, 1.0],
    "inf": [0.0, np.inf, 1.0],
    "-inf": [1.0, -np.inf, 0.0],
    "ints": np.zeros(3, "int64"),
    "bools": np.zeros(3, bool),
    "bytes": np.zeros(3, "uint8"),
    "half": np.array([0.0, np.nan, 1.0], "float16"),
}


def with_row(row):
    row = np.asarray(row)
    return np.stack([np.eye(3)[1], row, np.eye(3)[0]]).astype(row.dtype)


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("ignore_class", [None, -1, 1])
def test_a_row_without_a_class_is_an_error_that_names_it(impl, row, mode, ignore_class):
    centers = tf.Variable(tf.ones([3, 2]))
    labels = with_row(ROWS[row])

    def step():
        return tcl.center_loss(
            tf.zeros([3, 2]),
            labels,
            centers,
            impl=impl,
            ignore_class=ignore_class,
            reduction="none",
        )

    run = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    if mode == "xla" and impl == "graph":
        # Nothing can raise there: the loss of the sample is NaN, and no center moves for it.
        assert np.isnan(run().numpy()).tolist() == [False, True, False]
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels\[1\].*one-hot row"):
        run()
    assert np.array_equal(centers.numpy(), np.ones([3, 2]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint16", "bool"])
def test_rows_of_every_type_name_their_class(impl, dtype):
    centers = tf.Variable(tf.zeros([3, 2]))
    tcl.update_centers(tf.ones([2, 2]), np.eye(3)[[2, 0]].astype(dtype), centers, impl=impl)
    assert centers.numpy().any(axis=1).tolist() == [True, False, True]


def test_probabilities_name_the_largest(impl):
    centers = tf.Variable(tf.zeros([3, 2]))
    tcl.update_centers(tf.ones([1, 2]), [[0.2, 0.1, 0.7]], centers, impl=impl)
    assert centers.numpy().any(axis=1).tolist() == [False, False, True]


# An ignored class that no int32 label can be.


@pytest.mark.parametrize("ignore_class", [2**32, -(2**32), 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
def test_an_ignored_class_beyond_int32_ignores_nothing(impl, ignore_class, mode):
    labels, centers = tf.constant([0, 1], tf.int32), tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    features = tf.zeros([2, 2])

    def gradients():
        with tf.GradientTape() as outer:
            outer.watch(features)
            with tf.GradientTape() as tape:
                tape.watch(features)
                loss = tcl.center_loss(
                    features,
                    labels,
                    centers,
                    impl=impl,
                    ignore_class=ignore_class,
                    update_centers=False,
                )
            first = tape.gradient(loss, [features, centers])
            total = tf.reduce_sum(first[0] ** 2) / 2
        return tf.convert_to_tensor(first[1]), outer.gradient(total, features)

    run = gradients if mode == "eager" else tf.function(gradients, jit_compile=mode == "xla")
    to_centers, second = run()
    np.testing.assert_allclose(to_centers, [[0.5, 1.0], [1.5, 2.0]])
    np.testing.assert_allclose(second, [[-0.25, -0.5], [-0.75, -1.0]])


def test_the_distance_metric_with_an_ignored_class_beyond_int32():
    layer = tcl.CenterLoss(2, ignore_class=2**32)
    layer(tf.constant([[3.0, 4.0], [0.0, 0.0]]), tf.constant([0, 1]), training=True)
    assert layer.distance.result() == 2.5
