"""deferred_update=True: what accumulates, what an error or a warning says, and that it helps."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from tolerances import assert_close

B, D, C = 12, 3, 5
REMEDY = r"tf_center_loss_op.update_centers\(features, labels, layer.centers"


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


@pytest.fixture
def layer(impl):
    layer = tcl.CenterLoss(C, alpha=0.3, deferred_update=True, impl=impl)
    layer.build((None, D))
    return layer


def parts(batch):
    dataset = tf.data.Dataset.from_tensor_slices(batch)
    return dataset.batch(4)


def check_one_step(layer, batch):
    truth = oracle.center_loss(*batch, np.zeros([C, D]), alpha=0.3)
    assert_close(layer.centers.numpy(), truth.centers, "float32", "centers")


# A function for each part of the batch, and the update outside of it.


def test_an_update_outside_of_the_function_says_what_works(layer, batch):
    @tf.function
    def micro_step(x, y):
        layer(x, y, training=True)
        return x, y

    results = [micro_step(x, y) for x, y in parts(batch)]
    with pytest.raises(RuntimeError, match=f"got calls in another tf.function.*{REMEDY}"):
        layer.apply_deferred_update()
    # What it says: the function returns features and labels.
    features, labels = (tf.concat(tensors, axis=0) for tensors in zip(*results, strict=True))
    tcl.update_centers(features, labels, layer.centers, alpha=layer.alpha, rule=layer.rule)
    check_one_step(layer, batch)


def test_an_update_in_another_function_says_what_works(layer, batch):
    tf.function(lambda x, y: layer(x, y, training=True))(*batch)
    with pytest.raises(RuntimeError, match=f"got calls in another tf.function.*{REMEDY}"):
        tf.function(layer.apply_deferred_update)()


# A loop over a dataset inside of a function.


def test_an_update_after_a_loop_says_what_works(layer, batch):
    @tf.function
    def epoch(dataset):
        for x, y in dataset:
            layer(x, y, training=True)
        layer.apply_deferred_update()

    with pytest.raises(RuntimeError, match=f"a loop or branch of this one.*{REMEDY}"):
        epoch(parts(batch))

    # What it says: the loop concatenates features and labels.
    @tf.function
    def accumulated(dataset):
        features, labels = tf.zeros([0, D]), tf.zeros([0], tf.int32)
        for x, y in dataset:
            tf.autograph.experimental.set_loop_options(
                shape_invariants=[
                    (features, tf.TensorShape([None, D])),
                    (labels, tf.TensorShape([None])),
                ]
            )
            layer(x, y, training=True)
            features = tf.concat([features, x], axis=0)
            labels = tf.concat([labels, y], axis=0)
        tcl.update_centers(features, labels, layer.centers, alpha=layer.alpha, rule=layer.rule)

    accumulated(parts(batch))
    check_one_step(layer, batch)


def test_both_in_the_body_of_a_loop(layer, batch):
    @tf.function
    def epoch(dataset):
        for x, y in dataset:
            layer(x, y, training=True)
            layer.apply_deferred_update()

    epoch(parts(batch))
    centers = np.zeros([C, D])
    for k in range(0, B, 4):
        part = slice(k, k + 4)
        centers = oracle.center_loss(batch[0][part], batch[1][part], centers, alpha=0.3).centers
    assert_close(layer.centers.numpy(), centers, "float32", "centers")


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_batches_of_different_types_count_as_one(layer, batch, traced):
    def step():
        layer(batch[0][:5].astype("f2"), batch[1][:5].astype("i8"), training=True)
        layer(batch[0][5:], batch[1][5:], training=True)
        layer.apply_deferred_update()

    (tf.function(step) if traced else step)()
    rounded = np.concatenate([batch[0][:5].astype("f2").astype("f"), batch[0][5:]])
    check_one_step(layer, (rounded, batch[1]))


# fit without the mixin.


class AfterStep(tcl.training.UpdateCentersAfterStep, keras.Model):
    pass


class OwnStep(keras.Model):
    def train_step(self, data):
        logs = super().train_step(data)
        self.get_layer("centers").apply_deferred_update()
        return logs


def fitted(kind, batch, deferred=True, epochs=3, **options):
    """The layer after a fit, and the texts of the warnings about it."""
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, name="centers", deferred_update=deferred)
    model = kind([inputs, labels], layer([keras.layers.Dense(D)(inputs), labels]))
    model.compile("sgd", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit([*batch], batch_size=3, epochs=epochs, verbose=0)
        model.evaluate([*batch], verbose=0)
    return layer, [str(w.message) for w in caught if "apply_deferred_update" in str(w.message)]


@pytest.mark.parametrize("eager", [False, True], ids=["function", "eager"])
def test_fit_that_never_moves_the_centers_warns_once(batch, eager):
    layer, texts = fitted(keras.Model, batch, run_eagerly=eager)
    assert not layer.centers.numpy().any()
    (text,) = texts
    assert "'centers' do not move in fit" in text
    assert "tf_center_loss_op.training.UpdateCentersAfterStep" in text


@pytest.mark.parametrize("eager", [False, True], ids=["function", "eager"])
@pytest.mark.parametrize("kind", [AfterStep, OwnStep])
def test_fit_that_moves_them_does_not_warn(batch, kind, eager):
    layer, texts = fitted(kind, batch, run_eagerly=eager)
    assert layer.centers.numpy().any() and texts == []


def test_a_layer_that_moves_in_the_forward_pass_does_not_warn(batch):
    layer, texts = fitted(keras.Model, batch, deferred=False)
    assert layer.centers.numpy().any() and texts == []


def test_a_callback_that_moves_them_in_eager_mode_does_not_warn(batch):
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, deferred_update=True)
    model = keras.Model([inputs, labels], layer([inputs, labels]))
    model.compile("sgd", run_eagerly=True)
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: layer.apply_deferred_update()
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit([*batch], batch_size=1, verbose=0, callbacks=[callback])
    assert not [w for w in caught if "apply_deferred_update" in str(w.message)]
    assert layer.centers.numpy().any()
