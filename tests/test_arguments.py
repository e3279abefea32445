"""A wrong argument raises one clear error, the same on every path."""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from messages import with_words

RULES = ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"]


def good():
    """Arguments that work: 4 samples of 3 numbers, 10 classes."""
    return dict(
        features=np.ones([4, 3], np.float32),
        labels=np.array([0, 1, 2, 1]),
        centers=tf.Variable(tf.zeros([10, 3]), name="centers"),
    )


def variable(*shape, dtype="float32"):
    """A function that makes a variable when the test runs, not when it is collected."""
    return lambda: tf.Variable(tf.zeros(shape, dtype), name="centers")


def features(dtype):
    return lambda: tf.ones([4, 3], dtype)


# {case: (arguments that replace good ones, words of the message)}. The words: the argument, what
# came, what was expected.
CASES = {
    "features of strings": (dict(features=[["a", "b", "c"]] * 4), "features string float32"),
    "features of integers": (dict(features=[[1, 2, 3]] * 4), "features int32 float32"),
    "features of booleans": (dict(features=[[True] * 3] * 4), "features bool float32"),
    "features None": (dict(features=None), "features None"),
    "features a number": (dict(features=1.5), "features"),
    "features ragged": (dict(features=lambda: tf.ragged.constant([[1.0, 2], [3.0]])), "features"),
    "features too narrow": (dict(features=np.ones([4, 2], "f")), "features 2 centers 3"),
    "features too wide": (dict(features=np.ones([4, 5], "f")), "features 5 centers 3"),
    "features float64": (dict(features=features("float64")), "features float64 centers float32"),
    "labels of strings": (dict(labels=["a", "b", "c", "b"]), "labels string int32"),
    "labels of floats": (dict(labels=[0.0, 1.0, 2.0, 1.0]), "labels float32 int32"),
    "labels of doubles": (dict(labels=np.array([0.0, 1.0, 2.0, 1.0])), "labels float64 int32"),
    "labels of booleans": (dict(labels=[True, False, True, True]), "labels bool int32"),
    "labels int16": (dict(labels=np.array([0, 1, 2, 1], np.int16)), "labels int16 int32 cast"),
    "labels uint8": (dict(labels=np.array([0, 1, 2, 1], np.uint8)), "labels uint8 int32 cast"),
    "labels None": (dict(labels=None), "labels None"),
    "labels a number": (dict(labels=1), "labels features"),
    "labels too few": (dict(labels=[0, 1, 2]), "labels 3 features 4"),
    "labels too many": (dict(labels=[0, 1, 2, 3, 4]), "labels 5 features 4"),
    "labels of rank 3": (dict(labels=np.zeros([4, 1, 1], int)), "labels 3 features"),
    "labels as a column": (dict(labels=[[0], [1], [2], [1]]), "labels 1 10"),
    "one-hot too narrow": (dict(labels=np.eye(9)[:4]), "labels 9 10"),
    "one-hot too wide": (dict(labels=np.eye(11, dtype=int)[:4]), "labels 11 10"),
    "one-hot too few": (dict(labels=np.eye(10, dtype="f")[:3]), "labels 3 features 4"),
    "centers an array": (dict(centers=np.zeros([10, 3], "f")), "centers ndarray tf.Variable"),
    "centers a tensor": (dict(centers=lambda: tf.zeros([10, 3])), "centers Tensor tf.Variable"),
    "centers a list": (dict(centers=[[0.0] * 3] * 10), "centers list tf.Variable"),
    "centers None": (dict(centers=None), "centers None tf.Variable"),
    "centers of integers": (dict(centers=variable(10, 3, dtype="int32")), "centers int32 float32"),
    "centers float16": (dict(centers=variable(10, 3, dtype="float16")), "centers float16 float32"),
    "centers of rank 1": (dict(centers=variable(10)), "centers [C, D] 10"),
    "centers of rank 3": (dict(centers=variable(10, 3, 1)), "centers [C, D] 10 3 1"),
    "half with float64 centers": (
        dict(features=features("float16"), centers=variable(10, 3, dtype="float64")),
        "features float16 centers float64",
    ),
    "bfloat16 with float64 centers": (
        dict(features=features("bfloat16"), centers=variable(10, 3, dtype="float64")),
        "features bfloat16 centers float64",
    ),
    "float32 with float64 centers": (
        dict(centers=variable(10, 3, dtype="float64")),
        "features float32 centers float64",
    ),
    "rule misspelt": (dict(rule="papr"), " ".join(["rule", "papr", *RULES])),
    "rule None": (dict(rule=None), "rule None paper"),
    "rule in capitals": (dict(rule="PAPER"), "rule PAPER paper"),
    "reduction unknown": (dict(reduction="avg"), "reduction avg mean sum none"),
    "reduction None": (dict(reduction=None), "reduction None mean sum none"),
    "alpha negative": (dict(alpha=-0.25), "alpha -0.25"),
    "alpha nan": (dict(alpha=float("nan")), "alpha nan"),
    "alpha inf": (dict(alpha=float("inf")), "alpha inf"),
    "alpha -inf": (dict(alpha=np.float32(-np.inf)), "alpha -inf"),
    "alpha a string": (dict(alpha="0.5"), "alpha 0.5"),
    "alpha None": (dict(alpha=None), "alpha None"),
    "alpha a list": (dict(alpha=[0.5, 0.5]), "alpha 0.5 number"),
    "alpha a vector": (dict(alpha=lambda: tf.constant([0.5, 0.5])), "alpha scalar"),
    "alpha a string tensor": (dict(alpha=lambda: tf.constant("0.5")), "alpha string"),
    "alpha a boolean": (dict(alpha=True), "alpha True bool"),
    "alpha a boolean tensor": (dict(alpha=lambda: tf.constant(True)), "alpha bool"),
    "weights too few": (dict(sample_weight=[1.0, 2.0, 3.0]), "sample_weight 3 4"),
    "weights a number": (dict(sample_weight=2.0), "sample_weight 4"),
    "weights a column": (dict(sample_weight=np.ones([4, 1], "f")), "sample_weight 1 4"),
    "weights of one-hot's shape": (
        dict(labels=np.eye(10)[:4], sample_weight=np.ones([4, 10], "f")),
        "sample_weight 10 4",
    ),
    "weights of strings": (dict(sample_weight=["a"] * 4), "sample_weight string"),
    "weights of booleans": (dict(sample_weight=[True, False, True, True]), "sample_weight bool"),
    "update_centers a number": (dict(update_centers=1), "update_centers 1 True False"),
    "ignore_class a boolean": (dict(ignore_class=True), "ignore_class True bool"),
    "ignore_class a fraction": (dict(ignore_class=1.5), "ignore_class 1.5"),
    "ignore_class a string": (dict(ignore_class="none"), "ignore_class none"),
}
LOSS_ONLY = {"reduction", "sample_weight", "update_centers"}


def arguments(case):
    """Fresh arguments of a case."""
    given = good() | CASES[case][0]
    return {key: value() if callable(value) else value for key, value in given.items()}


def message(function, case, impl, traced=False):
    """The error's text, which has the words of the case. The centers must be unchanged."""
    kwargs = arguments(case)

    def call():
        return function(**kwargs, impl=impl)

    words = with_words(*CASES[case][1].split())
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        (tf.function(call) if traced else call)()
    if isinstance(kwargs["centers"], tf.Variable):
        assert not kwargs["centers"].numpy().any()
    return str(caught.value)


def test_the_arguments_the_cases_start_from_work(impl):
    tcl.center_loss(**good(), impl=impl)
    tcl.update_centers(**good(), impl=impl)


@pytest.mark.parametrize("case", CASES)
def test_center_loss_refuses_the_argument(impl, case):
    message(tcl.center_loss, case, impl)


@pytest.mark.parametrize("case", CASES)
def test_the_error_has_the_same_text_on_every_path(implementations, case):
    texts = {message(tcl.center_loss, case, impl) for impl in ["auto", *implementations]}
    assert len(texts) == 1, texts


@pytest.mark.parametrize("case", CASES)
def test_the_argument_is_refused_while_tracing(case):
    message(tcl.center_loss, case, "auto", traced=True)


@pytest.mark.parametrize("case", [c for c in CASES if not LOSS_ONLY & CASES[c][0].keys()])
def test_update_centers_refuses_the_argument(impl, case):
    message(tcl.update_centers, case, impl)


@pytest.mark.parametrize("function", [tcl.center_loss, tcl.update_centers])
@pytest.mark.parametrize("wrong", ["cuda", "", None, 3])
def test_an_unknown_impl_is_refused(function, wrong):
    words = with_words("impl", repr(wrong), "auto", "native", "graph")
    with pytest.raises((ValueError, TypeError), match=words):
        function(**good(), impl=wrong)


@pytest.mark.parametrize("text", ["features", "labels", "centers"])
def test_a_missing_argument_is_named(text):
    kwargs = good()
    del kwargs[text]
    with pytest.raises(TypeError, match=text):
        tcl.center_loss(**kwargs)


@pytest.mark.parametrize("value", [-0.25, np.nan, np.inf])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("kind", [tf.constant, tf.Variable])
@pytest.mark.parametrize("function", [tcl.center_loss, tcl.update_centers])
def test_a_bad_alpha_is_refused_at_run_time(impl, function, kind, traced, value):
    kwargs = good() | dict(alpha=kind(value))

    def call(alpha):
        return function(**(kwargs | dict(alpha=alpha)), impl=impl)

    alpha = kwargs["alpha"]
    errors = (ValueError, TypeError, tf.errors.OpError)
    with pytest.raises(errors, match=with_words("alpha", value)):
        (tf.function(call) if traced else call)(alpha)
    assert not kwargs["centers"].numpy().any()


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_wrong_width_is_refused_at_run_time(impl, width):
    centers = tf.Variable(tf.zeros([10, 3]))

    @tf.function(input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int32)])
    def step(features, labels):
        return tcl.center_loss(features, labels, centers, impl=impl)

    if width == 3:
        assert step(tf.ones([2, 3]), [0, 1]) == 1.5
        return
    # The error is TensorFlow's; the name of its op says what was expected.
    words = with_words("features_of_width_D", f"[2,{width}]", "[?,3]")
    with pytest.raises((ValueError, tf.errors.OpError), match=words):
        step(tf.ones([2, width]), [0, 1])
    assert not centers.numpy().any()


@pytest.mark.parametrize(
    "labels, weights", [([0, 1, 2], None), ([0], None), ([], None), ([0, 1], [1.0, 2.0, 3.0])]
)
def test_wrong_lengths_are_refused_at_run_time(impl, labels, weights):
    centers = tf.Variable(tf.zeros([10, 3]))

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 3]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None]),
        ]
    )
    def step(features, labels, weights):
        return tcl.center_loss(features, labels, centers, sample_weight=weights, impl=impl)

    step(tf.zeros([2, 3]), [0, 1], [1.0, 1.0])
    wrong, count = ("sample_weight", 3) if weights else ("labels", len(labels))
    words = rf"{wrong}: expected shape \[2\].*, got \[{count}\]"
    with pytest.raises((ValueError, tf.errors.OpError), match=words):
        step(tf.ones([2, 3]), tf.constant(labels, tf.int32), weights or [1.0, 1.0])
    assert not centers.numpy().any()


def test_an_uninitialised_variable_is_refused(impl):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        centers = tf.compat.v1.get_variable("centers", [10, 3], use_resource=True)
        loss = tcl.center_loss(tf.ones([4, 3]), [0, 1, 2, 1], centers, impl=impl)
        with pytest.raises(tf.errors.FailedPreconditionError, match="(?i)centers.*initiali[sz]ed"):
            session.run(loss)


def test_a_reference_variable_is_refused(impl):
    with tf.Graph().as_default():
        centers = tf.compat.v1.get_variable("centers", [10, 3], use_resource=False)
        with pytest.raises((ValueError, TypeError), match="(?s)centers.*resource"):
            tcl.center_loss(tf.ones([4, 3]), [0, 1, 2, 1], centers, impl=impl)


def test_a_variable_of_tensorflow_1_that_a_partitioner_split():
    with tf.Graph().as_default():
        centers = tf.compat.v1.get_variable(
            "centers", [10, 3], partitioner=tf.compat.v1.fixed_size_partitioner(2)
        )
        with pytest.raises(TypeError, match="centers.*partitioner has split.*ShardedCenters"):
            tcl.center_loss(tf.ones([4, 3]), [0, 1, 2, 1], centers)


def test_a_column_of_class_ids_says_how_to_reshape_it():
    centers = tf.Variable(tf.zeros([10, 3]))
    with pytest.raises(ValueError, match=r"labels.*tf.reshape\(labels, \[-1\]\)"):
        tcl.center_loss(tf.ones([4, 3]), [[0], [1], [2], [1]], centers)
    with pytest.raises(ValueError, match=r"labels.*tf.squeeze\(labels, -1\)"):
        tcl.center_loss(tf.ones([2, 2, 3]), [[[0], [1]], [[2], [1]]], centers)
