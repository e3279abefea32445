"""What Keras hands to the losses of `compile` and to those of layers, as docs/training.md says."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(12, 8)).astype("float32"), np.arange(12) % 3


def center_losses(**fit_options):
    """The layer's loss in `fit`, and the centers after it, at a learning rate of 0."""
    image, label = keras.Input([8]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(3)
    x = keras.layers.Dense(4, kernel_initializer="ones")(image)
    model = keras.Model([image, label], keras.layers.Dense(3)(layer(x, label)))

    def none(y_true, y_pred):
        return 0.0 * tf.reduce_sum(y_pred, axis=-1)

    model.compile(keras.optimizers.SGD(0.0), none)
    history = model.fit([IMAGES, LABELS], LABELS, verbose=0, **fit_options)
    return history.history["loss"], layer.centers.numpy()


@pytest.mark.parametrize(
    "options",
    [{"sample_weight": np.arange(12.0)}, {"class_weight": {0: 0.1, 1: 2.0, 2: 7.0}}],
    ids=lambda options: next(iter(options)),
)
def test_weights_of_fit_do_not_reach_the_layers_loss(options):
    loss, centers = center_losses(**options)
    plain_loss, plain_centers = center_losses()
    assert loss == plain_loss and plain_loss[0] > 0
    np.testing.assert_array_equal(centers, plain_centers)


def test_a_loss_function_moves_the_centers_in_evaluate():
    centers = tf.Variable(tf.zeros([3, 8]), trainable=False)
    image = keras.Input([8])
    model = keras.Model(image, keras.layers.Identity()(image))

    def loss(y_true, y_pred):
        assert y_true.dtype == tf.float32  # Keras casts class ids, too
        return tcl.center_loss(y_pred, tf.cast(y_true, tf.int32), centers)

    model.compile("sgd", loss)
    model.evaluate(IMAGES, LABELS, verbose=0)
    assert np.any(centers.numpy() != 0)
