"""With trainable=False, on the layer or on a model around it, nothing of the layer moves."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

B, D, C = 8, 3, 4
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


class AfterStep(tcl.training.UpdateCentersAfterStep, keras.Model):
    pass


def model_of(layer, kind=keras.Model):
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    embedded = keras.layers.Dense(D)(inputs)
    model = kind([inputs, labels], layer([embedded, labels]))
    model.compile("sgd")
    return model


def freeze_layer(model):
    model.get_layer("centers").trainable = False
    return model


def freeze_model_around(model):
    model.trainable = False
    return model


def freeze_outer_model(model):
    inputs = [keras.Input([D]), keras.Input([], dtype="int32")]
    model.trainable = False
    return type(model)(inputs, keras.layers.Dense(D)(model(inputs)))


FREEZE = {
    "layer": freeze_layer,
    "model": freeze_model_around,
    "model in a model": freeze_outer_model,
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one table", "sharded"])
@pytest.mark.parametrize("deferred", [False, True], ids=["forward", "deferred"])
@pytest.mark.parametrize("how", FREEZE)
def test_fit_moves_nothing_of_a_frozen_layer(batch, how, deferred, sharded):
    layer = tcl.CenterLoss(
        C, name="centers", alpha=SCHEDULE, deferred_update=deferred, sharded=sharded
    )
    model = model_of(layer, AfterStep if deferred else keras.Model)
    model.fit([*batch], verbose=0)
    before = [w.numpy() for w in layer.weights]
    assert len(before) == 2 and before[0].any()
    frozen = FREEZE[how](model)
    frozen.compile("sgd", "mse")
    frozen.fit([*batch], np.zeros([B, D]), verbose=0)
    for now, then in zip(layer.weights, before, strict=True):
        assert np.array_equal(now.numpy(), then)
    # The loss is still there, and it moves again when it is not frozen any more.
    assert float(layer.distance.count) == B
    frozen.trainable = layer.trainable = True
    frozen.compile("sgd", "mse")
    frozen.fit([*batch], np.zeros([B, D]), verbose=0)
    for now, then in zip(layer.weights, before, strict=True):
        assert not np.array_equal(now.numpy(), then)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("deferred", [False, True], ids=["forward", "deferred"])
def test_a_loop_of_the_user_moves_nothing_of_a_frozen_layer(impl, batch, deferred, traced):
    layer = tcl.CenterLoss(C, trainable=False, deferred_update=deferred, impl=impl)
    layer.build((None, D))

    def step():
        layer(*batch, training=True)
        if deferred:
            layer.apply_deferred_update()

    (tf.function(step) if traced else step)()
    assert not layer.centers.numpy().any()
    assert layer.get_config()["trainable"] is False
    again = tcl.CenterLoss.from_config(layer.get_config())
    assert not again.trainable


def test_calls_before_freezing_do_not_count(batch):
    layer = tcl.CenterLoss(C, deferred_update=True)
    layer(*batch, training=True)
    layer.trainable = False
    layer.apply_deferred_update()
    layer.trainable = True
    with pytest.raises(RuntimeError, match="expected a training call"):
        layer.apply_deferred_update()
    assert not layer.centers.numpy().any()


class NoTraining(keras.Model):
    """Its call does not say that it trains."""

    def __init__(self):
        super().__init__()
        self.center_loss = tcl.CenterLoss(C, name="centers")

    def call(self, inputs):
        return self.center_loss(inputs[0], inputs[1])


def frozen():
    model = model_of(tcl.CenterLoss(C, name="centers"))
    return freeze_model_around(model)


def without_training():
    return NoTraining()


@pytest.mark.parametrize(
    "make, words",
    [
        (frozen, r"frozen \(trainable=False on the layer or on a model around it\)"),
        (without_training, r"call\(\) has no argument `training`.*call\(self, inputs, training="),
    ],
)
def test_the_monitor_names_the_cause(batch, make, words):
    model = make()
    model.compile("sgd")
    monitor = tcl.training.CentersMonitor(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit([*batch], verbose=0)
    with pytest.warns(UserWarning, match=f"did not move in epoch 1: .*{words}"):
        model.fit([*batch], verbose=0, callbacks=[monitor])
