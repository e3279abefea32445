"""Centers are saved and restored exactly, and the training then continues with the same bits."""

import json
import os

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from tf_center_loss_op.tables import blocks

C, D, WIDTH = 12, 7, 5


def make_model(impl="auto", classes=C, dim=D, weight=0.1):
    inputs = keras.Input([WIDTH], name="inputs")
    labels = keras.Input([], dtype="int32", name="labels")
    features = keras.layers.Dense(dim, name="features")(inputs)
    layer = tcl.CenterLoss(classes, loss_weight=weight, alpha=0.3, impl=impl, name="center_loss")
    features = layer([features, labels])
    outputs = keras.layers.Dense(C, name="logits")(features)
    model = keras.Model([inputs, labels], outputs)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(48, WIDTH)).astype(np.float32), rng.integers(0, C, 48).astype(np.int32)


def train(model, data):
    inputs, labels = data
    model.fit([inputs, labels], labels, batch_size=16, epochs=2, shuffle=False, verbose=0)


def weights(model):
    return [variable.numpy() for variable in model.weights]


def test_a_checkpoint_restores_the_variable(impl, tmp_path):
    centers = tf.Variable(tf.random.normal([C, D]))
    features, labels = tf.random.normal([20, D]), np.arange(20) % C
    tcl.update_centers(features, labels, centers, impl=impl)
    saved = centers.numpy()
    path = tf.train.Checkpoint(centers=centers).save(str(tmp_path / "checkpoint"))
    tcl.update_centers(features, labels, centers, impl=impl)
    went_on = centers.numpy()
    other = tf.Variable(tf.zeros([C, D]))
    tf.train.Checkpoint(centers=other).restore(path).assert_consumed()
    assert np.array_equal(other.numpy(), saved)
    tcl.update_centers(features, labels, other, impl=impl)
    assert np.array_equal(other.numpy(), went_on)
    # A table in use can be restored, too.
    tf.train.Checkpoint(centers=centers).restore(path).assert_consumed()
    assert np.array_equal(centers.numpy(), saved)


@pytest.mark.parametrize("kind", ["model.keras", "model.weights.h5", "checkpoint"])
def test_a_model_goes_on_bit_for_bit(impl, data, tmp_path, kind):
    model = make_model(impl)
    train(model, data)
    assert model.get_layer("center_loss").centers.numpy().any()
    saved, path = weights(model), str(tmp_path / kind)
    if kind == "model.keras":
        model.save(path)
        other = keras.models.load_model(path)
    elif kind == "model.weights.h5":
        model.save_weights(path)
        other = make_model(impl)
        other.optimizer.build(other.trainable_variables)
        other.load_weights(path)
    else:
        path = tf.train.Checkpoint(model=model).save(path)
        other = make_model(impl)
        train(other, data)  # so that the optimizer's variables exist
        tf.train.Checkpoint(model=other).restore(path)
    for a, b in zip(weights(other), saved, strict=True):
        assert np.array_equal(a, b)
    train(model, data)
    train(other, data)
    for a, b in zip(weights(other), weights(model), strict=True):
        assert np.array_equal(a, b)


@keras.saving.register_keras_serializable(package="test_saving")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.layers.Dense(D)
        self.center_loss = tcl.CenterLoss(C, loss_weight=0.1)
        self.logits = keras.layers.Dense(C)

    def call(self, inputs, training=None):
        features = self.center_loss(self.dense(inputs[0]), inputs[1], training=training)
        return self.logits(features)


def test_a_subclassed_model_goes_on_bit_for_bit(data, tmp_path):
    # Keras builds a loaded layer from shapes only, as if labels were floats.
    model = Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train(model, data)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert len(other.weights) == len(model.weights) > 4
    for _ in range(2):
        for a, b in zip(weights(other), weights(model), strict=True):
            assert np.array_equal(a, b)
        train(model, data)
        train(other, data)
    with pytest.raises(TypeError, match="labels: expected class ids"):
        model.fit([data[0], data[1].astype("f")], data[1], verbose=0)


def test_configuration_survives_in_the_file(impl, data, tmp_path):
    model = make_model(impl)
    model.save(tmp_path / "model.keras")
    layer = keras.models.load_model(tmp_path / "model.keras").get_layer("center_loss")
    assert isinstance(layer, tcl.CenterLoss)
    assert layer.get_config() == model.get_layer("center_loss").get_config()


# By blocks: the files equal Keras's, but take less memory.


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, the last one shorter."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5 * D * 4)


WARM_UP = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.5)


@pytest.mark.parametrize("weight", [0.1, WARM_UP], ids=["number", "schedule"])
@pytest.mark.parametrize("kind", ["model.keras", "folder", "model.weights.h5", "shards"])
def test_a_round_trip_by_blocks_keeps_the_bits(small_blocks, data, tmp_path, kind, weight):
    model, other = make_model(weight=weight), make_model(weight=weight)
    train(model, data)
    path = str(tmp_path / kind)
    if kind == "model.keras":
        model.save(path)
        other = keras.models.load_model(path)
    elif kind == "folder":
        model.save(path, zipped=False)
        other = keras.models.load_model(path)
    elif kind == "model.weights.h5":
        model.save_weights(path)
        other.load_weights(path)
    else:
        model.save_weights(path + ".weights.json", max_shard_size=1e-6)
        assert len(list(tmp_path.glob("shards_*.h5"))) > 1
        other.load_weights(path + ".weights.json")
    for a, b in zip(weights(other), weights(model), strict=True):
        assert np.array_equal(a, b)


def arrays_of(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def test_the_file_equals_that_of_keras(small_blocks, data, tmp_path, monkeypatch):
    model, ours, theirs = make_model(weight=WARM_UP), *(tmp_path / f"{k}.weights.h5" for k in "ab")
    train(model, data)
    model.save_weights(ours)
    with monkeypatch.context() as patch:
        patch.delattr(tcl.CenterLoss, "save_own_variables")
        model.save_weights(theirs)
    arrays, expected = arrays_of(ours), arrays_of(theirs)
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name])
    other = make_model(weight=WARM_UP)
    other.load_weights(theirs)
    with monkeypatch.context() as patch:
        patch.delattr(tcl.CenterLoss, "load_own_variables")
        again = make_model(weight=WARM_UP)
        again.load_weights(ours)
    for loaded in (other, again):
        for a, b in zip(weights(loaded), weights(model), strict=True):
            assert np.array_equal(a, b)


def only_centers(classes=C, dim=D):
    features, labels = keras.Input([dim]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(classes, centers_initializer="random_normal", name="center_loss")
    return keras.Model([features, labels], layer(features, labels))


def write_chunks(dataset, count):
    """Writes the first chunks of a dataset, of whose content nothing must be read."""
    high, _ = dataset.chunks
    for begin in range(0, min(count * high, dataset.shape[0]), high):
        dataset.id.write_direct_chunk((begin, 0), b"0")


@pytest.mark.parametrize("options", [dict(chunks=True), dict(chunks=(5, 3), compression="gzip")])
def test_a_whole_file_of_chunks_is_read(small_blocks, tmp_path, options):
    path = tmp_path / "model.weights.h5"
    saved, model = only_centers(), only_centers()
    saved.save_weights(path)
    with h5py.File(path, "a") as file:
        group = file["layers/center_loss/vars"]
        numbers = group["0"][()]
        del group["0"]
        group.create_dataset("0", data=numbers, maxshape=(None, D), **options)
    model.load_weights(path)
    assert np.array_equal(model.layers[-1].centers.numpy(), numbers)


@pytest.mark.parametrize(
    "how, words",
    [
        ("shape", r"centers: expected float32 \(12, 7\) in the file.*got float32 \(12, 8\)"),
        ("classes", r"got float32 \(11, 7\)"),
        ("dtype", r"got float64 \(12, 7\)"),
        ("nothing", "expected 1 variables, but received 0"),
        ("no numbers", "got a file that is cut off"),
        ("no size", "expected an array in the file, got none"),
        ("no rows", "expected an array in the file, got none"),
        ("no chunk", "expected all 3 chunks of an array in the file, got 0"),
        ("half the chunks", "expected all 3 chunks of an array in the file, got 2"),
        ("chunks cut off", "expected 3 whole chunks in the file, got some that are cut off"),
        ("a huge chunk", "expected chunks of at most 67108864 bytes.*got 1 of 2147483648"),
        ("wide chunks", "expected chunks of at most 67108864 bytes.*got 12 of 16777216"),
        ("link", "got a group or a link"),
        ("truncated", "truncated file"),
        ("half", "truncated file"),
        ("text", "file signature not found"),
    ],
)
def test_a_bad_file_changes_nothing(tmp_path, how, words):
    path = tmp_path / "model.weights.h5"
    sizes = dict(shape=dict(dim=D + 1), classes=dict(classes=C - 1)).get(how, {})
    only_centers(**sizes).save_weights(path)
    changed = ("dtype", "nothing", "no numbers", "no size", "no rows", "link")
    if how in changed or "chunk" in how:
        with h5py.File(path, "a") as file:
            group = file["layers/center_loss/vars"]
            numbers = group["0"][()]
            del group["0"]
            if how == "dtype":
                group["0"] = numbers.astype("f8")
            elif how == "no numbers":
                group.create_dataset("0", (C, D), "f4")
            elif how == "no size":
                group["0"] = h5py.Empty("f4")
            elif how == "no rows":
                group.create_dataset("0", (0, D), "f4")
            elif "chunk" in how:
                sizes = {"a huge chunk": (2**14, 2**15), "wide chunks": (1, 2**22)}.get(how, (5, D))
                whole = group.create_dataset("0", (C, D), "f4", chunks=sizes, maxshape=(None, None))
                write_chunks(whole, {"no chunk": 0, "half the chunks": 2}.get(how, 12))
            elif how == "link":
                file["elsewhere"] = numbers
                group["0"] = h5py.SoftLink("/elsewhere")
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "half":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "text":
        path.write_text("no file of weights")
    model = only_centers()
    before = model.layers[-1].centers.numpy()
    with pytest.raises((ValueError, OSError), match=f"(?s){words}") as caught:
        model.load_weights(path)
    if "centers: " in str(caught.value):
        assert repr(str(path)) in str(caught.value)
    assert np.array_equal(model.layers[-1].centers.numpy(), before)


@pytest.mark.parametrize(
    "how, words",
    [
        ("shape", rf"shape \({C}, {D + 1}\) .* shape \({C}, {D}\)"),
        ("classes", rf"shape \({C - 1}, {D}\) .* shape \({C}, {D}\)"),
        ("dtype", "expected dtype float does not equal original dtype double"),
        ("half the numbers", "Read less bytes than requested"),
        ("half the index", "not an sstable"),
    ],
)
def test_a_bad_checkpoint_changes_nothing(tmp_path, how, words):
    shapes = dict(shape=[C, D + 1], classes=[C - 1, D])
    saved = tf.Variable(
        tf.ones(shapes.get(how, [C, D]), "float64" if how == "dtype" else "float32")
    )
    path = tf.train.Checkpoint(centers=saved).write(str(tmp_path / "checkpoint"))
    if how.startswith("half"):
        name = "index" if how == "half the index" else "data-00000-of-00001"
        os.truncate(f"{path}.{name}", os.path.getsize(f"{path}.{name}") // 2)
    centers = tf.Variable(tf.random.normal([C, D]))
    before = centers.numpy()
    with pytest.raises((ValueError, IndexError, tf.errors.OpError), match=words):
        tf.train.Checkpoint(centers=centers).read(path).assert_consumed()
    assert np.array_equal(centers.numpy(), before)


def test_no_second_copy_of_a_large_table(tmp_path):
    # The table has 512 MiB, a block 64 MiB.
    seen = json.loads(run_program("save_a_large_model", cwd=tmp_path))
    table = 2**29
    for what in "save_weights", "load_weights", "save":
        assert seen[what] < table / 2, what
    assert seen["load_model"] < 1.5 * table


def test_sharded_centers_with_a_missing_chunk_are_refused(tmp_path):
    features, labels = keras.Input([D]), keras.Input([], dtype="int32")
    layer = tcl.CenterLoss(C, centers_initializer="ones", sharded=True, name="center_loss")
    model = keras.Model([features, labels], layer([features, labels]))
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    found = [name for name, array in arrays_of(path).items() if array.shape == (C, D)]
    with h5py.File(path, "a") as file:
        for name in found:
            del file[name]
            file.create_dataset(name, (C, D), "f4", chunks=(5, D))[:5] = 2
    with pytest.raises(
        ValueError, match="(?s)expected all 3 chunks of an array in the file, got 1"
    ):
        model.load_weights(path)
    assert len(found) == 1 and layer.centers.shards[0][1].numpy().max() == 1
