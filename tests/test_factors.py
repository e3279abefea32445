"""loss_weight and alpha of the layer: kinds, saving, and what setting them later does."""

import copy
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from tolerances import assert_close

B, D, C = 12, 3, 5

KINDS = {
    "keras.Variable": lambda x: keras.Variable(x, trainable=False, name="factor"),
    "tf.Variable": lambda x: tf.Variable(x, name="factor"),
    "float64": lambda x: tf.Variable(x, dtype="float64", trainable=False),
}
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


def model_of(layer, **options):
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    model = keras.Model([inputs, labels], layer([inputs, labels]))
    model.compile("sgd", **options)
    return model


def fit(model, batch):
    """One step."""
    return model.fit([*batch], batch_size=B, shuffle=False, verbose=0)


def table(layer):
    return layer.centers.numpy()


# Saving.


@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_is_still_one_in_a_loaded_model(kind, batch, tmp_path):
    weight, alpha = KINDS[kind](0.5), KINDS[kind](0.25)
    model = model_of(tcl.CenterLoss(C, loss_weight=weight, alpha=alpha, name="centers"))
    alpha.assign(0.1)
    fit(model, batch)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    layer, loaded = model.get_layer("centers"), again.get_layer("centers")
    assert loaded.get_config() == layer.get_config()
    for name in ("loss_weight", "alpha"):
        given, got = getattr(layer, name), getattr(loaded, name)
        assert got is not given
        assert got.dtype == given.dtype and got.trainable == given.trainable
        assert got.numpy() == given.numpy()
    fit(again, batch)
    before = table(loaded)
    # What a callback does.
    loaded.alpha.assign(0.0)
    loaded.loss_weight.assign(2.0)
    loss = fit(again, batch).history["loss"][0]
    assert np.array_equal(table(loaded), before)
    np.testing.assert_allclose(loss, 2 * oracle.center_loss(*batch, before).loss, rtol=1e-5)


@pytest.mark.parametrize("kind", ["model.weights.h5", "shards.weights.json", "checkpoint"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one table", "sharded"])
def test_weights_hold_the_values_of_variables(batch, tmp_path, kind, sharded):
    def made(value):
        return model_of(
            tcl.CenterLoss(C, alpha=keras.Variable(value, trainable=False), sharded=sharded)
        )

    model, other, path = made(0.5), made(0.1), str(tmp_path / kind)
    fit(model, batch)
    model.layers[-1].alpha.assign(0.25)
    if kind == "checkpoint":
        path = tf.train.Checkpoint(model=model).write(path)
        tf.train.Checkpoint(model=other).read(path)
    else:
        shards = {"max_shard_size": 1e-6} if "shards" in kind else {}
        model.save_weights(path, **shards)
        other.load_weights(path)
    assert other.layers[-1].alpha.numpy() == np.float32(0.25)
    for mine, its in zip(model.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(mine, its)
    if kind == "model.weights.h5" and not sharded:
        # A number that the code gives is the code's.
        number = model_of(tcl.CenterLoss(C, alpha=0.125))
        number.load_weights(path)
        assert number.layers[-1].alpha == 0.125
        # Weights of a layer with numbers go into one with variables.
        number.save_weights(path)
        other.load_weights(path)
        assert other.layers[-1].alpha.numpy() == np.float32(0.25)


def test_a_backup_holds_the_values_of_variables(batch, tmp_path):
    def train(epochs, *callbacks):
        layer = tcl.CenterLoss(C, alpha=keras.Variable(0.5, trainable=False))
        halve = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: layer.alpha.assign(layer.alpha * 0.5)
        )
        model = model_of(layer)
        backup = tcl.training.AtomicBackup(tmp_path / "backup", delete_checkpoint=False)
        model.fit([*batch], batch_size=4, epochs=epochs, verbose=0, callbacks=[halve, backup])
        return table(layer), float(layer.alpha)

    train(2)
    resumed = train(4)
    shutil.rmtree(tmp_path / "backup")
    whole = train(4)
    assert resumed[1] == whole[1] == 0.5**5
    assert np.array_equal(resumed[0], whole[0])


def test_a_schedule_is_still_one_in_a_loaded_model(batch, tmp_path):
    model = model_of(tcl.CenterLoss(C, loss_weight=SCHEDULE, alpha=SCHEDULE, name="centers"))
    fit(model, batch)
    model.save(tmp_path / "model.keras")
    layer = keras.models.load_model(tmp_path / "model.keras").get_layer("centers")
    assert layer.get_config() == model.get_layer("centers").get_config()
    assert type(layer.alpha) is type(layer.loss_weight) is type(SCHEDULE)
    assert int(layer.steps.numpy()) == 1


@pytest.mark.parametrize(
    "wrong, kind",
    [
        ({"variable": -1.0}, ValueError),
        ({"variable": float("nan")}, ValueError),
        ({"variable": "0.5"}, TypeError),
    ],
    ids=str,
)
def test_a_wrong_variable_in_a_configuration_is_refused(wrong, kind):
    with pytest.raises(kind, match="^alpha: expected a finite number >= 0"):
        tcl.CenterLoss(C, alpha=wrong)


# Setting a factor when functions have been compiled.

OLD = {
    "number": lambda: 0.5,
    "variable": lambda: keras.Variable(0.5, trainable=False),
    "schedule": lambda: SCHEDULE,
}
NEW = {
    "number": lambda: 0.0,
    "variable": lambda: tf.Variable(0.0),
    "schedule": lambda: keras.optimizers.schedules.PolynomialDecay(0.0, 10, 0.0),
}
REMEDY = {
    "number": r"{name}: .*keep 0.5: .*CenterLoss\({name}=keras.Variable\(0.5, trainable=False\)\)",
    "variable": r"{name}: .*keep a variable: .*layer.{name}.assign\(value\)",
    "schedule": r"{name}: .*keep a PolynomialDecay: .*a variable",
}


@pytest.mark.parametrize("name", ["loss_weight", "alpha"])
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("old", OLD)
def test_a_value_that_compiled_functions_would_not_see_is_refused(batch, name, old, new):
    # With a schedule for the other factor the layer counts its steps.
    other = {"alpha": "loss_weight", "loss_weight": "alpha"}[name]
    layer = tcl.CenterLoss(C, **{name: OLD[old](), other: SCHEDULE})
    model = model_of(layer)
    kept = getattr(layer, name)
    fit(model, batch)
    with pytest.raises(ValueError, match=REMEDY[old].format(name=name)):
        setattr(layer, name, NEW[new]())
    assert getattr(layer, name) is kept
    setattr(layer, name, kept)
    # Compiled again, the model obeys.
    model.compile("sgd")
    before = table(layer)
    setattr(layer, name, NEW[new]())
    loss = fit(model, batch).history["loss"][0]
    if name == "alpha":
        assert np.array_equal(table(layer), before)
    else:
        assert loss == 0


def test_a_variable_is_the_remedy(batch):
    layer = tcl.CenterLoss(C, alpha=keras.Variable(0.5, trainable=False))
    model = model_of(layer)
    fit(model, batch)
    before = table(layer)
    layer.alpha.assign(0.0)
    fit(model, batch)
    assert np.array_equal(table(layer), before)


def in_a_loop(call):
    return tf.while_loop(lambda k: k < 1, lambda k: [k + 1, call()][0], [0])


NESTED = {
    "function": lambda call: call(),
    "function in a function": lambda call: tf.function(call)(),
    "loop": in_a_loop,
    "branch": lambda call: tf.cond(tf.constant(True), lambda: [0, call()][0], lambda: 0),
}


@pytest.mark.parametrize("where", NESTED)
def test_a_function_of_the_user_counts_until_it_is_gone(batch, where):
    layer = tcl.CenterLoss(C, distance_metric=False)
    layer.build((None, D))
    x, y = map(tf.constant, batch)

    def call():
        layer(x, y, training=True)

    function = tf.function(lambda: NESTED[where](call), autograph=False)
    function()
    with pytest.raises(ValueError, match="alpha: .*keep 0.5"):
        layer.alpha = 0.0
    del function
    layer.alpha = 0.0


def test_eager_calls_obey_at_once(batch):
    layer = tcl.CenterLoss(C)
    layer(*batch, training=True)
    before = table(layer)
    layer.alpha, layer.loss_weight = 0.0, 3.0
    layer(*batch, training=True)
    assert np.array_equal(table(layer), before)
    expected = 3 * oracle.center_loss(*batch, before).loss
    assert_close(layer.losses[-1], expected, "float32", "loss")


def test_building_a_model_compiles_nothing(batch):
    layer = tcl.CenterLoss(C)
    model = model_of(layer)
    layer.alpha, layer.loss_weight = 0.25, 0.5
    loss = fit(model, batch).history["loss"][0]
    truth = oracle.center_loss(*batch, np.zeros([C, D]), alpha=0.25)
    np.testing.assert_allclose(loss, 0.5 * truth.loss, rtol=1e-5)
    assert_close(table(layer), truth.centers, "float32", "centers")


def test_evaluation_keeps_the_weight_only(batch):
    layer = tcl.CenterLoss(C)
    model = model_of(layer)
    model.evaluate([*batch], verbose=0)
    layer.alpha = 0.25
    with pytest.raises(ValueError, match="loss_weight: .*keep 1.0"):
        layer.loss_weight = 0.5


def test_a_copy_of_a_layer(batch):
    layer = tcl.CenterLoss(C, alpha=keras.Variable(0.5, trainable=False))
    layer(*batch, training=True)
    clone = copy.deepcopy(layer.get_config())
    assert tcl.CenterLoss.from_config(clone).get_config() == clone
