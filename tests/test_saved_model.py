"""SavedModels of a whole model with the layer: they are written, and load in another process."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program

B, D, C = 12, 3, 5
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.1)

OPTIONS = {
    "default": lambda: dict(),
    "no metric": lambda: dict(distance_metric=False),
    "sharded": lambda: dict(sharded=True),
    "variables": lambda: dict(
        alpha=tf.Variable(0.5), loss_weight=keras.Variable(0.1, trainable=False)
    ),
    "schedules": lambda: dict(alpha=SCHEDULE, loss_weight=SCHEDULE),
    "deferred": lambda: dict(deferred_update=True),
    "frozen": lambda: dict(trainable=False),
    "ignored": lambda: dict(ignore_class=1, rule="mean", reduction="sum"),
}


def functional(**options):
    inputs, labels = keras.Input([D], name="x"), keras.Input([], dtype="int32", name="labels")
    embedded = keras.layers.Dense(D)(inputs)
    embedded = tcl.CenterLoss(C, name="centers", **options)(embedded, labels)
    return keras.Model([inputs, labels], keras.layers.Dense(C)(embedded))


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__()
        self.dense, self.logits = keras.layers.Dense(D), keras.layers.Dense(C)
        self.center_loss = tcl.CenterLoss(C, name="centers", **options)

    def call(self, inputs, training=None):
        features = self.center_loss(self.dense(inputs[0]), inputs[1], training=training)
        return self.logits(features)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype(np.int32)


def trained(make, batch, **options):
    model = make(**options)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit([*batch], batch[1], verbose=0)
    return model


SPECS = [tf.TensorSpec([None, D]), tf.TensorSpec([None], tf.int32)]


def export(model, path):
    # As Keras asks for subclassed models whose inputs are not all floats.
    signature = [SPECS] if isinstance(model, Subclassed) else None
    model.export(path, verbose=False, input_signature=signature)


def serve(model, path):
    """As users of TensorFlow's own function with a signature of theirs do."""
    served = tf.function(lambda x, labels: model([x, labels]), input_signature=SPECS)
    tf.saved_model.save(model, path, signatures={"serving_default": served})


WRITE = {"save": tf.saved_model.save, "export": export, "signature": serve}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [functional, Subclassed], ids=["functional", "subclassed"])
@pytest.mark.filterwarnings("ignore:The centers of the layer")
def test_it_is_written_and_read(batch, tmp_path, make, options):
    model = trained(make, batch, **OPTIONS[options]())
    expected = model.predict([*batch], verbose=0)
    for name, write in WRITE.items():
        write(model, str(tmp_path / name))
        served = tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"]
        inputs = served.structured_input_signature[1]
        # Of a subclassed model Keras writes a signature of floats.
        given = {k: batch[len(s.shape) == 1] for k, s in inputs.items()}
        given = {k: tf.cast(v, inputs[k].dtype) for k, v in given.items()}
        (out,) = served(**given).values()
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_a_checkpoint_holds_what_it_held(batch, tmp_path):
    model = trained(functional, batch)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    path = tf.train.Checkpoint(layer=model.get_layer("centers")).write(str(tmp_path / "checkpoint"))
    names = {name.split("/.ATTRIBUTES")[0] for name, _ in tf.train.list_variables(path)}
    assert not any("distance" in name for name in names)
    assert any(name.startswith("layer/centers") for name in names)


@pytest.mark.parametrize("package", ["with", "without"])
def test_it_runs_in_another_process(batch, tmp_path, package):
    # Without the package there is no fused op: such a model has to be of plain TensorFlow.
    model = trained(functional, batch, impl="auto" if package == "with" else "graph")
    for name, write in WRITE.items():
        write(model, str(tmp_path / name))
    np.save(tmp_path / "x.npy", batch[0])
    np.save(tmp_path / "labels.npy", batch[1])
    run_program("load_the_saved_model", package, *WRITE, cwd=tmp_path)
    expected = model.predict([*batch], verbose=0)
    for name in WRITE:
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, rtol=1e-5)
