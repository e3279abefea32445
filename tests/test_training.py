"""The layer in a training: schedules, metric, time of the step, mixed precision, export."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tf_center_loss_op as tcl
from child import run_program
from tolerances import assert_close

B, D, C = 12, 3, 5


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


def numbers(layer):
    return keras.ops.convert_to_numpy(layer.centers)


def classifier(layer, bases=(), **compile_options):
    """inputs -> Dense -> layer -> Dense, compiled."""
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    embedded = keras.layers.Dense(D, name="embedding")(inputs)
    logits = keras.layers.Dense(C)(layer([embedded, labels]))
    kind = type("Model", (*bases, keras.Model), {}) if bases else keras.Model
    model = kind([inputs, labels], logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**dict(optimizer="adam", loss=loss) | compile_options)
    return model


# Weight and alpha: numbers, variables, schedules.


@pytest.mark.parametrize("kind", [tf.Variable, lambda x: keras.Variable(x, trainable=False)])
def test_variables_are_read_at_each_call(impl, kind, batch):
    weight, alpha = kind(0.5), kind(0.25)
    layer = tcl.CenterLoss(C, loss_weight=weight, alpha=alpha, impl=impl)
    assert [variable.name for variable in layer.weights] == []
    call = tf.function(lambda x, y: [layer(x, y, training=True), layer.losses[-1]][1])
    truth = oracle.center_loss(*batch, np.zeros([C, D]), alpha=0.25)
    assert_close(call(*batch), 0.5 * truth.loss, "float32", "loss")
    assert_close(numbers(layer), truth.centers, "float32", "centers")
    weight.assign(2.0)
    alpha.assign(0.0)
    expected = 2 * oracle.center_loss(*batch, truth.centers).loss
    np.testing.assert_allclose(call(*batch), expected, rtol=1e-5)
    assert_close(numbers(layer), truth.centers, "float32", "centers")
    assert layer.get_config()["loss_weight"]["variable"] == 2.0


def test_schedules_follow_the_training_calls(impl, batch):
    # weight 0, 1, 2, ... and alpha 0.5, 0.4, ...; an evaluation does not count as a step.
    warm_up = keras.optimizers.schedules.PolynomialDecay(0.0, 10, 10.0)
    slower = keras.optimizers.schedules.PolynomialDecay(0.5, 5, 0.0)
    layer = tcl.CenterLoss(C, loss_weight=warm_up, alpha=slower, impl=impl)
    call = tf.function(lambda x, y, train: [layer(x, y, training=train), layer.losses[-1]][1])
    centers = np.zeros([C, D])
    for k in range(3):
        truth = oracle.center_loss(*batch, centers, alpha=0.5 - 0.1 * k)
        np.testing.assert_allclose(call(*batch, False), k * truth.loss, rtol=1e-5)
        np.testing.assert_allclose(call(*batch, True), k * truth.loss, rtol=1e-5)
        centers = truth.centers
        np.testing.assert_allclose(numbers(layer), centers, rtol=1e-5, atol=1e-6)


def test_a_schedule_is_saved_with_its_step(impl, batch, tmp_path):
    warm_up = keras.optimizers.schedules.PolynomialDecay(0.0, 10, 10.0)
    model = classifier(tcl.CenterLoss(C, loss_weight=warm_up, impl=impl, name="centers"))
    model.fit([*batch], batch[1], batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    layer = again.get_layer("centers")
    assert int(layer.steps.numpy()) == 3
    assert layer.loss_weight.get_config() == warm_up.get_config()
    assert np.array_equal(numbers(layer), numbers(model.get_layer("centers")))


@pytest.mark.parametrize("name", ["loss_weight", "alpha"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "0.5", True, tf.Variable([1.0])])
def test_wrong_factors_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        tcl.CenterLoss(C, **{name: value})


@pytest.mark.parametrize("name", ["loss_weight", "alpha"])
def test_factors_may_be_set_later(name, batch):
    layer = tcl.CenterLoss(C)
    layer(*batch, training=True)
    for value in (0.5, tf.Variable(0.5), keras.Variable(0.5, trainable=False)):
        setattr(layer, name, value)
        layer(*batch, training=True)
        config = layer.get_config()[name]
        assert (config if isinstance(value, float) else config["variable"]) == 0.5
        assert [variable.name for variable in layer.weights] == ["centers"]
    kept = getattr(layer, name)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 10, 10.0)
    for wrong in (-1.0, float("nan"), "0.5", tf.Variable([1.0]), schedule):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            setattr(layer, name, wrong)
        assert getattr(layer, name) is kept


# The metric.


def test_the_distance_stands_beside_the_loss(impl, batch, capsys):
    features, labels = batch
    inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, alpha=0.0, impl=impl, name="centers", ignore_class=0)
    model = keras.Model([inputs, label], layer([inputs, label]))
    model.compile("sgd")
    features[1] = np.nan
    logs = model.fit([features, labels], batch_size=4, epochs=2).history
    counted = (labels != 0) & (np.arange(B) != 1)
    expected = np.linalg.norm(features[counted], axis=1).mean()
    np.testing.assert_allclose(logs["centers_distance"], [expected] * 2, rtol=1e-5)
    assert "centers_distance:" in capsys.readouterr().out
    result = model.evaluate([features, labels], batch_size=4, verbose=0, return_dict=True)
    np.testing.assert_allclose(result["centers_distance"], expected, rtol=1e-5)


def test_the_metric_can_be_left_out(impl, batch):
    model = classifier(tcl.CenterLoss(C, impl=impl, distance_metric=False))
    assert set(model.fit([*batch], batch[1], verbose=0).history) == {"loss"}


# When the centers move.


def test_deferred_update_moves_once_by_all_batches(impl, batch):
    layer = tcl.CenterLoss(C, alpha=0.3, impl=impl, deferred_update=True)
    for traced in (False, True):

        def step():
            for part in (slice(0, 5), slice(5, B)):
                layer(batch[0][part], batch[1][part], training=True)
            layer.apply_deferred_update()

        before = numbers(layer) if layer.built else np.zeros([C, D])
        (tf.function(step) if traced else step)()
        truth = oracle.center_loss(*batch, before, alpha=0.3)
        assert_close(numbers(layer), truth.centers, "float32", "centers")
    layer(*batch, training=False)
    with pytest.raises(RuntimeError, match="expected a training call of the layer before it"):
        layer.apply_deferred_update()


def test_apply_deferred_update_needs_deferred_update(batch):
    layer = tcl.CenterLoss(C)
    layer(*batch, training=True)
    with pytest.raises(RuntimeError, match="deferred_update=True"):
        layer.apply_deferred_update()


def test_calls_left_over_from_another_trace_are_forgotten(impl, batch):
    layer = tcl.CenterLoss(C, impl=impl, deferred_update=True)
    layer.build((None, D))
    tf.function(lambda: layer(*batch, training=True))()
    with pytest.raises(RuntimeError, match="expected a training call"):
        layer.apply_deferred_update()


def test_an_update_that_never_comes_is_an_error(batch):
    layer = tcl.CenterLoss(C, deferred_update=True, distance_metric=False)
    words = r"expected apply_deferred_update\(\) at least once in (\d+)"
    calls = 0
    with pytest.raises(RuntimeError, match=words) as caught:
        while calls < 10_000:
            layer(*batch, training=True)
            calls += 1
    assert calls == int(re.search(words, str(caught.value))[1]) > 100


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_a_deferred_update_after_the_optimizer_gives_the_same(impl, batch, steps_per_execution):
    # The step uses the residual of the forward pass, so the time of the step does not matter.
    results = []
    for deferred, bases in ((False, ()), (True, (tcl.training.UpdateCentersAfterStep,))):
        keras.utils.set_random_seed(1)
        layer = tcl.CenterLoss(C, impl=impl, deferred_update=deferred)
        model = classifier(layer, bases, steps_per_execution=steps_per_execution)
        model.fit([*batch], batch[1], batch_size=4, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for forward, deferred in zip(*results, strict=True):
        assert np.array_equal(forward, deferred)


def test_gradient_checkpointing_moves_the_centers_once(impl, batch):
    dense = keras.layers.Dense(D)
    layer = tcl.CenterLoss(C, impl=impl, deferred_update=True)
    dense.build((None, D)), layer.build((None, D))
    calls = []

    @tf.recompute_grad
    def forward(x):
        calls.append(1)
        return dense(x)

    with tf.GradientTape() as tape:
        embedded = forward(tf.constant(batch[0]))
        layer(embedded, batch[1], training=True)
        loss = layer.losses[0]
    tape.gradient(loss, dense.trainable_weights)
    assert len(calls) == 2
    layer.apply_deferred_update()
    truth = oracle.center_loss(embedded.numpy(), batch[1], np.zeros([C, D]))
    assert_close(numbers(layer), truth.centers, "float32", "centers")


RECOMPUTING = {
    "loss": lambda x, y, layer: tcl.center_loss(x, y, layer.centers),
    "update_centers": lambda x, y, layer: [x, tcl.update_centers(x, y, layer.centers)][0],
    "layer": lambda x, y, layer: layer(x, y, training=True),
}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("what", RECOMPUTING)
def test_a_step_that_would_be_recomputed_is_an_error(impl, batch, what, deferred, traced):
    layer = tcl.CenterLoss(C, impl=impl, deferred_update=deferred)
    layer.build((None, D))
    block = tf.recompute_grad(lambda x: RECOMPUTING[what](x, batch[1], layer))

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = block(x)
        return tape.gradient(out, x)

    with pytest.raises(RuntimeError, match="outside of tf.recompute_grad"):
        (tf.function(step) if traced else step)(tf.constant(batch[0]))
    assert not numbers(layer).any()


@pytest.mark.parametrize(
    "deferred, bases", [(False, ()), (True, (tcl.training.UpdateCentersAfterStep,))]
)
def test_a_scope_that_recomputes_leaves_the_layer_alone(impl, batch, deferred, bases):
    # In eager mode only: in functions Keras cannot recompute a layer that takes `training`.
    results = []
    for mode in ("list_of_layers", None):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode, layer_names=["embedding", "centers"]):
            layer = tcl.CenterLoss(C, impl=impl, deferred_update=deferred, name="centers")
            model = classifier(layer, bases, run_eagerly=True)
        model.fit([*batch], batch[1], batch_size=4, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for recomputed, plain in zip(*results, strict=True):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-6)


# fit.


@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
def test_jit_compile(jit_compile, batch):
    keras.utils.set_random_seed(1)
    layer = tcl.CenterLoss(C)
    model = classifier(layer, jit_compile=jit_compile)
    losses = model.fit([*batch], batch[1], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert numbers(
        model.layers[3] if hasattr(model.layers[3], "centers") else model.layers[2]
    ).any()


def test_sequential(impl, batch):
    layer = tcl.CenterLoss(C, impl=impl)
    model = keras.Sequential([layer, keras.layers.Dense(C)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, run_eagerly=False)
    model.train_on_batch([*batch], batch[1])
    truth = oracle.center_loss(*batch, np.zeros([C, D]))
    assert_close(numbers(layer), truth.centers, "float32", "centers")


@keras.saving.register_keras_serializable(package="test_training")
class SequentialWithLabels(keras.Sequential):
    def call(self, inputs, training=None):
        x, labels = inputs
        for layer in self.layers:
            x = layer(x, labels) if isinstance(layer, tcl.CenterLoss) else layer(x)
        return x


def test_sequential_with_labels(impl, batch, tmp_path):
    # The layer is between others in a sequential model.
    features, labels = batch
    layer = tcl.CenterLoss(C, impl=impl, name="centers")
    dense = keras.layers.Dense(D, use_bias=False, trainable=False)
    model = SequentialWithLabels([dense, keras.layers.Dropout(0.0), layer, keras.layers.Dense(C)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.train_on_batch([*batch], labels)
    truth = oracle.center_loss(features @ dense.kernel.numpy(), labels, np.zeros([C, D]))
    assert_close(numbers(layer), truth.centers, "float32", "centers")
    assert "centers_distance" in model.fit([*batch], labels, epochs=2, verbose=0).history
    moved = numbers(layer)
    model.evaluate([*batch], labels, verbose=0)
    expected = model.predict([*batch], verbose=0)
    assert np.array_equal(numbers(layer), moved)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(numbers(again.layers[2]), moved)
    np.testing.assert_allclose(again.predict([*batch], verbose=0), expected, rtol=1e-6)


class OwnTrainStep:
    def train_step(self, data):
        inputs, labels = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=labels, y_pred=self(inputs, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {metric.name: metric.result() for metric in self.metrics}


def test_a_custom_train_step_trains(impl, batch):
    results = []
    for bases in ((), (OwnTrainStep,)):
        keras.utils.set_random_seed(1)
        layer = tcl.CenterLoss(C, loss_weight=0.3, impl=impl)
        model = classifier(layer, bases)
        logs = model.fit([*batch], batch[1], batch_size=4, epochs=2, shuffle=False, verbose=0)
        assert f"{layer.name}_distance" in logs.history
        results.append(model.get_weights())
    for kerass, own in zip(*results, strict=True):
        assert np.array_equal(kerass, own)


def test_the_same_seed_gives_the_same_bits(impl, batch):
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        initializer = tcl.tables.RandomNormal(0.1, seed=2)
        model = classifier(tcl.CenterLoss(C, impl=impl, centers_initializer=initializer))
        model.fit([*batch], batch[1], batch_size=5, epochs=3, verbose=0)
        results.append(model.get_weights())
    for first, second in zip(*results, strict=True):
        assert np.array_equal(first, second)


def test_gradient_accumulation_in_the_optimizer(impl, batch):
    # The optimizer steps every second batch; the centers by each batch, once.
    layer = tcl.CenterLoss(C, impl=impl)
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    model = classifier(layer, optimizer=optimizer)
    dense = model.get_layer("embedding")
    model.fit([*batch], batch[1], batch_size=4, shuffle=False, verbose=0)
    embedded, centers = np.asarray(dense(batch[0])), np.zeros([C, D])
    for k in range(0, B, 4):
        part = slice(k, k + 4)
        centers = oracle.center_loss(embedded[part], batch[1][part], centers).centers
    np.testing.assert_allclose(numbers(layer), centers, rtol=1e-4, atol=1e-6)


# Mixed precision.


class PlainCenters(keras.layers.Layer):
    """The formula written out, as in the tutorial."""

    def build(self, shape):
        self.centers = self.add_weight(
            shape=(C, D), initializer="zeros", trainable=False, autocast=False
        )

    def call(self, inputs):
        features, labels = tf.cast(inputs[0], tf.float32), inputs[1]
        table = self.centers.value
        residual = features - tf.stop_gradient(tf.gather(table, labels))
        self.add_loss(tf.nn.l2_loss(residual) / B)
        _, index, counts = tf.unique_with_counts(labels)
        n = tf.cast(tf.gather(counts, index), tf.float32)[:, tf.newaxis]
        table.scatter_add(tf.IndexedSlices(tf.stop_gradient(0.5 / (1 + n) * residual), labels))
        return inputs[0]


def overflowing_fit(layer):
    """A float16 fit in which one batch of eight overflows in the embedding."""
    keras.utils.set_random_seed(0)
    inputs, labels = keras.Input([D]), keras.Input([], dtype="int32")
    embedded = keras.layers.Dense(D, dtype="mixed_float16", name="embedding")(inputs)
    logits = keras.layers.Dense(C, dtype="float32")(layer([embedded, labels]))
    model = keras.Model([inputs, labels], logits)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    y = rng.integers(0, C, 8 * B).astype(np.int32)
    x = (np.eye(D)[y % D] + rng.normal(size=(8 * B, D)) / 5).astype("f")
    x[3 * B : 4 * B] = 60000.0  # beyond float16 once it is multiplied
    model.get_layer("embedding").kernel.assign(2 * np.eye(D))
    model.fit([x, y], y, batch_size=B, shuffle=False, verbose=0)
    after = model.fit([x[:B], y[:B]], y[:B], epochs=5, verbose=0).history["loss"]
    return numbers(layer), after, model.get_layer("embedding").kernel.numpy()


def test_an_overflow_in_float16_does_not_poison_the_table(impl):
    table, losses, kernel = overflowing_fit(
        tcl.CenterLoss(C, loss_weight=0.1, impl=impl, dtype="mixed_float16")
    )
    assert np.isfinite(table).all() and table.any()
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert np.isfinite(kernel).all()


def test_the_plain_formula_is_poisoned_for_good():
    table, losses, _ = overflowing_fit(PlainCenters(dtype="float32"))
    assert not np.isfinite(table).all()
    assert not np.isfinite(losses).any()


def test_bfloat16_learns(impl, batch):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = classifier(tcl.CenterLoss(C, loss_weight=0.1, impl=impl))
    finally:
        keras.config.set_dtype_policy("float32")
    losses = model.fit([*batch], batch[1], epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_floatx_float64_trains(impl, batch):
    keras.config.set_floatx("float64")
    try:
        layer = tcl.CenterLoss(C, loss_weight=0.1, impl=impl)
        model = classifier(layer)
        losses = model.fit([*batch], batch[1], epochs=10, verbose=0).history["loss"]
    finally:
        keras.config.set_floatx("float32")
    assert losses[-1] < losses[0]
    assert numbers(layer).dtype == np.float32 and numbers(layer).any()


# Export.


def test_the_exported_embedding_loads_without_this_package(impl, batch, tmp_path):
    model = classifier(tcl.CenterLoss(C, impl=impl))
    model.fit([*batch], batch[1], verbose=0)
    embedding = keras.Model(model.inputs[0], model.get_layer("embedding").output)
    embedding.export(tmp_path / "exported", verbose=False)
    np.save(tmp_path / "x.npy", batch[0])
    run_program("load_without_the_package", cwd=tmp_path)
    assert_close(np.load(tmp_path / "y.npy"), embedding(batch[0]), "float32", "features")
