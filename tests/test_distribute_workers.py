"""Several processes on loopback give what one replica gives; one that is killed ends the others."""

import re

import numpy as np

from replicas import Cluster


def test_two_workers(tmp_path):
    source = """
        import tf_center_loss_op as tcl
        strategy = tcl.distribute.MultiWorkerMirroredStrategy()
        from replica_checks import *

        check_functions(strategy, "auto", *mirrored_table(strategy))
        check_functions(strategy, "auto", *sharded_table(strategy), cases=CASES[:2])
        check_functions(strategy, "auto", *mirrored_table(strategy), cases=CASES[:2], eager=True)
        check_fit(strategy, [{"loss": None, "ignore_class": 3}, {"sharded": True}])

        # Every worker writes its part; one process reads all of them, and the other way round.
        with strategy.scope():
            two = tcl.distribute.ShardedCenters(C, D, initializer=tcl.tables.RandomNormal(1.0, seed=3))
        two.save("saved")
        two.save("saved")
        expected = tcl.tables.create(C, D, initializer=tcl.tables.RandomNormal(1.0, seed=3)).numpy()
        one = tcl.distribute.ShardedCenters(C, D)
        one.load("saved")
        assert np.array_equal(one.shards[0][1].numpy(), expected)
        one.save(f"alone-{worker()}")
        two.shards[0][1].assign(tf.zeros_like(two.shards[0][1]))
        two.load(f"alone-{worker()}")
        first, part = two.shards[0]
        assert first == (0, 11)[worker()]
        assert np.array_equal(part.numpy(), expected[first : first + part.shape[0]])
        try:
            two.save_own_variables({})
        except ValueError as error:
            assert "expected layer.centers.save(folder) on every worker" in str(error)
        else:
            raise AssertionError("a file with a part of the table would have been written")
        backup = tcl.training.AtomicBackup("backup")
        with strategy.scope():
            backup.set_model(keras.Sequential([keras.Input([2]), keras.layers.Dense(1)]))
        try:
            backup.on_train_begin()
        except ValueError as error:
            assert "strategy: expected all replicas in one process" in str(error)
        else:
            raise AssertionError("both workers would have written to one folder")
        layer = check_fit(strategy, [{"deferred_update": True}])
        np.save(f"centers-{worker()}.npy", copies(strategy, layer.centers.value))
    """
    with Cluster(source, tmp_path, worker=2) as cluster:
        cluster.finish()
    tables = [np.load(tmp_path / f"centers-{k}.npy") for k in range(2)]
    assert tables[0].any()
    assert np.array_equal(*tables)


def test_three_workers(tmp_path):
    source = """
        import tensorflow as tf
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        from replica_checks import *

        check_functions(strategy, "auto", *mirrored_table(strategy), cases=CASES[:3])
        check_functions(strategy, "auto", *sharded_table(strategy), cases=CASES[:3])
    """
    with Cluster(source, tmp_path, worker=3) as cluster:
        cluster.finish()


# Mirrored and sharded centers, a trained layer and a checkpoint after each of 12 steps.
TRAINING = """
    import tensorflow as tf
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    from replica_checks import *

    STEPS = 12
    rng = np.random.default_rng(5)
    data = [(rng.normal(size=(8, D)).astype("f"), rng.integers(0, C, 8)) for _ in range(STEPS)]
    with strategy.scope():
        kernel = tf.Variable(np.eye(D, dtype="f"))
        centers = tf.Variable(tf.zeros([C, D]), trainable=False)
        sharded = tcl.distribute.ShardedCenters(C, D)
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build([kernel])
    done = tf.Variable(0, dtype=tf.int64, trainable=False)

    @tf.function(autograph=False)
    def train(features, labels):
        def step(features, labels):
            with tf.GradientTape() as tape:
                x = features @ kernel
                loss = tcl.center_loss(x, labels, centers) + tcl.center_loss(x, labels, sharded)
            optimizer.apply([tape.gradient(loss, kernel)], [kernel])
        strategy.run(step, args=(features, labels))

    # All workers write, because a strategy may ask all for it; what counts is the first's.
    state = tf.train.Checkpoint(kernel=kernel, centers=centers, done=done)
    latest = tf.train.latest_checkpoint("checkpoints-0")
    if latest:
        state.restore(latest).assert_consumed()
        sharded.load(f"shards-{int(done)}")
    manager = tf.train.CheckpointManager(state, f"checkpoints-{worker()}", max_to_keep=3)
    print("resumed at", int(done), flush=True)
    while int(done) < STEPS:
        features, labels = data[int(done)]
        half = np.array_split(np.arange(8), 2)[worker()]
        own = {worker(): features[half]}, {worker(): labels[half]}
        train(*[spread(strategy, part) for part in own])
        done.assign_add(1)
        sharded.save(f"shards-{int(done)}")
        manager.save(int(done))
        print("done", int(done), flush=True)
    np.savez(f"end-{worker()}.npz", kernel.numpy(), copies(strategy, centers), sharded.shards[0][1])
"""


def test_a_killed_worker(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    with Cluster(TRAINING, whole, worker=2) as cluster:
        cluster.finish()

    with Cluster(TRAINING, broken, worker=2) as cluster:
        cluster.kill("worker", 1, after="done 4")
        # TensorFlow's own error, within a bound.
        assert cluster.wait("worker", 0, seconds=60) != 0
        log = cluster.log("worker", 0)
    assert re.search(
        r"(Unavailable|Internal|Aborted|Cancelled|DeadlineExceeded)Error|UNAVAILABLE", log
    )
    assert not (broken / "end-0.npz").exists()

    with Cluster(TRAINING, broken, worker=2) as cluster:
        cluster.finish()
        resumed = int(re.search(r"resumed at (\d+)", cluster.log("worker", 0)).group(1))
    assert 3 <= resumed < 12
    for k in range(2):
        with np.load(whole / f"end-{k}.npz") as one, np.load(broken / f"end-{k}.npz") as other:
            assert len(one.files) == 3
            for name in one.files:
                assert one[name].any()
                assert np.array_equal(one[name], other[name])
