"""What the layer takes: numbers of any integer type, forms of a call, masks; what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from child import run_program
from messages import with_words
from tolerances import assert_close

C, D, B = 4, 3, 6
LABELS = np.array([0, 1, 1, 3, 0, 1], np.int32)
WEIGHTS = np.array([1, 0, 2, 1, 0.5, 3], np.float32)


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)


def check_step(layer, features, labels, **options):
    """The layer's loss, centers and distance are those of one step from zeros."""
    truth = oracle.center_loss(features, labels, np.zeros([C, D]), **options)
    assert_close(layer.losses[-1], truth.loss, "float32", "loss")
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")


# Integers of other libraries.


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16])
def test_integers_of_numpy(features, kind):
    layer = tcl.CenterLoss(kind(C), ignore_class=kind(1))
    layer(features, LABELS, training=True)
    check_step(layer, features, LABELS, ignore_class=1)
    config = layer.get_config()
    assert type(config["num_classes"]) is int and type(config["ignore_class"]) is int
    assert tcl.CenterLoss.from_config(config).get_config() == config


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("num_classes", 2.0, TypeError),
        ("num_classes", "4", TypeError),
        ("num_classes", True, TypeError),
        ("num_classes", 0, ValueError),
        ("num_classes", np.int64(-1), ValueError),
        ("ignore_class", "1", TypeError),
        ("ignore_class", 1.5, TypeError),
        ("ignore_class", 255.0, TypeError),
        ("ignore_class", np.float32(1), TypeError),
        ("ignore_class", False, TypeError),
        ("ignore_class", 2**63, ValueError),
    ],
)
def test_what_is_no_integer_is_refused_at_construction(features, name, value, kind):
    with pytest.raises(kind, match=f"^{name}: expected .*an int"):
        tcl.CenterLoss(**{"num_classes": C} | {name: value})
    config = tcl.CenterLoss(C).get_config() | {name: value}
    with pytest.raises(TypeError, match=f"{name}: expected .*an int"):
        # Keras makes a TypeError of every error in from_config.
        tcl.CenterLoss.from_config(config)
    if name == "ignore_class":
        with pytest.raises(kind, match="^ignore_class: expected .*an int"):
            tcl.center_loss(features, LABELS, tf.Variable(tf.zeros([C, D])), ignore_class=value)


# Forms of a call.

FORMS = {
    "list": lambda x, y, w: [x, y] if w is None else [x, y, w],
    "tuple": lambda x, y, w: (x, y) if w is None else (x, y, w),
    "dict": lambda x, y, w: (
        {"labels": y, "features": x} | ({} if w is None else {"sample_weight": w})
    ),
}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_one_argument(features, form, weights):
    layer = tcl.CenterLoss(C)
    out = layer(FORMS[form](features, LABELS, weights), training=True)
    assert np.array_equal(out, features)
    check_step(layer, features, LABELS, sample_weight=weights)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_one_argument_of_a_functional_model(features, form, tmp_path):
    inputs = keras.Input([D]), keras.Input([], dtype="int64"), keras.Input([])
    layer = tcl.CenterLoss(C, name="centers")
    model = keras.Model(inputs, layer(FORMS[form](*inputs)))
    model.compile("sgd")
    model.fit((features, LABELS, WEIGHTS), batch_size=B, shuffle=False, verbose=0)
    truth = oracle.center_loss(features, LABELS, np.zeros([C, D]), sample_weight=WEIGHTS)
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_close(again.get_layer("centers").centers.numpy(), truth.centers, "float32", "centers")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x, y: ([x],), ["features", "list of 1"]),
        (lambda x, y: ([x, y, None, x],), ["features", "list of 4"]),
        (lambda x, y: ([x, None],), ["labels", "None"]),
        (lambda x, y: ([x, y], y), ["labels", "again"]),
        (lambda x, y: ({"features": x},), ["labels", "None"]),
        (lambda x, y: ({"features": x, "label": y},), ["'labels'", "['features', 'label']"]),
        (lambda x, y: ({"labels": y},), ["'features'", "['labels']"]),
    ],
)
def test_other_forms_are_refused(features, wrong, words):
    with pytest.raises(ValueError, match=with_words(*words)):
        tcl.CenterLoss(C)(*wrong(features, LABELS), training=True)


# Wrong inputs fail where the model is built, with the error of the function.

WRONG = {
    "float labels": dict(labels=keras.Input([])),
    "uint8 labels": dict(labels=keras.Input([], dtype="uint8")),
    "string labels": dict(labels=keras.Input([], dtype="string")),
    "column of labels": dict(labels=keras.Input([1], dtype="int32")),
    "rows of too many classes": dict(labels=keras.Input([C + 1])),
    "labels of rank 3": dict(labels=keras.Input([2, C], dtype="int32")),
    "integer features": dict(features=keras.Input([D], dtype="int32")),
    "column of weights": dict(sample_weight=keras.Input([1])),
    "string weights": dict(sample_weight=keras.Input([], dtype="string")),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_fail_when_the_model_is_built(what):
    right = dict(features=keras.Input([D]), labels=keras.Input([], dtype="int32"))
    inputs = right | WRONG[what]

    @tf.function(autograph=False)
    def function(**given):
        return tcl.center_loss(centers=tf.Variable(tf.zeros([C, D]), trainable=False), **given)

    specs = {k: tf.TensorSpec(t.shape, t.dtype) for k, t in inputs.items()}
    with pytest.raises((TypeError, ValueError), match=": expected") as expected:
        function.get_concrete_function(**specs)
    same = with_words(expected.value)
    with pytest.raises(expected.type, match=same):
        tcl.CenterLoss(C)(**inputs)
    with pytest.raises(expected.type, match=same):
        tcl.CenterLoss(C)(list(inputs.values()))


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_right_inputs_pass(dtype):
    for labels in (
        keras.Input([], dtype="int64"),
        keras.Input([C]),
        keras.Input([C], dtype="bool"),
    ):
        out = tcl.CenterLoss(C)(keras.Input([D], dtype=dtype), labels)
        assert out.shape == (None, D) and out.dtype == dtype


def test_the_advice_for_strings_works(features):
    names = np.array(["b", "c", "c", "d", "b", "c"])
    centers = tf.Variable(tf.zeros([C, D]), trainable=False)
    with pytest.raises(TypeError, match="StringLookup or tf.lookup"):
        tcl.center_loss(features, names, centers)
    with pytest.raises(TypeError, match="StringLookup or tf.lookup"):
        tcl.CenterLoss(C)(features, tf.constant(names))
    lookup = tf.keras.layers.StringLookup(vocabulary=["b", "c", "d"])
    tcl.center_loss(features, lookup(names), centers)
    assert np.flatnonzero(centers.numpy().any(axis=1)).tolist() == [1, 2, 3]


# Keras masks.


def masked_problem():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2, 5, D)).astype("f")
    labels = rng.integers(0, C, [2, 5])
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    return features, labels, mask


@pytest.mark.parametrize("label_type", ["int32", "int64", "rows"])
@pytest.mark.parametrize("ignored", [None, 2, 2**40], ids=str)
def test_masked_samples_count_nowhere_and_move_nothing(impl, ignored, label_type):
    features, labels, mask = masked_problem()
    features[0, 2], features[1, 4] = np.nan, np.inf
    if label_type == "rows":
        given = np.eye(C, dtype="f")[labels] * mask[..., None]  # padded rows name no class
    else:
        given = np.where(mask, labels, 99).astype(label_type)
    layer = tcl.CenterLoss(C, ignore_class=ignored, impl=impl)
    x = tf.constant(features)
    with tf.GradientTape() as tape:
        tape.watch(x)
        layer(x, given, mask=mask, training=True)
        loss = layer.losses[0]
    truth = oracle.center_loss(features[mask], labels[mask], np.zeros([C, D]), ignore_class=ignored)
    assert_close(loss, truth.loss, "float32", "loss")
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")
    gradient = tape.gradient(loss, x).numpy()
    assert not gradient[~mask].any()
    assert_close(gradient[mask], truth.feature_gradient, "float32", "gradient")
    counted = mask & (labels != ignored)
    assert float(layer.distance.count) == counted.sum()
    expected = np.linalg.norm(features[counted], axis=1).mean()
    np.testing.assert_allclose(layer.distance.result(), expected, rtol=1e-5)


def test_a_label_out_of_range_is_an_error_beside_a_mask(impl):
    features, labels, mask = masked_problem()
    labels[0, 0] = C
    layer = tcl.CenterLoss(C, impl=impl)
    with pytest.raises((ValueError, tf.errors.OpError), match="outside"):
        layer(features, labels, mask=mask, training=True)
    assert not layer.centers.numpy().any()


@pytest.mark.parametrize("form", ["arguments", *FORMS])
def test_the_mask_of_an_embedding(form):
    words, labels = keras.Input([5], dtype="int32"), keras.Input([5], dtype="int32")
    embedding = keras.layers.Embedding(7, D, mask_zero=True)
    layer = tcl.CenterLoss(C)
    embedded = embedding(words)
    given = (embedded, labels) if form == "arguments" else (FORMS[form](embedded, labels, None),)
    model = keras.Model([words, labels], layer(*given))
    model.compile(keras.optimizers.SGD(0.0))
    x = np.array([[1, 2, 0, 0, 0], [3, 1, 2, 6, 0]])
    y = np.where(x > 0, np.arange(10).reshape(2, 5) % C, -7)
    out = model([x, y])
    # It passes on, to the layers behind.
    assert np.array_equal(out._keras_mask, x > 0)
    model.fit([x, y], verbose=0, batch_size=2)
    counted = np.asarray(embedding(x))[x > 0]
    truth = oracle.center_loss(counted, y[x > 0], np.zeros([C, D]))
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")


def test_masked_samples_of_a_deferred_update(impl):
    features, labels, mask = masked_problem()
    layer = tcl.CenterLoss(C, impl=impl, deferred_update=True)
    layer(features, np.where(mask, labels, -1).astype("int32"), mask=mask, training=True)
    layer(features + 1, labels.astype("int32"), training=True)
    layer.apply_deferred_update()
    both = np.concatenate([features[mask], (features + 1).reshape(-1, D)])
    truth = oracle.center_loss(
        both, np.concatenate([labels[mask], labels.reshape(-1)]), np.zeros([C, D])
    )
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")


@pytest.mark.parametrize(
    "wrong, kind, words",
    [
        (np.ones([2, 4], bool), ValueError, r"mask: expected shape \(2, 5\)"),
        (np.ones([5], bool), ValueError, r"mask: expected shape \(2, 5\)"),
    ],
)
def test_a_wrong_mask_is_refused(wrong, kind, words):
    features, labels, _ = masked_problem()
    with pytest.raises(kind, match=words):
        tcl.CenterLoss(C)(features, labels, mask=wrong, training=True)


@pytest.mark.parametrize("shape", [[2, 5], [None, None]], ids=["known", "unknown"])
@pytest.mark.parametrize("jit_compile", [False, True], ids=["function", "XLA"])
def test_masks_in_functions(impl, jit_compile, shape):
    features, labels, mask = masked_problem()
    layer = tcl.CenterLoss(C, impl=impl)
    layer.build((None, None, D))
    specs = [
        tf.TensorSpec([*shape, D]),
        tf.TensorSpec(shape, tf.int32),
        tf.TensorSpec(shape, tf.bool),
    ]

    @tf.function(input_signature=specs, jit_compile=jit_compile, autograph=False)
    def call(x, y, mask):
        layer(x, y, mask=mask, training=True)
        return layer.losses[-1]

    loss = call(features, labels.astype("int32"), mask)
    truth = oracle.center_loss(features[mask], labels[mask], np.zeros([C, D]))
    assert_close(loss, truth.loss, "float32", "loss")
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")
    if shape[0] is None:
        # As many numbers, in another shape.
        with pytest.raises((ValueError, tf.errors.OpError), match="mask"):
            call(features, labels.astype("int32"), mask.T)


def test_masks_on_replicas(tmp_path):
    run_program("replicas_masks", cwd=tmp_path)
