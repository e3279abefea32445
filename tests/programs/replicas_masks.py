"""Masked positions on two replicas, one table and sharded; for test_layer_inputs.py."""

import keras
import numpy as np

import oracle
import tf_center_loss_op as tcl
from replicas import mirrored

B, T, D, C = 4, 5, 3, 5
strategy = mirrored(2)
rng = np.random.default_rng(0)
words = rng.integers(1, 7, [B, T])
for i, length in enumerate((2, 4, 1, 5)):
    words[i, length:] = 0
tags = np.where(words > 0, rng.integers(0, C, [B, T]), -7)
for sharded in (False, True):
    with strategy.scope():
        inputs, labels = keras.Input([T], dtype="int32"), keras.Input([T], dtype="int32")
        embedding = keras.layers.Embedding(7, D, mask_zero=True)
        layer = tcl.CenterLoss(C, sharded=sharded)
        model = keras.Model([inputs, labels], layer([embedding(inputs), labels]))
        model.compile(keras.optimizers.SGD(0.0))
    loss = model.fit([words, tags], batch_size=B, verbose=0).history["loss"][0]
    counted = embedding.embeddings.numpy()[words[words > 0]]
    truth = oracle.center_loss(counted, tags[words > 0], np.zeros([C, D]))
    parts = layer.get_weights()
    table = np.concatenate(parts) if sharded else parts[0]
    np.testing.assert_allclose(table, truth.centers, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
