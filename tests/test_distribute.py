"""Several replicas in one process give what one gives on the concatenated batch."""

import pytest

from child import run_python
from replicas import BOUND


def run(source, folder, **options):
    """Output of a program that starts with the strategy's devices."""
    return run_python(source, folder, timeout=BOUND, **options)


@pytest.mark.parametrize("replicas", [2, 4])
def test_functions(replicas, implementations, tmp_path):
    run(
        f"""
        from replicas import mirrored
        strategy = mirrored({replicas})
        from replica_checks import *

        first, *others = {implementations}
        cases = CASES if {replicas} == 2 else CASES[:2]
        check_functions(strategy, first, *mirrored_table(strategy), cases=cases)
        check_functions(strategy, first, *sharded_table(strategy), cases=cases[:-1])
        for impl in others:
            check_functions(strategy, impl, *mirrored_table(strategy), cases=CASES[:2])
            check_functions(strategy, impl, *sharded_table(strategy), cases=CASES[:1])
        """,
        tmp_path,
    )


def test_fit(tmp_path):
    run(
        """
        from replicas import mirrored
        import tensorflow as tf
        # TensorFlow's own collective ops do not work in the loop of steps_per_execution.
        strategy = mirrored(2, cross_device_ops=tf.distribute.ReductionToOneDevice())
        from replica_checks import *

        slower = keras.optimizers.schedules.PolynomialDecay(0.5, 5, 0.1)
        check_fit(strategy, [
            {"loss": None, "ignore_class": 3, "rule": "batch_mean"},
            {"deferred_update": True},
            {"sharded": True},
        ])
        layer = check_fit(strategy, [{"steps": 2, "alpha": slower, "reduction": "sum"}])

        # All copies are loaded.
        centers, table = layer.centers, copies(strategy, layer.centers.value)
        tcl.tables.save(centers, "centers.npy")
        centers.assign(tf.zeros_like(centers))
        assert not copies(strategy, centers.value).any()
        tcl.tables.load(centers, "centers.npy")
        assert np.array_equal(copies(strategy, centers.value), table)
        with strategy.scope():
            inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
            model = keras.Model([inputs, label], layer([inputs, label]))
        model.save_weights("model.weights.h5")
        centers.assign(tf.zeros_like(centers))
        model.load_weights("model.weights.h5")
        assert np.array_equal(copies(strategy, centers.value), table)
        """,
        tmp_path,
    )


def test_fit_on_four_replicas(tmp_path):
    # The last batch has one sample: three replicas have none.
    run(
        """
        from replicas import mirrored
        strategy = mirrored(4)
        from replica_checks import *

        check_fit(strategy, [{}])
        """,
        tmp_path,
    )


def test_the_main_loss(tmp_path):
    run(
        """
        from replicas import mirrored
        strategy = mirrored(2)
        import pytest
        from replica_checks import *

        # Keras's mean of the replicas' means is another, where the last batch is uneven.
        alone = contextlib.nullcontext()
        one = trained(alone, loss=main_loss)[:2]
        assert differs(check_same, *trained(strategy.scope(), loss=main_loss)[:2], *one)
        check_same(*trained(strategy.scope())[:2], *one)
        total = lambda: tcl.distribute.GlobalBatchLoss(main_loss(reduction="sum"))
        check_fit(strategy, [{"loss": total}])

        *one, predicted = trained_for_two(alone, lambda loss: loss)
        *two, of_two = trained_for_two(strategy.scope(), tcl.distribute.GlobalBatchLoss)
        check_same(*two, *one)
        for name in predicted:
            np.testing.assert_allclose(of_two[name], predicted[name], rtol=1e-5, atol=1e-6)
        *two, _ = trained_for_two(strategy.scope(), lambda loss: loss)
        assert differs(check_same, *two, *one)

        # What is no loss of the samples has no such value.
        with strategy.scope():
            model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
            model.compile("sgd", tcl.distribute.GlobalBatchLoss(lambda y, p: tf.reduce_mean(y - p)))
        with pytest.raises(ValueError, match="loss: expected one that gives the loss of each"):
            model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
        """,
        tmp_path,
    )


def test_what_is_exchanged(tmp_path):
    run(
        """
        from replicas import mirrored
        strategy = mirrored(2)
        from replica_checks import *
        from tf_center_loss_op._core import arguments as _arguments

        # Which form is smaller: by hand, D = 6, int32 labels; two replicas of four samples.
        # samples: 4 * (6 * 4 + 4) = 112 bytes each; a label: 6 * 4 + 16 = 40 bytes.
        with strategy.scope():
            centers = tf.Variable(tf.zeros([C, D]), trainable=False)
        @tf.function
        def form(features, labels):
            def step(features, labels):
                a = _arguments.check(features, labels, centers, alpha=0.5, rule="paper")
                return distribute._Step(a).sums_are_smaller
            return strategy.run(step, args=(features, labels))
        for dtype, labels, expected in [
            ("float32", [[0, 1, 2, 3], [0, 0, 0, 0]], False),  # 160 > 112
            ("float32", [[0, 1, 2, 2], [0, 0, 0, 0]], False),  # 120 > 112
            ("float32", [[0, 1, 1, 1], [2, 2, 2, 3]], True),   # 80 < 112
            ("float16", [[0, 1, 1, 1], [2, 2, 2, 3]], False),  # 80 > 64
            ("float16", [[0, 0, 0, 0], [2, 2, 2, 2]], True),   # 40 < 64
        ]:
            features = spread(strategy, [np.zeros([4, D], dtype)] * 2)
            result = form(features, spread(strategy, [np.int32(part) for part in labels]))
            assert [bool(k) for k in strategy.experimental_local_results(result)] == [expected] * 2

        # 16-bit features in both forms: as one replica, copies alike.
        for dtype, labels in [("float16", "few"), ("bfloat16", "distinct")]:
            features, ids = batches(2, 0, labels)
            features = [tf.cast(part, dtype).numpy() for part in features]
            start = np.ones([C, D], "f")
            centers, alone = mirrored_table(strategy)[0](start), tf.Variable(start)
            run = step_of(strategy, centers)
            loss, gradient = run(spread(strategy, features), spread(strategy, ids))
            x, y = tf.concat(features, 0), np.concatenate(ids)
            with tf.GradientTape() as tape:
                tape.watch(x)
                expected = tcl.center_loss(x, y, alone)
            np.testing.assert_allclose(gather(strategy, loss).sum(), expected, rtol=1e-6)
            assert np.array_equal(gather(strategy, gradient), tape.gradient(expected, x).numpy())
            np.testing.assert_allclose(copies(strategy, centers), alone.numpy(), rtol=1e-6)
            assert not np.array_equal(alone.numpy(), start)

        # Nothing of the table's size is: no collective op has C in its shape.
        def collectives(graph):
            for op in graph.get_operations():
                if op.type.startswith("Collective"):
                    yield op
            for function in graph._functions.values() if hasattr(graph, "_functions") else ():
                yield from collectives(function.graph)
        for make in (mirrored_table(strategy)[0], sharded_table(strategy)[0]):
            step = step_of(strategy, make(np.zeros([C, D], "f")))
            features, ids = batches(2, 0)
            traced = step.get_concrete_function(spread(strategy, features), spread(strategy, ids))
            found = list(collectives(traced.graph))
            assert len(found) >= 6, found
            assert not any(C in (op.inputs[0].shape.as_list() or []) for op in found)
        """,
        tmp_path,
    )


def test_eager_loop(implementations, tmp_path):
    run(
        f"""
        from replicas import mirrored
        strategy = mirrored(2)
        from replica_checks import *

        for impl in {implementations}:
            check_functions(strategy, impl, *mirrored_table(strategy), cases=CASES[:2], eager=True)
        check_functions(strategy, impl, *sharded_table(strategy), cases=CASES[:2], eager=True)
        """,
        tmp_path,
    )


def test_side_effects_of_replicas_do_not_wait_for_each_other(tmp_path):
    # TensorFlow orders them by when they were traced: the second replica's first behind the first
    # replica's last.
    run(
        """
        from replicas import mirrored
        strategy = mirrored(2)
        from replica_checks import *

        make, tables_of = mirrored_table(strategy)
        for sharded in (False, True):
            centers = (sharded_table(strategy) if sharded else mirrored_table(strategy))[0](
                np.zeros([C, D], "f"))
            @tf.function(autograph=False)
            def run(features, labels):
                def step(features, labels):
                    check = tf.debugging.Assert(tf.reduce_all(labels >= 0), [labels])
                    with tf.control_dependencies([check]):
                        features = tf.identity(features)
                        loss = tcl.center_loss(features, tf.identity(labels), centers)
                    tf.debugging.Assert(loss >= 0, [loss])
                    tf.print("loss", loss, output_stream="file:///dev/null")
                    return loss
                return strategy.run(step, args=(features, labels))
            features, ids = batches(2, 0)
            run(spread(strategy, features), spread(strategy, ids))
        """,
        tmp_path,
    )


def test_bad_input(tmp_path):
    run(
        """
        from replicas import mirrored
        strategy = mirrored(2)
        import pytest
        from replica_checks import *

        make, tables_of = mirrored_table(strategy)
        start = np.ones([C, D], "f")
        features, ids = batches(2, 0)
        good = spread(strategy, features), spread(strategy, ids)

        # A label of one replica that is out of range: all raise, no copy has moved, and the next
        # step is as ever.
        for table in (mirrored_table, sharded_table):
            make, tables_of = table(strategy)
            centers = make(start)
            run = step_of(strategy, centers)
            wrong = [ids[0], np.full_like(ids[1], C)]
            with pytest.raises(tf.errors.InvalidArgumentError, match="labels"):
                run(good[0], spread(strategy, wrong))
            for first, rows in tables_of(centers):
                assert np.array_equal(rows, start[first : first + len(rows)])
            run(*good)
            truth = oracle.center_loss(np.concatenate(features), np.concatenate(ids), start)
            for first, rows in tables_of(centers):
                expected = truth.centers[first : first + len(rows)]
                np.testing.assert_allclose(rows, expected, rtol=1e-6)

        # A negative step size in a variable.
        alpha = tf.Variable(-1.0)
        centers = mirrored_table(strategy)[0](start)
        with pytest.raises(tf.errors.InvalidArgumentError, match="alpha: expected a finite"):
            step_of(strategy, centers, alpha=alpha)(*good)

        with pytest.raises(ValueError, match=r"made in strategy.scope\\(\\)"):
            step_of(strategy, tf.Variable(start))(*good)
        with strategy.scope():
            with pytest.raises(ValueError, match="expected a call in a replica"):
                tcl.center_loss(features[0], ids[0], centers)
            # To look is allowed.
            tcl.center_loss(features[0], ids[0], centers, update_centers=False)
            with pytest.raises(ValueError, match="num_classes: expected at least one for each"):
                tcl.distribute.ShardedCenters(1, D)
            with pytest.raises(ValueError, match="initializer: expected zeros"):
                tcl.distribute.ShardedCenters(C, D, initializer="glorot_uniform")
            sharded = tcl.distribute.ShardedCenters(C, D)
            with pytest.raises(ValueError, match="expected a call in a replica"):
                tcl.center_loss(features[0], ids[0], sharded)
        with pytest.raises(ValueError, match="strategy of 2 replicas"):
            tcl.center_loss(features[0], ids[0], sharded)

        @tf.function(jit_compile=True)
        def compiled(features, labels):
            return tcl.center_loss(features, labels, centers)

        with pytest.raises(ValueError, match="jit_compile: expected False"):
            tf.function(lambda *args: strategy.run(compiled, args=args))(*good)

        with strategy.scope():
            inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
            model = keras.Model([inputs, label], tcl.CenterLoss(C)([inputs, label]))
            model.compile("sgd", run_eagerly=True)
        with pytest.raises(RuntimeError, match="run_eagerly: expected False"):
            model.fit([np.ones([4, D], "f"), np.zeros([4], "i")], batch_size=4, verbose=0)
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    "strategy",
    [
        "tf.distribute.experimental.CentralStorageStrategy",
        "tf.compat.v1.distribute.MirroredStrategy",
    ],
)
def test_other_strategies_are_refused_at_construction(strategy, tmp_path):
    run(
        f"""
        import pytest
        import tensorflow as tf
        import tf_center_loss_op as tcl

        name = {strategy.split(".")[-1]!r}
        with {strategy}().scope():
            for make in (lambda: tcl.CenterLoss(3), lambda: tcl.distribute.ShardedCenters(3, 2)):
                with pytest.raises(ValueError, match=f"strategy: {{name}}.*not supported: use "):
                    make()
        """,
        tmp_path,
    )


def test_a_strategy_of_one_device(impl, tmp_path):
    run(
        f"""
        import tensorflow as tf
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
        from replica_checks import *

        for table in (mirrored_table, sharded_table):
            make, tables_of = table(strategy)
            start = np.ones([C, D], "f")
            centers = make(start)
            features, ids = batches(2, 0)
            run = step_of(strategy, centers, impl={impl!r})
            run(tf.constant(features[0]), tf.constant(ids[0]))
            truth = oracle.center_loss(features[0], ids[0], start)
            ((_, rows),) = tables_of(centers)
            np.testing.assert_allclose(rows, truth.centers, rtol=1e-6)
        """,
        tmp_path,
    )


def test_shards_are_saved_and_restored_onto_another_number(tmp_path):
    run(
        """
        from replicas import mirrored
        strategy = mirrored(4)
        import pytest
        from replica_checks import *

        def whole(centers):
            parts = [part.numpy() for _, part in centers.shards]
            assert sum(map(len, parts)) == C
            return np.concatenate(parts)

        random = tcl.tables.RandomNormal(1.0, seed=3)
        with strategy.scope():
            four = tcl.distribute.ShardedCenters(C, D, initializer=random)
        # The same numbers on any number of replicas, and as in a table that is not split.
        expected = tcl.tables.create(C, D, initializer=random).numpy()
        assert np.array_equal(whole(four), expected)
        assert [first for first, _ in four.shards] == [0, 5, 11, 17]

        four.save("saved")
        tf.train.Checkpoint(centers=four).write("checkpoint")
        one = tcl.distribute.ShardedCenters(C, D)
        one.load("saved")
        assert np.array_equal(whole(one), expected)
        one = tcl.distribute.ShardedCenters(C, D)
        tf.train.Checkpoint(centers=one).read("checkpoint").assert_consumed()
        assert np.array_equal(whole(one), expected)

        # And back; a second save replaces the first, and leaves none of its files.
        one.shards[0][1].assign(2 * expected)
        one.save("saved")
        tf.train.Checkpoint(centers=one).write("checkpoint")
        assert len(os.listdir("saved")) == 2
        four.load("saved")
        assert np.array_equal(whole(four), 2 * expected)
        with strategy.scope():
            again = tcl.distribute.ShardedCenters(C, D)
        tf.train.Checkpoint(centers=again).read("checkpoint").assert_consumed()
        assert np.array_equal(whole(again), 2 * expected)

        # A save that was cut off does not count.
        for path in os.listdir("saved"):
            if path.endswith(".npy"):
                os.truncate(os.path.join("saved", path), 100)
        with pytest.raises(ValueError, match="folder: expected a complete file"):
            again.load("saved")
        with pytest.raises(ValueError, match=r"folder: expected a table float32 \\(3, 2\\)"):
            tcl.distribute.ShardedCenters(3, 2).load("saved")
        with pytest.raises(FileNotFoundError):
            again.load("nothing")

        # A whole model in Keras's files.
        model, _, layer = trained(strategy.scope(), sharded=True)
        model.save("model.keras")
        loaded = keras.saving.load_model("model.keras", custom_objects={
            "AddsAnother": AddsAnother, "Model": keras.Model})
        assert np.array_equal(whole(loaded.get_layer("centers").centers), whole(layer.centers))
        model.save_weights("model.weights.h5")
        trained_centers = whole(layer.centers)
        for _, part in layer.centers.shards:
            part.assign(tf.zeros_like(part))
        model.load_weights("model.weights.h5")
        assert np.array_equal(whole(layer.centers), trained_centers)
        assert np.abs(whole(layer.centers)).max() > 0.01
        """,
        tmp_path,
    )
