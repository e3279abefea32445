"""CentersMonitor measures, writes and warns; the training is the same without it."""

import csv
import itertools
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from messages import about, with_words
from naming import described

C, D, N = 5, 3, 120
NAMES = ["own_distance", "other_distance", "own_nearest", "seen", "norm", "moved"]


@pytest.fixture
def data():
    """Inputs and labels; the last class does not occur."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C - 1, N).astype(np.int32)
    return (np.eye(C)[labels] + rng.normal(size=(N, C)) / 10).astype(np.float32), labels


def functional(**options):
    inputs, labels = keras.Input([C], name="inputs"), keras.Input([], dtype="int32", name="labels")
    hidden = keras.layers.BatchNormalization()(inputs)
    hidden = keras.layers.Dropout(0.2)(keras.layers.Dense(D, name="embedding")(hidden))
    features = tcl.CenterLoss(C, loss_weight=0.1, name="cl", **options)(hidden, labels)
    model = keras.Model([inputs, labels], keras.layers.Dense(C)(features))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def batches(data):
    """As `fit` gets them; the last batch is smaller."""
    inputs, labels = data
    return tf.data.Dataset.from_tensor_slices(((inputs, labels), labels)).batch(32)


def train(model, data, *callbacks, epochs=2, **options):
    inputs, labels = data
    options = dict(epochs=epochs, batch_size=30, verbose=0, callbacks=list(callbacks)) | options
    return model.fit([inputs, labels], labels, **options).history


def truth(features, labels, table):
    """Means of own and nearest other distance and the share of own < other, in float64."""
    all_of_them = np.linalg.norm(features[:, None].astype("d") - table[None].astype("d"), axis=2)
    own = np.take_along_axis(all_of_them, labels[:, None], 1)[:, 0]
    np.put_along_axis(all_of_them, labels[:, None], np.inf, 1)
    other = all_of_them.min(1)
    return own.mean(), other.mean(), (own < other).mean()


def embedding(model):
    layer = model.get_layer("cl")
    return keras.Model(model.inputs, layer.input[0])


def table_of(model):
    return model.get_layer("cl").centers.numpy()


def events(folder):
    """{tag: {step: value}} of the event files in a folder, and {tag: plugin}."""
    values, plugins = {}, {}
    for file in sorted(folder.glob("*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
                # TensorBoard needs the plugin in the first event of a tag; each one has it.
                plugins[value.tag] = value.metadata.plugin_data.plugin_name
    return values, plugins


def test_the_numbers_in_the_logs(data):
    model = functional()
    before = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: before.append(table_of(model))
    )
    history = train(model, data, keep, tcl.training.CentersMonitor(None, batches(data)), epochs=3)
    table, features = table_of(model), embedding(model).predict(list(data), verbose=0)
    expected = dict(zip(NAMES, truth(features, data[1], table), strict=False))
    expected["seen"] = (C - 1) / C
    expected["norm"] = np.linalg.norm(table, axis=1).mean()
    expected["moved"] = np.linalg.norm(table - before[-1], axis=1).mean()
    for name in NAMES:
        assert len(history[f"cl_{name}"]) == 3
        np.testing.assert_allclose(history[f"cl_{name}"][-1], expected[name], rtol=1e-5)
        assert type(history[f"cl_{name}"][-1]) is float


def test_csv_logger_and_no_dataset(data, tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = train(functional(), data, tcl.training.CentersMonitor(None), logger)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["cl_norm"]) for row in rows] == history["cl_norm"]
    found = [name for name in history if name.startswith("cl_") and name != "cl_distance"]
    assert found == ["cl_seen", "cl_norm", "cl_moved"]


def test_the_training_is_the_same(data, tmp_path):
    def run(*callbacks):
        keras.utils.set_random_seed(3)
        model = functional()
        history = train(model, data, *callbacks, epochs=3, validation_data=(list(data), data[1]))
        state = [weight.numpy() for weight in model.weights + model.optimizer.variables]
        return history, state, np.random.random(), float(tf.random.uniform([]))

    history, state, *drawn = run()
    watched = run(tcl.training.CentersMonitor(tmp_path, batches(data), freq=1))
    assert {name: watched[0][name] for name in history} == history
    assert all(np.array_equal(a, b) for a, b in zip(state, watched[1], strict=True))
    assert drawn == list(watched[2:])


def test_event_files(data, tmp_path):
    history = train(
        functional(), data, tcl.training.CentersMonitor(tmp_path, batches(data)), epochs=3
    )
    values, plugins = events(tmp_path)
    histograms = {f"cl/{name}_histogram" for name in NAMES if name not in ("own_nearest", "seen")}
    assert set(values) == {f"cl/{name}" for name in NAMES} | histograms
    for name in NAMES:
        assert plugins[f"cl/{name}"] == "scalars"
        expected = np.float32(history[f"cl_{name}"])
        assert np.array_equal([values[f"cl/{name}"][step] for step in range(3)], expected)
    for name in histograms:
        assert plugins[name] == "histograms"
        buckets = values[name][2]
        assert buckets.shape == (30, 3)
        assert buckets[:, 2].sum() == (N if "distance" in name else C)
        assert np.array_equal(buckets[1:, 0], buckets[:-1, 1])
        mean = np.average(buckets[:, :2].mean(1), weights=buckets[:, 2])
        width = buckets[0, 1] - buckets[0, 0]
        scalar = values[name.removesuffix("_histogram")][2]
        assert abs(mean - scalar) <= width


def test_an_integer_freq_counts_batches(data, tmp_path):
    # Four batches an epoch.
    train(functional(), data, tcl.training.CentersMonitor(tmp_path, freq=3), epochs=2)
    assert sorted(events(tmp_path)[0]["cl/moved"]) == [3, 6]


def test_the_numbers_are_of_the_sampled_classes(data):
    model = functional()
    monitor = tcl.training.CentersMonitor(None, batches(data), max_samples=40, max_classes=3)
    history = train(model, data, monitor)
    table = table_of(model)
    inputs, labels = (part[:40] for part in data)
    features = embedding(model).predict([inputs, labels], verbose=0)
    own = truth(features, labels, table)[0]
    np.testing.assert_allclose(history["cl_own_distance"][-1], own, rtol=1e-5)

    def is_of(rows):
        """True if the distance and the norm are those of these classes."""
        others = np.linalg.norm(features[:, None] - table[rows][None], axis=2)
        others = np.where(rows == labels[:, None], np.inf, others).min(1).mean()
        norm = np.linalg.norm(table[rows], axis=1).mean()
        seen = history["cl_other_distance"][-1], history["cl_norm"][-1]
        return np.allclose(seen, (others, norm), rtol=1e-5)

    choices = map(np.array, itertools.combinations(range(len(table)), 3))
    assert sum(map(is_of, choices)) == 1


def test_ignored_and_not_finite_samples_are_left_out(data):
    # Ignored labels and NaN: all means are over the rest.
    inputs, labels = data[0].copy(), data[1].copy()
    inputs[:7], labels[7:20] = np.nan, -1
    model = functional(ignore_class=-1)
    batch = ([inputs, labels], labels)
    history = train(model, (data[0], data[1]), tcl.training.CentersMonitor(None, [batch]), epochs=1)
    features = embedding(model).predict([inputs, labels], verbose=0)
    expected = truth(features[20:], labels[20:], table_of(model))
    found = [history[f"cl_{name}"][0] for name in NAMES[:3]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    nothing = ([inputs[:7], labels[:7]], labels[:7])
    history = train(model, data, tcl.training.CentersMonitor(None, [nothing]), epochs=1)
    assert all(math.isnan(history[f"cl_{name}"][0]) for name in NAMES[:3])


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__()
        self.dense = keras.layers.Dense(D)
        self.center_loss = tcl.CenterLoss(C, loss_weight=0.1, name="cl", **options)
        self.logits = keras.layers.Dense(C)
        self.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def call(self, inputs, training=None):
        features = self.center_loss(self.dense(inputs[0]), inputs[1], training=training)
        return self.logits(features)


@pytest.mark.parametrize("rows", [False, True], ids=["ids", "one-hot"])
def test_subclassed_model_with_embed(data, rows):
    model = Subclassed()
    inputs, labels = data
    dataset = [(inputs, np.eye(C, dtype="f")[labels] if rows else labels)]
    monitor = tcl.training.CentersMonitor(None, dataset, embed=lambda x: model.dense(x))
    history = train(model, data, monitor)
    expected = truth(model.dense(inputs).numpy(), labels, model.center_loss.centers.numpy())
    found = [history[f"cl_{name}"][-1] for name in NAMES[:3]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_two_layers(data):
    inputs, labels = keras.Input([C]), keras.Input([], dtype="int32")
    first, second = (tcl.CenterLoss(C, name=name) for name in ("first", "second"))
    model = keras.Model([inputs, labels], second(first(inputs, labels), labels))
    model.compile("sgd")
    monitors = [tcl.training.CentersMonitor(None, layer=layer) for layer in ("first", second)]
    history = model.fit(list(data), verbose=0, callbacks=monitors).history
    assert history["first_seen"] == history["second_seen"] == [0.8]
    with pytest.raises(ValueError, match=r"layer: .* one in the model, got \['first', 'second'\]"):
        model.fit(list(data), verbose=0, callbacks=[tcl.training.CentersMonitor(None)])


class Forgetful(Subclassed):
    """A training step that calls itself without training=True."""

    def train_step(self, batch):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=False))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Skipping(Subclassed):
    """A training step that does not call the layer."""

    def call(self, inputs, training=None):
        return self.logits(self.dense(inputs[0]))


class Collapsed(Subclassed):
    """Features that are zeros, as the centers are."""

    def call(self, inputs, training=None):
        self.center_loss(0 * self.dense(inputs[0]), inputs[1], training=training)
        return self.logits(inputs[0])


WRONG = {  # how it is made, whether the labels are all ignored, what the warning says
    "alpha": (lambda: functional(alpha=0.0), False, "alpha = 0"),
    "schedule": (
        lambda: functional(alpha=keras.optimizers.schedules.ExponentialDecay(0.0, 1, 0.5)),
        False,
        "alpha = 0",
    ),
    "rule": (lambda: functional(rule="tutorial", alpha=1.0), False, "alpha (1 - alpha)"),
    "deferred": (lambda: functional(deferred_update=True), False, "apply_deferred_update()"),
    "ignored": (lambda: functional(ignore_class=3), True, "all labels are ignore_class = 3"),
    "evaluation": (Forgetful, False, "training=False"),
    "zeros": (Collapsed, False, "equal their centers"),
    "not built": (Skipping, False, "has not been called yet"),
}


def check_warning(case, data, **options):
    make, ignored, words = WRONG[case]
    inputs, labels = data
    labels = np.full_like(labels, 3) if ignored else labels
    with pytest.warns(UserWarning, match=with_words(words)) as caught:
        train(make(), (inputs, labels), tcl.training.CentersMonitor(None), epochs=2, **options)
    messages = [str(w.message) for w in caught if "did not move" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].startswith("The centers of the layer 'cl' did not move in epoch 1: ")


@pytest.mark.parametrize("case", WRONG)
def test_warns_once_and_names_the_cause(data, case):
    check_warning(case, data)


@pytest.mark.parametrize("case", ["ignored", "zeros"])
def test_a_validation_does_not_hide_the_cause(data, case):
    # Its samples count in the layer's metric, from which the monitor reads the cause.
    check_warning(case, data, validation_data=([data[0] + 1, data[1]], data[1]))


def test_warns_of_a_layer_of_another_model(data):
    other = functional().get_layer("cl")
    with pytest.warns(UserWarning, match="not a layer of the model"):
        train(functional(), data, tcl.training.CentersMonitor(None, layer=other), epochs=1)


def test_warns_of_centers_that_stop(data):
    alpha = tf.Variable(0.5)
    model = functional(alpha=alpha)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: alpha.assign(0.5 * (epoch < 2))
    )
    with pytest.warns(UserWarning, match="in epoch 3: alpha = 0"):
        train(model, data, stop, tcl.training.CentersMonitor(None), epochs=4)


def test_no_warning_without_a_reason(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(functional(), data, tcl.training.CentersMonitor(None, batches(data)))
        # One batch an epoch, and a sample of few rows of the table.
        monitor = tcl.training.CentersMonitor(None, batches(data), max_classes=1)
        train(functional(), data, monitor, batch_size=N)


def test_the_warning_says_how_many_classes_were_sampled():
    # No sampled class moved, but others may have: the warning says so.
    inputs, labels = keras.Input([2]), keras.Input([], dtype="int32")
    model = keras.Model([inputs, labels], tcl.CenterLoss(100_000)(inputs, labels))
    model.compile("sgd")
    x, y = np.ones([4, 2], "f"), np.arange(4)
    with pytest.warns(UserWarning, match="of the 10 classes that are looked at, of 100000"):
        model.fit([x, y], verbose=0, callbacks=[tcl.training.CentersMonitor(None, max_classes=10)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = tcl.training.CentersMonitor(None, [([x, y],)], max_classes=10)
        model.fit([x, y], verbose=0, callbacks=[monitor])


def test_the_table_is_not_copied(tmp_path):
    out = run_program("monitor_a_large_table", cwd=tmp_path, TF_CENTER_LOSS_HUGE_PAGES="0")
    # A table of zeros takes memory only where the steps, or a copy of it, touch it. (On huge pages
    # these labels would touch all of it.)
    assert int(out) < 2**26


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(dataset=iter([])), TypeError, ["dataset", "again and again", "list_iterator"]),
        (dict(dataset=(1, 2)), TypeError, ["dataset", "tuple", "from_tensor_slices"]),
        (dict(dataset=3), TypeError, ["dataset", "int"]),
        (dict(layer=3), TypeError, ["layer", "CenterLoss", "3"]),
        (dict(embed=3, dataset=[1]), TypeError, ["embed", "function", "3"]),
        (dict(embed=len), ValueError, ["embed", "dataset=None"]),
        (dict(freq="batch"), TypeError, ["freq", "int >= 1", "batch"]),
        (dict(freq=0), ValueError, ["freq", "int >= 1", "0"]),
        (dict(max_samples=0), ValueError, ["max_samples", "int >= 1", "0"]),
        (dict(max_classes=2.5), TypeError, ["max_classes", "int >= 1", "2.5"]),
    ],
    ids=described,
)
def test_wrong_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=about(*words)):
        tcl.training.CentersMonitor(None, **arguments)


def test_a_wrong_model_or_dataset_is_refused_when_the_training_begins(data):
    inputs, labels = data
    cases = [
        (functional, dict(layer="nobody"), r"layer: .* one named 'nobody', got \['cl'\]"),
        (functional, dict(dataset=[]), "dataset: expected at least one batch, got none"),
        (functional, dict(dataset=[([inputs, labels + 2],)]), r"labels\[\d+\] = 5 is outside"),
        (Subclassed, dict(dataset=batches(data)), "embed: expected a function"),
        (lambda: functional(sharded=True), {}, "layer: expected one whose .* sharded=True"),
        (
            functional,
            dict(dataset=[(inputs, labels[1:])], embed=lambda x: x[:, :D]),
            r"dataset: expected labels of shape \(120,\) .* got \(119,\)",
        ),
    ]
    for make, arguments, message in cases:
        model = make()
        before = [weight.numpy() for weight in model.weights]
        with pytest.raises(ValueError, match=message):
            train(model, data, tcl.training.CentersMonitor(None, **arguments))
        after = [weight.numpy() for weight in model.weights][: len(before)]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
