"""The tutorial's function on two replicas, and its error in a TensorFlow 1 graph; for
test_distribute.py."""

import numpy as np
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from replicas import copies, gather, mirrored, spread

strategy = mirrored(2)
C, D = 7, 3
rng = np.random.default_rng(0)


def step(features, labels):
    loss, centers, update = tcl.compat.v1.center_loss(features, labels, alpha=0.5)
    assert isinstance(update, tf.Operation)
    return tf.reshape(loss, [-1]), centers


# Few labels are exchanged as sums, distinct ones as samples.
for case, ids in enumerate(([[0, 1, 1, 4], [1, 1, 0, 1]], [[0, 1, 2], [3, 4, 6]])):
    features = rng.normal(size=(2, len(ids[0]), D)).astype("f")

    @tf.function(autograph=False)
    def run(features, labels):
        return strategy.run(step, args=(features, labels))

    with strategy.scope(), tf.compat.v1.variable_scope(f"case_{case}"):
        loss, centers = run(spread(strategy, features), spread(strategy, np.eye(C, dtype="f")[ids]))
    truth = oracle.center_loss(
        features.reshape(-1, D),
        np.concatenate(ids),
        np.zeros([C, D]),
        alpha=0.5,
        rule="tutorial",
        reduction="sum",
    )
    np.testing.assert_allclose(gather(strategy, loss).sum(), truth.loss, rtol=1e-6)
    np.testing.assert_allclose(copies(strategy, centers), truth.centers, rtol=1e-5, atol=1e-7)

with tf.Graph().as_default(), strategy.scope():
    try:
        strategy.run(step, args=(tf.ones([4, D]), tf.one_hot([0, 1, 1, 4], C)))
    except ValueError as error:
        assert "strategy: expected a tf.function" in str(error), error
    else:
        raise AssertionError("a graph of TensorFlow 1 was accepted")
