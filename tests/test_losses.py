"""GlobalBatchLoss without replicas: the loss that it was given, its configuration, its errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from naming import described

RNG = np.random.default_rng(0)
TARGET, OUTPUT = RNG.uniform(size=(5, 3)).astype("f"), RNG.uniform(size=(5, 3)).astype("f")
WEIGHTS = RNG.uniform(size=5).astype("f")


@keras.saving.register_keras_serializable(package="tests")
def fourth_power(target, output):
    return tf.reduce_mean((target - output) ** 4, axis=-1)


LOSSES = [
    "mse",
    "MeanSquaredError",
    fourth_power,
    keras.losses.CategoricalCrossentropy(reduction="mean_with_sample_weight", name="main"),
    keras.losses.CategoricalCrossentropy(label_smoothing=0.1, reduction="sum"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=described)
def test_on_one_replica_it_is_the_given_loss(loss):
    model = keras.Sequential([keras.Input([3]), keras.layers.Identity()])

    def shown(loss):
        model.compile(loss=loss)
        data = OUTPUT, TARGET, WEIGHTS
        return model.evaluate(*data[:2], sample_weight=data[2], verbose=0, return_dict=True)

    assert shown(tcl.distribute.GlobalBatchLoss(loss)) == shown(loss)


@pytest.mark.parametrize("loss", LOSSES, ids=described)
def test_it_is_saved_with_a_model(loss, tmp_path):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", tcl.distribute.GlobalBatchLoss(loss, name="main"))
    model.fit(OUTPUT, TARGET, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.loss, tcl.distribute.GlobalBatchLoss)
    assert again.loss.name == "main"
    assert again.loss.reduction == model.loss.reduction
    data = OUTPUT, TARGET
    assert again.evaluate(*data, verbose=0) == model.evaluate(*data, verbose=0)


def test_names_are_those_of_the_loss():
    given = ["mse", fourth_power, keras.losses.Huber(name="hub"), keras.losses.MeanSquaredError]
    names = ["mse", "fourth_power", "hub", "mean_squared_error"]
    assert [tcl.distribute.GlobalBatchLoss(loss).name for loss in given] == names
    assert tcl.distribute.GlobalBatchLoss("mse", name="main").name == "main"


class Other(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return 0.0


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (None, TypeError, "loss: expected a keras.losses.Loss, .* got None"),
        ("crossing", TypeError, "loss: expected a keras.losses.Loss, .* got 'crossing'"),
        (["mse", "mse"], TypeError, "of one output, got .'mse', 'mse'."),
        ({"a": "mse"}, TypeError, "of one output, got {'a': 'mse'}"),
        (keras.losses.Huber(reduction=None), ValueError, "loss: .* got reduction=None"),
        (keras.losses.Huber(reduction="none"), ValueError, "loss: .* got reduction='none'"),
        (Other(), TypeError, "loss: .* got Other, which has a __call__ of its own"),
        (
            tcl.distribute.GlobalBatchLoss("mse"),
            TypeError,
            "loss: .* got GlobalBatchLoss, which has",
        ),
    ],
    ids=described,
)
def test_wrong_losses_are_refused(loss, error, message):
    with pytest.raises(error, match=message):
        tcl.distribute.GlobalBatchLoss(loss)
