"""The Keras layer: passes features on, adds its loss, moves its centers in training only."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from messages import with_words
from tolerances import assert_close

C, D, B = 4, 3, 6
LABELS = np.array([0, 1, 1, 3, 0, 1], np.int32)


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)


def centers_of(layer):
    return keras.ops.convert_to_numpy(layer.centers)


def check_step(layer, features, labels, weight, **options):
    """The layer's loss and centers are those of one step from zeros."""
    truth = oracle.center_loss(features, labels, np.zeros([C, D]), **options)
    assert len(layer.losses) == 1
    assert_close(layer.losses[0], weight * truth.loss, "float32", "loss")
    assert_close(centers_of(layer), truth.centers, "float32", "centers")


@pytest.mark.parametrize("form", ["keywords", "positions", "list"])
def test_a_training_call_moves_the_centers(impl, features, form):
    layer = tcl.CenterLoss(C, loss_weight=0.25, impl=impl)
    if form == "keywords":
        out = layer(features, labels=LABELS, sample_weight=None, training=True)
    elif form == "positions":
        out = layer(features, LABELS, training=True)
    else:
        out = layer([features, LABELS], training=True)
    assert np.array_equal(out, features)
    check_step(layer, features, LABELS, 0.25)


def test_an_inference_call_moves_nothing(impl, features):
    layer = tcl.CenterLoss(C, loss_weight=0.25, impl=impl)
    for training in (False, None):
        out = layer(features, LABELS, training=training)
        assert np.array_equal(out, features)
        assert not centers_of(layer).any()
        expected = oracle.center_loss(features, LABELS, np.zeros([C, D])).loss
        np.testing.assert_allclose(layer.losses[0], 0.25 * expected, rtol=1e-5)


def test_all_options_reach_the_op(impl, features):
    options = dict(alpha=0.125, rule="batch_mean", reduction="sum", ignore_class=1)
    layer = tcl.CenterLoss(C, impl=impl, **options)
    layer(features, LABELS, training=True)
    check_step(layer, features, LABELS, 1.0, **options)


def test_one_hot_labels(impl, features):
    layer = tcl.CenterLoss(C, impl=impl)
    layer(features, np.eye(C, dtype=np.float32)[LABELS], training=True)
    check_step(layer, features, LABELS, 1.0)


def test_sample_weight(impl, features):
    weights = np.array([1, 0, 2, 1, 0.5, 3], np.float32)
    layer = tcl.CenterLoss(C, impl=impl)
    layer(features, LABELS, sample_weight=weights, training=True)
    check_step(layer, features, LABELS, 1.0, sample_weight=weights)


def test_features_of_rank_three(impl):
    features = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
    layer = tcl.CenterLoss(C, impl=impl)
    out = layer(features, LABELS.reshape(2, 3), training=True)
    assert out.shape == (2, 3, D)
    check_step(layer, features, LABELS.reshape(2, 3), 1.0)


def test_centers_are_a_weight_that_no_optimizer_touches(impl, features):
    layer = tcl.CenterLoss(C, impl=impl)
    layer(features, LABELS)
    assert layer.centers.shape == (C, D)
    assert layer.centers.dtype == "float32"
    assert not layer.centers.trainable
    assert layer.trainable_weights == []
    assert any(weight is layer.centers for weight in layer.non_trainable_weights)


def test_initializer(impl, features):
    layer = tcl.CenterLoss(C, centers_initializer="ones", impl=impl)
    layer(features, LABELS)
    assert (centers_of(layer) == 1).all()
    initializer = keras.initializers.RandomNormal(seed=3)
    layer = tcl.CenterLoss(C, centers_initializer=initializer, impl=impl)
    layer(features, LABELS)
    assert centers_of(layer).std() > 0


def test_inference_after_training_keeps_the_centers(impl, features):
    layer = tcl.CenterLoss(C, impl=impl)
    layer(features, LABELS, training=True)
    moved = centers_of(layer)
    layer(features, LABELS, training=False)
    assert np.array_equal(centers_of(layer), moved)


def test_gradient_reaches_the_features(impl, features):
    layer = tcl.CenterLoss(C, loss_weight=0.5, reduction="sum", impl=impl)
    x = tf.constant(features)
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(x, LABELS, training=True)
        total = tf.reduce_sum(2.0 * out) + sum(layer.losses)
    # The centers were zeros: the residual is x itself.
    np.testing.assert_allclose(tape.gradient(total, x), 2 + 0.5 * features, rtol=1e-6)


def test_the_configuration_restores_the_layer(impl):
    layer = tcl.CenterLoss(
        C,
        loss_weight=0.25,
        alpha=0.125,
        rule="tutorial",
        reduction="sum",
        centers_initializer="ones",
        ignore_class=-1,
        impl=impl,
        name="my_centers",
    )
    config = layer.get_config()
    copy = tcl.CenterLoss.from_config(config)
    assert copy.get_config() == config
    for key in ("loss_weight", "alpha", "rule", "reduction", "ignore_class", "impl"):
        assert config[key] == getattr(copy, key)
    assert config["num_classes"] == C and copy.name == "my_centers"
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(again, tcl.CenterLoss)
    assert again.get_config() == config


def test_registered_name():
    assert keras.saving.get_registered_name(tcl.CenterLoss) == "tf_center_loss_op>CenterLoss"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rule="papr"),
        dict(reduction="avg"),
        dict(alpha=-1.0),
        dict(alpha=float("nan")),
        dict(impl="cuda"),
        dict(ignore_class=0.5),
        dict(num_classes=0),
        dict(num_classes=2.5),
    ],
    ids=str,
)
def test_wrong_options_are_refused(features, wrong):
    words = with_words(*wrong, *wrong.values())
    with pytest.raises((ValueError, TypeError), match=words):
        tcl.CenterLoss(**dict(num_classes=C) | wrong)(features, LABELS)


def test_wrong_labels_are_refused(impl, features):
    layer = tcl.CenterLoss(C, impl=impl)
    layer(features, LABELS)
    with pytest.raises((ValueError, tf.errors.OpError), match=r"labels\[2\] = 4 is outside"):
        layer(features, np.array([0, 1, 4, 3, 0, 1]), training=True)
    with pytest.raises((ValueError, TypeError), match="labels"):
        layer(features, LABELS.astype(np.float32), training=True)
    assert not centers_of(layer).any()


@pytest.mark.parametrize("training", [None, False, True])
def test_a_call_without_labels_is_refused(features, training):
    # A layer that silently does nothing would be worse than an error.
    with pytest.raises((ValueError, TypeError), match="labels"):
        tcl.CenterLoss(C)(features, training=training)


class Subclassed(keras.Model):
    """Dense features, centers, dense logits; labels come with the inputs."""

    def __init__(self, impl):
        super().__init__()
        self.dense = keras.layers.Dense(D)
        self.center_loss = tcl.CenterLoss(C, loss_weight=0.1, impl=impl)
        self.logits = keras.layers.Dense(C)

    def call(self, inputs, training=None):
        features = self.dense(inputs["inputs"])
        features = self.center_loss(features, inputs["labels"], training=training)
        return self.logits(features)


def functional(impl):
    inputs = keras.Input([5], name="inputs")
    labels = keras.Input([], dtype="int32", name="labels")
    center_loss = tcl.CenterLoss(C, loss_weight=0.1, impl=impl)
    features = center_loss([keras.layers.Dense(D)(inputs), labels])
    model = keras.Model(dict(inputs=inputs, labels=labels), keras.layers.Dense(C)(features))
    model.center_loss = center_loss
    return model


@pytest.mark.parametrize("eager", [False, True], ids=["function", "eager"])
@pytest.mark.parametrize("make", [functional, Subclassed])
def test_fit_evaluate_predict(impl, make, eager):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, 60).astype(np.int32)
    x = dict(inputs=(np.eye(5)[labels] + rng.normal(size=(60, 5)) / 10).astype("f"), labels=labels)
    model = make(impl)
    model.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly=eager,
    )
    history = model.fit(x, labels, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    moved = centers_of(model.center_loss)
    assert moved.all(axis=1).all() and np.isfinite(moved).all()
    model.evaluate(x, labels, verbose=0)
    model.predict(x, verbose=0)
    assert np.array_equal(centers_of(model.center_loss), moved)


def test_fit_adds_the_loss_and_makes_the_steps_of_the_op(impl, features):
    # The model has only this layer, so every number of `fit` is known.
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, loss_weight=0.5, alpha=0.3, impl=impl)
    model = keras.Model([inputs, labels], layer([inputs, labels]))
    model.compile("sgd")
    x = np.concatenate([features, features + 1])
    y = np.concatenate([LABELS, LABELS[::-1]])
    history = model.fit([x, y], batch_size=B, epochs=2, shuffle=False, verbose=0).history
    centers, losses = np.zeros([C, D]), []
    for i in range(4):
        part = slice(i % 2 * B, i % 2 * B + B)
        truth = oracle.center_loss(x[part], y[part], centers, alpha=0.3)
        centers = truth.centers
        losses.append(0.5 * truth.loss)
    np.testing.assert_allclose(centers_of(layer), centers, rtol=1e-5, atol=1e-6)
    expected = [np.mean(losses[:2]), np.mean(losses[2:])]
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    result = model.evaluate([features, LABELS], batch_size=B, verbose=0)
    expected = 0.5 * oracle.center_loss(features, LABELS, centers).loss
    np.testing.assert_allclose(np.ravel(result)[0], expected, rtol=1e-5)


def test_training_pulls_the_classes_together(impl):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, 400).astype(np.int32)
    inputs = (np.eye(5)[labels] + rng.normal(size=(400, 5)) / 3).astype(np.float32)
    spread = []
    for weight in (0.0, 1.0):
        keras.utils.set_random_seed(1)
        model = functional(impl)
        model.center_loss.loss_weight = weight
        model.compile(
            keras.optimizers.Adam(0.02),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(dict(inputs=inputs, labels=labels), labels, epochs=8, verbose=0)
        dense = next(layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
        embedded = np.asarray(dense(inputs))
        means = np.stack([embedded[labels == j].mean(axis=0) for j in range(C)])
        spread.append(np.square(embedded - means[labels]).sum(axis=1).mean())
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(impl, policy):
    inputs, labels = keras.Input([5]), keras.Input([], dtype="int32")
    dense = keras.layers.Dense(D, dtype=policy)
    layer = tcl.CenterLoss(3000, loss_weight=0.1, dtype=policy, impl=impl)
    out = keras.layers.Dense(1, dtype="float32")(layer([dense(inputs), labels]))
    model = keras.Model([inputs, labels], out)
    model.compile("adam", "mse")
    # float16 cannot hold 2999, nor bfloat16 257.
    y = np.array([2999, 2049, 257, 2999], np.int32)
    x = np.ones([4, 5], np.float32)
    model.fit([x, y], np.zeros([4, 1]), epochs=2, verbose=0)
    assert layer.centers.dtype == "float32"
    assert np.flatnonzero(centers_of(layer).any(axis=1)).tolist() == [257, 2049, 2999]


def test_two_layers_in_a_model(impl):
    # Two tables in one model, each with its own labels and its own loss.
    inputs = keras.Input([D])
    coarse, fine = keras.Input([], dtype="int32"), keras.Input([], dtype="int32")
    first = tcl.CenterLoss(2, loss_weight=1.0, impl=impl)
    second = tcl.CenterLoss(9, loss_weight=1.0, impl=impl)
    model = keras.Model([inputs, coarse, fine], second([first([inputs, coarse]), fine]))
    model.compile(keras.optimizers.SGD(0.1))
    x, y = np.ones([4, D], np.float32), np.array([0, 1, 0, 1], np.int32)
    history = model.fit([x, y, y * 8], batch_size=4, epochs=1, verbose=0).history
    np.testing.assert_allclose(history["loss"], [2 * D / 2], rtol=1e-6)
    assert np.flatnonzero(centers_of(first).any(axis=1)).tolist() == [0, 1]
    assert np.flatnonzero(centers_of(second).any(axis=1)).tolist() == [0, 8]


def test_stateless_call(impl, features):
    layer = tcl.CenterLoss(C, loss_weight=0.25, impl=impl)
    layer.build((None, D))
    start = [tf.identity(variable.value) for variable in layer.non_trainable_variables]
    out, after, losses = layer.stateless_call(
        [], start, features, LABELS, training=True, return_losses=True
    )
    truth = oracle.center_loss(features, LABELS, np.zeros([C, D]))
    assert np.array_equal(out, features)
    moved = next(value for value in after if value.shape == (C, D))
    assert_close(moved, truth.centers, "float32", "centers")
    assert_close(losses[0], 0.25 * truth.loss, "float32", "loss")
    # The layer's own state is not part of it.
    assert not centers_of(layer).any()
