"""The weights of a sharded table on two replicas; for test_sharded_layer.py."""

import keras
import numpy as np

import tf_center_loss_op as tcl
from replicas import mirrored

B, D, C = 12, 3, 5
strategy = mirrored(2)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)
with strategy.scope():
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, sharded=True)
    embedded = keras.layers.Dense(D)(inputs)
    model = keras.Model([inputs, labels], layer([embedded, labels]))
    model.compile("sgd")
model.fit([x, y], batch_size=4, verbose=0)
assert [w.shape for w in layer.weights] == [(2, D), (3, D)]
assert model.count_params() == D * D + D + C * D
kept = model.get_weights()
parts = [part.numpy() for _, part in layer.centers.shards]
for part, weight in zip(parts, layer.get_weights(), strict=True):
    assert part.any() and np.array_equal(part, weight)
model.fit([x, y], batch_size=4, verbose=0)
assert not np.array_equal(layer.get_weights()[0], kept[2])
model.set_weights(kept)
for (_, part), then in zip(layer.centers.shards, parts, strict=True):
    assert np.array_equal(part.numpy(), then)

seen = []
watch = keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: (
        seen.append(layer.get_weights()),
        logs.update(score=float(epoch)),
    )
)
stop = keras.callbacks.EarlyStopping("score", patience=1, mode="min", restore_best_weights=True)
model.fit([x, y], batch_size=4, epochs=5, verbose=0, callbacks=[watch, stop])
assert len(seen) == 2
for now, best in zip(layer.get_weights(), seen[0], strict=True):
    assert np.array_equal(now, best)
