"""Centers are saved and restored exactly, and training goes on from there bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

C, D, WIDTH = 12, 7, 5


def make_model(impl):
    inputs = keras.Input([WIDTH], name="inputs")
    labels = keras.Input([], dtype="int32", name="labels")
    features = keras.layers.Dense(D, name="features")(inputs)
    features = tcl.CenterLoss(C, weight=0.1, alpha=0.3, impl=impl, name="center_loss")(
        [features, labels]
    )
    outputs = keras.layers.Dense(C, name="logits")(features)
    model = keras.Model([inputs, labels], outputs)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(48, WIDTH)).astype(np.float32), rng.integers(0, C, 48).astype(np.int32)


def train(model, data):
    inputs, labels = data
    model.fit([inputs, labels], labels, batch_size=16, epochs=2, shuffle=False, verbose=0)


def weights(model):
    return [variable.numpy() for variable in model.weights]


def test_checkpoint_of_the_variable(impl, tmp_path):
    centers = tf.Variable(tf.random.normal([C, D]))
    features, labels = tf.random.normal([20, D]), np.arange(20) % C
    tcl.update_centers(features, labels, centers, impl=impl)
    saved = centers.numpy()
    path = tf.train.Checkpoint(centers=centers).save(str(tmp_path / "checkpoint"))
    tcl.update_centers(features, labels, centers, impl=impl)
    went_on = centers.numpy()
    other = tf.Variable(tf.zeros([C, D]))
    tf.train.Checkpoint(centers=other).restore(path).assert_consumed()
    assert np.array_equal(other.numpy(), saved)
    tcl.update_centers(features, labels, other, impl=impl)
    assert np.array_equal(other.numpy(), went_on)
    # Restoring into a table that is in use works too.
    tf.train.Checkpoint(centers=centers).restore(path).assert_consumed()
    assert np.array_equal(centers.numpy(), saved)


@pytest.mark.parametrize("kind", ["model.keras", "model.weights.h5", "checkpoint"])
def test_a_model_goes_on_bit_for_bit(impl, data, tmp_path, kind):
    model = make_model(impl)
    train(model, data)
    assert model.get_layer("center_loss").centers.numpy().any()
    saved, path = weights(model), str(tmp_path / kind)
    if kind == "model.keras":
        model.save(path)
        other = keras.models.load_model(path)
    elif kind == "model.weights.h5":
        model.save_weights(path)
        other = make_model(impl)
        other.optimizer.build(other.trainable_variables)
        other.load_weights(path)
    else:
        path = tf.train.Checkpoint(model=model).save(path)
        other = make_model(impl)
        train(other, data)  # so that the optimizer's variables exist
        tf.train.Checkpoint(model=other).restore(path)
    for a, b in zip(weights(other), saved, strict=True):
        assert np.array_equal(a, b)
    train(model, data)
    train(other, data)
    for a, b in zip(weights(other), weights(model), strict=True):
        assert np.array_equal(a, b)


def test_configuration_survives_in_the_file(impl, data, tmp_path):
    model = make_model(impl)
    model.save(tmp_path / "model.keras")
    layer = keras.models.load_model(tmp_path / "model.keras").get_layer("center_loss")
    assert isinstance(layer, tcl.CenterLoss)
    assert layer.get_config() == model.get_layer("center_loss").get_config()
