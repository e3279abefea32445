"""The tutorial's center loss in plain TensorFlow, and a training program around either one."""

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1

BATCH, INPUTS, DIM, CLASSES = 64, 32, 200, 10


def center_loss(features, label, alpha=0.0):
    """The function that compat.v1.center_loss replaces: (loss, centers, centers_update_op)."""
    label = tf.argmax(label, 1)
    with tf1.variable_scope("plain", reuse=tf1.AUTO_REUSE):
        centers = tf1.get_variable(
            "doc_centers",
            [CLASSES, features.shape[1]],
            tf.float32,
            tf1.zeros_initializer(),
            trainable=False,
            use_resource=True,
        )
    centers_batch = tf.gather(centers, label)
    diff = tf.subtract(centers_batch, features)
    _, unique_idx, unique_count = tf.unique_with_counts(label)
    appear_times = tf.reshape(tf.gather(unique_count, unique_idx), [-1, 1])
    diff = tf.divide(diff, tf.cast(1 + appear_times, tf.float32))
    centers_update_op = tf1.scatter_sub(centers, label, alpha * (1 - alpha) * diff)
    return tf.nn.l2_loss(features - centers_batch), centers, centers_update_op


def batches(steps):
    """Inputs [64, 32] and one-hot labels [64, 10] of each step; the inputs depend on the labels."""
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(CLASSES, INPUTS))
    for _ in range(steps):
        labels = rng.integers(0, CLASSES, BATCH)
        inputs = prototypes[labels] + rng.normal(size=(BATCH, INPUTS))
        yield inputs.astype(np.float32), np.eye(CLASSES, dtype=np.float32)[labels]


def train(function, alpha, order, steps, batch=BATCH):
    """Trains with loss_softmax + 0.001 * center_loss; a dict of arrays for each step.

    order: "control" puts the training step behind centers_update_op, "collection" takes the way
    over UPDATE_OPS, "fetch" runs it beside the training step.
    """
    with tf.Graph().as_default(), tf1.Session() as session:
        rng = np.random.default_rng(1)
        inputs = tf1.placeholder(tf.float32, [batch, INPUTS])
        label = tf1.placeholder(tf.float32, [batch, CLASSES])
        hidden = tf1.get_variable(
            "hidden", initializer=rng.normal(size=(INPUTS, DIM)).astype("f") / 6, use_resource=True
        )
        out = tf1.get_variable(
            "out", initializer=rng.normal(size=(DIM, CLASSES)).astype("f") / 20, use_resource=True
        )
        features = tf.tanh(inputs @ hidden)
        loss_softmax = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(label, features @ out)
        )
        loss, centers, centers_update_op = function(features, label, alpha)
        total = loss_softmax + 0.001 * loss
        gradient = tf1.gradients(total, [features, hidden])
        optimizer = tf1.train.AdamOptimizer(1e-3)
        behind = [centers_update_op] if order == "control" else []
        if order == "collection":
            tf1.add_to_collection(tf1.GraphKeys.UPDATE_OPS, centers_update_op)
            behind = tf1.get_collection(tf1.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies(behind):
            train_op = optimizer.minimize(total)
        run = dict(loss=loss, total=total, features=gradient[0], hidden=gradient[1], go=train_op)
        if order == "fetch":
            run["update"] = centers_update_op
        session.run(tf1.global_variables_initializer())
        history = []
        for x, y in batches(steps):
            result = session.run(run, {inputs: x, label: y})
            wanted = {key: result[key] for key in ("loss", "total", "features", "hidden")}
            history.append(wanted | dict(centers=session.run(centers)))
        return history
