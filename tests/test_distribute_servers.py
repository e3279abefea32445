"""Under ParameterServerStrategy the op runs where the table lies, or as a graph on its parts."""

from replicas import Cluster

SERVE = """
    import json, os, sys
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver.task_type in ("worker", "ps"):
        import tf_center_loss_op as tcl
        tcl.build_info()  # loads the library into this server
        tf.distribute.Server(
            resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id
        ).join()

    import keras
    import numpy as np
    import oracle
    import tf_center_loss_op as tcl

    C, D = 21, 4
    rng = np.random.default_rng(0)
    start = rng.normal(size=(C, D)).astype("f")
    features, labels = rng.normal(size=(8, D)).astype("f"), rng.integers(0, C, 8)
    truth = oracle.center_loss(features, labels, start)

    def coordinator(**options):
        strategy = tf.distribute.ParameterServerStrategy(resolver, **options)
        return strategy, tf.distribute.coordinator.ClusterCoordinator(strategy)

    def step_of(centers):
        @tf.function
        def step(features, labels):
            with tf.GradientTape() as tape:
                tape.watch(features)
                loss = tcl.center_loss(features, labels, centers)
            return loss, tape.gradient(loss, features)
        return step
"""


def test_one_server(native_library, tmp_path):
    source = (
        SERVE
        + """
    strategy, queue = coordinator()
    with strategy.scope():
        centers = tf.Variable(start, trainable=False)
        layer = tcl.CenterLoss(C)
        layer.build((None, D))
    assert "/job:ps/" in centers.device
    step = step_of(centers)
    loss, gradient = queue.schedule(step, args=(tf.constant(features), tf.constant(labels))).fetch()
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, truth.feature_gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(centers.numpy(), truth.centers, rtol=1e-5, atol=1e-7)

    # The fused op, beside the table.
    graph = step.get_concrete_function(tf.constant(features), tf.constant(labels)).graph
    assert "TclCenterLossStep" in [op.type for op in graph.get_operations()]

    @tf.function
    def train(features, labels):
        layer(features, labels, training=True)
        return layer.losses[0]
    result = queue.schedule(train, args=(tf.constant(features), tf.constant(labels))).fetch()
    expected = oracle.center_loss(features, labels, np.zeros([C, D]))
    np.testing.assert_allclose(result, expected.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.centers.numpy(), expected.centers, rtol=1e-5, atol=1e-7)

    with strategy.scope():
        try:
            tcl.distribute.ShardedCenters(C, D)
        except ValueError as error:
            assert "ParameterServerStrategy splits tables itself" in str(error)
        else:
            raise AssertionError("no error")
    """
    )
    with Cluster(source, tmp_path, ps=1, worker=1, chief=1) as cluster:
        cluster.finish("chief")


def test_a_partitioned_table(tmp_path):
    # 21 rows on two servers: 11 and 10.
    source = (
        SERVE
        + """
    halves = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
    strategy, queue = coordinator(variable_partitioner=halves)
    with strategy.scope():
        centers = tf.Variable(start, trainable=False)
    assert [part.shape[0] for part in centers.variables] == [11, 10]
    assert len({part.device for part in centers.variables}) == 2
    step = step_of(centers)
    loss, gradient = queue.schedule(step, args=(tf.constant(features), tf.constant(labels))).fetch()
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, truth.feature_gradient, rtol=1e-5, atol=1e-7)
    after = np.concatenate([part.numpy() for part in centers.variables])
    np.testing.assert_allclose(after, truth.centers, rtol=1e-5, atol=1e-7)
    try:
        tcl.center_loss(features, labels, centers, impl="native")
    except RuntimeError as error:
        assert "impl: 'native' cannot run on centers that a partitioner has split" in str(error)
    else:
        raise AssertionError("no error")
    """
    )
    with Cluster(source, tmp_path, ps=2, worker=1, chief=1) as cluster:
        cluster.finish("chief")
