"""Checks of a synchronous strategy, for the programs of test_distribute*.py."""

import contextlib
import json
import os

import keras
import numpy as np
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from replicas import copies, gather, spread

C, D = 23, 6

# Samples of each replica: uneven, and one replica without any.
SIZES = [5, 3, 0, 6]


def batches(replicas, seed, labels="few", dtype="float32"):
    """(features, labels) of each replica."""
    rng = np.random.default_rng(seed)
    sizes = SIZES[:replicas] if replicas > 2 else ([5, 0] if seed % 2 else [5, 3])
    cuts = np.cumsum(sizes)[:-1]
    total = sum(sizes)
    ids = rng.permutation(C)[:total] if labels == "distinct" else rng.integers(0, 3, total)
    features = rng.normal(size=(total, D)).astype("float32")
    if labels == "bad":
        features[0, 0] = np.inf
    return np.split(features.astype(dtype), cuts), np.split(ids.astype("int32"), cuts)


def step_of(strategy, centers, *, eager=False, **options):
    """A step: per replica its share of the loss and the gradient."""

    def run(features, labels):
        def step(features, labels):
            with tf.GradientTape() as tape:
                tape.watch(features)
                loss = tcl.center_loss(features, labels, centers, **options)
            return tf.reshape(loss, [-1]), tape.gradient(loss, features)

        return strategy.run(step, args=(features, labels))

    return run if eager else tf.function(run, autograph=False)


# Replicas exchange sums per label if there are few labels, samples if the labels are distinct.
CASES = [
    ({}, "few"),
    ({"rule": "batch_mean", "ignore_class": 1}, "distinct"),
    ({"rule": "paper_batch_mean", "reduction": "sum", "ignore_class": 2}, "bad"),
    ({"rule": "mean", "reduction": "none", "alpha": 1.0}, "distinct"),
    ({"update_centers": False, "ignore_class": 2}, "few"),
]


def check_functions(strategy, impl, make, tables_of, *, cases=CASES, eager=False):
    """Compares steps with the oracle.

    `make(start)` creates a table in the strategy's scope; `tables_of(table)` gives (first row,
    rows) of each shard or copy.
    """
    replicas = strategy.num_replicas_in_sync
    here = None
    for seed, (options, labels) in enumerate(cases):
        start = np.random.default_rng(99).normal(size=(C, D)).astype("float32")
        centers = make(start)
        features, ids = batches(replicas, seed, labels)
        run = step_of(strategy, centers, impl=impl, eager=eager, **options)
        loss, gradient = run(spread(strategy, features), spread(strategy, ids))
        known = dict(options)
        moves = known.pop("update_centers", True)
        truth = oracle.center_loss(np.concatenate(features), np.concatenate(ids), start, **known)
        after = truth.centers if moves else start
        for first, rows in tables_of(centers):
            expected = after[first : first + len(rows)]
            np.testing.assert_allclose(rows, expected, rtol=2e-6, atol=2e-7, err_msg=str(options))
            if not moves:
                assert np.array_equal(rows, expected)
        here = here or replicas_here(strategy)
        bounds = np.cumsum([0, *map(len, ids)])
        own = np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in here])
        np.testing.assert_allclose(
            gather(strategy, gradient), truth.feature_gradient[own], rtol=2e-6, atol=1e-7
        )
        shares = gather(strategy, loss)
        if options.get("reduction") == "none":
            np.testing.assert_allclose(shares, truth.loss[own], rtol=2e-6)
        elif len(here) == replicas:
            np.testing.assert_allclose(shares.sum(), truth.loss, rtol=2e-6)


def replicas_here(strategy):
    """The ids of the replicas that run in this process."""
    ids = strategy.run(lambda: tf.distribute.get_replica_context().replica_id_in_sync_group)
    return [int(k) for k in strategy.experimental_local_results(ids)]


def mirrored_table(strategy):
    """`make` and `tables_of` for a table with a copy on each replica."""

    def make(start):
        with strategy.scope():
            return tf.Variable(start, trainable=False)

    return make, lambda centers: [(0, copies(strategy, centers))]


def sharded_table(strategy):
    """`make` and `tables_of` for a table with a shard on each replica."""

    def make(start):
        with strategy.scope():
            centers = tcl.distribute.ShardedCenters(C, D)
        for first, part in centers.shards:
            part.assign(start[first : first + part.shape[0]])
        return centers

    return make, lambda centers: [(first, part.numpy()) for first, part in centers.shards]


class AddsAnother(keras.layers.Layer):
    """Another layer's loss, before the center loss."""

    def call(self, x):
        """Adds a loss that must be kept."""
        self.add_loss(0.25 * tf.ones([]))
        return x


def main_loss(**options):
    """The loss of the labels, a mean."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def trained(
    scope,
    *,
    loss=lambda: tcl.distribute.GlobalBatchLoss(main_loss()),
    deferred_update=False,
    steps=1,
    **options,
):
    """A model fitted on 3 batches of 16 and a last one of 1 sample; the model, logs and layer."""
    keras.utils.set_random_seed(1)
    with scope:
        inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
        embedded = keras.layers.Dense(D, kernel_regularizer="l2")(inputs)
        layer = tcl.CenterLoss(
            C, loss_weight=0.5, deferred_update=deferred_update, name="centers", **options
        )
        x = layer([AddsAnother()(embedded), labels])
        x = keras.layers.Dropout(0.0)(keras.layers.Dense(C)(x))
        bases = (
            (tcl.training.UpdateCentersAfterStep, keras.Model)
            if deferred_update
            else (keras.Model,)
        )
        model = type("Model", bases, {})([inputs, labels], x)
        model.compile("sgd", loss and loss(), steps_per_execution=steps)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(49, D)).astype("f"), rng.integers(0, 7, 49).astype("int32")
    data = tf.data.Dataset.from_tensor_slices(((x, y), y)).batch(16)
    logs = model.fit(data, epochs=2, verbose=0).history
    logs |= {"val_" + k: v for k, v in model.evaluate(data, verbose=0, return_dict=True).items()}
    return model, logs, layer


def trained_for_two(scope, wrap):
    """A fitted model with two outputs, a mask, weights of the samples and of the losses.

    It contains a layer in which the replicas synchronize; Keras mixes up their losses there.
    """
    keras.utils.set_random_seed(1)
    with scope:
        inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
        x = tcl.CenterLoss(C, loss_weight=0.5, name="before")(keras.layers.Dense(D)(inputs), labels)
        x = keras.layers.BatchNormalization(synchronized=True)(x)
        x = tcl.CenterLoss(C, loss_weight=0.5, name="after")(x, labels)
        outputs = {"a": keras.layers.Dense(C)(x), "b": keras.layers.Dense(1)(x)}
        model = keras.Model([inputs, labels], outputs)
        masked = main_loss(ignore_class=3, reduction="mean_with_sample_weight")
        model.compile("sgd", {"a": wrap(masked), "b": wrap("mse")}, loss_weights={"a": 1, "b": 0.3})
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(17, D)).astype("f"), rng.integers(0, 7, 17).astype("int32")
    weights = rng.uniform(0.1, 3, 17).astype("f")
    data = ((x, y), {"a": y, "b": x[:, :1]}, {"a": weights, "b": weights})
    data = tf.data.Dataset.from_tensor_slices(data).batch(16)
    logs = model.fit(data, epochs=2, verbose=0).history
    return model, logs, model.predict(data, verbose=0)


def check_same(model, logs, one, one_logs):
    """Trained weights and logs are those of one replica."""
    for mine, other in zip(model.trainable_weights, one.trainable_weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)
    assert logs.keys() == one_logs.keys()
    for name in logs:
        np.testing.assert_allclose(logs[name], one_logs[name], rtol=1e-5, err_msg=name)


def check_fit(strategy, cases):
    """Weights, centers and logs are those of one replica."""
    for options in cases:
        model, logs, layer = trained(strategy.scope(), **options)
        alike = {k: v for k, v in options.items() if k not in ("sharded", "steps")}
        one, one_logs, one_layer = trained(contextlib.nullcontext(), **alike)
        expected = one_layer.centers.numpy()
        assert np.abs(expected).max() > 0.01
        if options.get("sharded"):
            for first, part in layer.centers.shards:
                rows = expected[first : first + part.shape[0]]
                np.testing.assert_allclose(part.numpy(), rows, rtol=1e-5, atol=1e-6)
        else:
            table = copies(strategy, layer.centers.value)
            np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
        check_same(model, logs, one, one_logs)
    return layer


def differs(check, *args):
    """True if the check fails."""
    try:
        check(*args)
    except AssertionError:
        return True
    return False


def worker():
    """The index of this worker."""
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]
