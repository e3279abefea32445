"""A cluster with parameter servers, and the problem that its chief solves.

For the programs of test_distribute_servers.py: all processes of the cluster run the same program.
"""

import numpy as np
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl

C, D = 21, 4
rng = np.random.default_rng(0)
start = rng.normal(size=(C, D)).astype("f")
features, labels = rng.normal(size=(8, D)).astype("f"), rng.integers(0, C, 8)
truth = oracle.center_loss(features, labels, start)


def coordinator(**options):
    """The strategy and its coordinator, in the chief; a worker or server never returns."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver.task_type in ("worker", "ps"):
        tcl.build_info()  # loads the library into this server
        server = tf.distribute.Server(
            resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id
        )
        server.join()
    strategy = tf.distribute.ParameterServerStrategy(resolver, **options)
    return strategy, tf.distribute.coordinator.ClusterCoordinator(strategy)


def scheduled(queue, function):
    """The function's result for the problem, on a worker."""
    return queue.schedule(function, args=(tf.constant(features), tf.constant(labels))).fetch()


def assert_equal(actual, expected):
    """Equal but for rounding."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def check_step(queue, centers, rows):
    """Loss, gradient and `rows()`, the table after a step, against the oracle; returns the step."""

    @tf.function
    def step(features, labels):
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(features, labels, centers)
        return loss, tape.gradient(loss, features)

    loss, gradient = scheduled(queue, step)
    assert_equal(loss, truth.loss)
    assert_equal(gradient, truth.feature_gradient)
    assert_equal(rows(), truth.centers)
    return step
