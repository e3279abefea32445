"""CenterLoss(sharded=True): the parts of the table are weights of the layer."""

import keras
import numpy as np
import pytest

import tf_center_loss_op as tcl
from child import run_program

B, D, C = 12, 3, 5


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


def model_of(**options):
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, name="centers", **options)
    embedded = keras.layers.Dense(D, name="dense")(inputs)
    model = keras.Model([inputs, labels], layer([embedded, labels]))
    model.compile("sgd")
    return model


def test_the_weights_are_those_of_one_table(batch):
    results = []
    for sharded in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(sharded=sharded)
        layer = model.get_layer("centers")
        model.fit([*batch], batch_size=4, shuffle=False, verbose=0)
        assert model.count_params() == D * D + D + C * D
        assert layer.count_params() == C * D
        assert [w.name for w in layer.weights] == ["centers"]
        assert layer.trainable_weights == layer.trainable_variables == []
        assert [w.shape for w in layer.non_trainable_weights] == [(C, D)]
        assert len(model.variables) == len(model.weights) == 3
        assert layer.weights[0].dtype == "float32"
        results.append(model.get_weights())
    for whole, parts in zip(*results, strict=True):
        assert np.array_equal(whole, parts)


def test_set_weights(batch):
    model, other = model_of(sharded=True), model_of(sharded=True)
    model.fit([*batch], verbose=0)
    other.set_weights(model.get_weights())
    centers = other.get_layer("centers").centers
    ((first, part),) = centers.shards
    assert first == 0 and part.numpy().any()
    assert np.array_equal(part.numpy(), model.get_layer("centers").get_weights()[0])
    one = model_of()
    one.set_weights(model.get_weights())
    assert np.array_equal(one.get_layer("centers").centers.numpy(), part.numpy())


def test_early_stopping_restores_the_best_centers(batch):
    model, seen = model_of(sharded=True), []
    layer = model.get_layer("centers")
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (
            seen.append(layer.get_weights()[0]),
            logs.update(score=float(epoch)),
        )
    )
    stop = keras.callbacks.EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    model.fit([*batch], epochs=5, verbose=0, callbacks=[watch, stop])
    assert len(seen) == 3 and not np.array_equal(seen[0], seen[1])
    assert np.array_equal(layer.get_weights()[0], seen[0])


@pytest.mark.parametrize("built", ["functional", "subclassed"])
def test_saving_stores_the_table_once(batch, tmp_path, built):
    model = model_of(sharded=True)
    model.fit([*batch], verbose=0)
    model.save_weights(tmp_path / "a.weights.h5")
    other = model_of(sharded=True)
    other.load_weights(tmp_path / "a.weights.h5")
    for mine, its in zip(model.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(mine, its)


def test_replicas_of_one_process(tmp_path):
    run_program("replicas_sharded_weights", cwd=tmp_path)
