"""A whole training step of a small Keras model with softmax, center loss and Adam."""

import keras
import tensorflow as tf

import tf_center_loss_op as tcl
from bench.cases import ALPHA

HIDDEN, OUTPUTS, WEIGHT = 64, 10, 0.01  # hidden units, classes of the softmax, lambda


def training(impl, jit_compile=None):
    """Makes the step a `tf.function`, called for each batch; impl None: without center loss."""

    def build(workload):
        dim, centers = workload.case.dim, workload.table.variable
        keras.utils.set_random_seed(0)
        inputs = keras.Input([dim])
        hidden = keras.layers.Dense(HIDDEN, use_bias=False)(inputs)
        hidden = keras.layers.ReLU()(keras.layers.BatchNormalization()(hidden))
        embedding = keras.layers.Dense(dim)(hidden)
        model = keras.Model(inputs, [embedding, keras.layers.Dense(OUTPUTS)(embedding)])
        softmax = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)

        @tf.function(autograph=False, jit_compile=jit_compile)
        def call(features, labels):
            with tf.GradientTape() as tape:
                embedding, logits = model(features, training=True)
                loss = softmax(labels % OUTPUTS, logits)
                if impl:
                    loss += WEIGHT * tcl.center_loss(
                        embedding, labels, centers, alpha=ALPHA, impl=impl
                    )
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss, None

        return workload.each_batch(call)

    return build
