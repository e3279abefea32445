"""Large tables are created, filled, saved and loaded by blocks; a bad file changes nothing."""

import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from tf_center_loss_op.tables import blocks

C, D = 37, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one shorter."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10 * D * 4)


@pytest.fixture
def centers():
    return tf.Variable(np.arange(C * D, dtype=np.float32).reshape(C, D), trainable=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_created_table_is_zeros_and_moves(dtype):
    centers = tcl.tables.create(C, D, dtype=dtype)
    assert centers.shape == (C, D) and centers.dtype.name == dtype and not centers.trainable
    assert not centers.numpy().any()
    tcl.update_centers(tf.ones([1, D], dtype), [3], centers)
    assert np.flatnonzero(centers.numpy().any(axis=1)).tolist() == [3]


def test_two_tables_do_not_share_memory():
    first, second = tcl.tables.create(C, D), tcl.tables.create(C, D)
    tcl.update_centers(tf.ones([1, D]), [3], first)
    assert not second.numpy().any()


@pytest.mark.parametrize(
    "error, wrong",
    [
        (ValueError, dict(num_classes=0)),
        (ValueError, dict(dim=np.int64(-1))),
        (ValueError, dict(dtype="float16")),
        (TypeError, dict(dim=2.0)),
        (TypeError, dict(num_classes=True)),
        (TypeError, dict(num_classes="7")),
    ],
)
def test_wrong_sizes_are_refused(error, wrong):
    with pytest.raises(error, match=f"{next(iter(wrong))}: expected"):
        tcl.tables.create(**dict(num_classes=C, dim=D) | wrong)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_count(kind):
    seeds = [tcl.tables.RandomNormal(seed=seed) for seed in (kind(5), 5)]
    tables = [tcl.tables.create(kind(C), kind(D), initializer=seed).numpy() for seed in seeds]
    assert np.array_equal(*tables)
    json.dumps(seeds[0].get_config())
    centers = tcl.tables.create(C, D)
    batch = np.ones([2, D], np.float32), np.array([3, 1])
    counts = tcl.tables.from_dataset([batch], centers, ignore_class=kind(3), progress=False)
    assert np.flatnonzero(counts).tolist() == [1]
    labels, _ = tcl.nearest.predict(tf.ones([1, D]), centers, k=kind(2), block=kind(9))
    assert labels.shape == (1, 2)
    assert tcl.distribute.ShardedCenters(kind(C), kind(D)).shape == (C, D)


@pytest.mark.parametrize("error, seed", [(TypeError, 1.0), (TypeError, True), (ValueError, 2**63)])
def test_a_wrong_seed_is_refused(error, seed):
    with pytest.raises(error, match="seed: expected an int"):
        tcl.tables.RandomNormal(seed=seed)


@pytest.mark.parametrize("wrong", ["1", 1.5, 255.0, True])
def test_a_wrong_class_to_ignore_is_refused(centers, wrong):
    batch = np.ones([2, D], np.float32), np.array([3, 1])
    with pytest.raises(TypeError, match="ignore_class: expected an int"):
        tcl.tables.from_dataset([batch], centers, ignore_class=wrong, progress=False)


@pytest.mark.parametrize("initializer", ["ones", "random_normal", lambda shape, dtype: 1 / 0])
def test_a_table_of_any_initializer_is_compared_with_the_memory(initializer):
    with pytest.raises(MemoryError, match=r"got 1000000000000 x 256 float32, 1024000.0 GB"):
        tcl.tables.create(10**12, 256, initializer=initializer)


@pytest.mark.parametrize("initializer", ["zeros", tcl.tables.RandomNormal()])
@pytest.mark.parametrize("make", ["create", "layer"])
def test_a_table_that_no_memory_holds_is_an_early_error(initializer, make):
    # A petabyte.
    with pytest.raises(MemoryError, match=r"got 1000000000000 x 256 float32, 1024000.0 GB"):
        if make == "create":
            tcl.tables.create(10**12, 256, initializer=initializer)
        else:
            layer = tcl.CenterLoss(10**12, centers_initializer=initializer)
            layer.build((None, 256))


@pytest.mark.parametrize(
    "initializer, limit, rows",
    [
        # Zeros take memory where they are written, so all memory counts.
        ("zeros", "max", 9 * 256),
        # Numbers take it at once, so free memory counts.
        (tcl.tables.RandomNormal(), "max", 4 * 256),
        # A container may have less.
        ("zeros", "5000", 1250),
    ],
    ids=["zeros", "numbers", "container"],
)
def test_a_table_fits_into_the_memory_that_counts(monkeypatch, initializer, limit, rows):
    files = {
        "meminfo": "MemTotal: 8 kB\nMemAvailable: 3 kB\nSwapTotal: 1 kB\nSwapFree: 1 kB",
        "memory.max": limit,
        "memory.limit_in_bytes": limit,
    }
    read, exists = Path.read_text, Path.exists
    monkeypatch.setattr(Path, "read_text", lambda path: files.get(path.name) or read(path))
    monkeypatch.setattr(Path, "exists", lambda path: path.name in files or exists(path))
    assert tcl.tables.create(rows, 1, initializer=initializer).shape == (rows, 1)
    with pytest.raises(MemoryError, match=f"got {rows + 1} x 1 float32"):
        tcl.tables.create(rows + 1, 1, initializer=initializer)


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: keras.Variable(v)])
def test_a_cleared_table_is_zeros(centers, wrap):
    centers = wrap(centers)
    tcl.tables.clear(centers)
    assert centers.shape == (C, D) and not keras.ops.convert_to_numpy(centers).any()
    tcl.update_centers(tf.ones([1, D]), [3], centers)
    assert np.flatnonzero(tcl.tables.rows(tf.range(C), centers).numpy().any(axis=1)) == [3]
    with pytest.raises(TypeError, match="centers: expected a tf.Variable"):
        tcl.tables.clear(np.zeros([C, D]))


def test_random_centers():
    same = [tcl.tables.RandomNormal(2.0, seed=5)((4000, D), "float32").numpy() for _ in range(2)]
    assert np.array_equal(*same)
    assert abs(same[0].mean()) < 0.05 and abs(same[0].std() - 2) < 0.05
    # No two blocks have the same numbers.
    assert len(np.unique(same[0])) > 0.99 * same[0].size
    other = tcl.tables.RandomNormal(2.0, seed=6)((4000, D), "float32").numpy()
    assert not np.array_equal(same[0], other)
    unseeded = [tcl.tables.RandomNormal()((3, D), "float32").numpy() for _ in range(2)]
    assert not np.array_equal(*unseeded)
    seeded = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        seeded.append(tcl.tables.RandomNormal()((3, D), "float32").numpy())
    assert np.array_equal(*seeded)


def test_random_centers_in_a_layer(tmp_path):
    layer = tcl.CenterLoss(C, centers_initializer=tcl.tables.RandomNormal(0.5, seed=1))
    layer.build((None, D))
    expected = tcl.tables.RandomNormal(0.5, seed=1)((C, D), "float32")
    assert np.array_equal(layer.centers.numpy(), expected)
    again = tcl.CenterLoss.from_config(layer.get_config())
    assert again.centers_initializer.get_config() == {"stddev": 0.5, "seed": 1}


def test_rows(centers):
    assert np.array_equal(tcl.tables.rows([3, 36, 3], centers), centers.numpy()[[3, 36, 3]])
    assert tcl.tables.rows(tf.zeros([2, 4], tf.int64), centers).shape == (2, 4, D)
    with pytest.raises(TypeError, match="labels: expected dtype int32 or int64, got float32"):
        tcl.tables.rows([1.0], centers)
    with pytest.raises(tf.errors.InvalidArgumentError, match="37"):
        tcl.tables.rows([37], centers)
    with pytest.raises(TypeError, match="centers: expected a tf.Variable"):
        tcl.tables.rows([1], centers.numpy())


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: keras.Variable(v)])
def test_save_and_load(centers, wrap, tmp_path):
    path, numbers = tmp_path / "centers.npy", centers.numpy()
    tcl.tables.save(wrap(centers), path)
    assert np.array_equal(np.load(path), numbers)
    assert os.listdir(tmp_path) == ["centers.npy"]
    loaded = wrap(tf.Variable(tf.zeros([C, D]), trainable=False))
    tcl.tables.load(loaded, path)
    assert np.array_equal(loaded.numpy(), numbers)


def test_a_write_that_fails_leaves_the_old_file(centers, tmp_path, monkeypatch):
    path = tmp_path / "centers.npy"
    tcl.tables.save(centers, path)
    before = path.read_bytes()
    centers.assign_add(tf.ones([C, D]))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tcl.tables.save(centers, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["centers.npy"]


BAD_HEADERS = {
    "parentheses": "((((((((",
    "many parentheses": "(" * 9000,
    "a bool as size": "{'descr': '<f4', 'fortran_order': False, 'shape': (37, True), }",
    "one row": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 5), }",
    "a text as size": "{'descr': '<f4', 'fortran_order': False, 'shape': ('37', 5), }",
    "no shape": "{'descr': '<f4', 'fortran_order': False, 'shape': 37, }",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-37, -5), }",
    "huge": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30}, {10**30}), }}",
    "no dtype": "{'descr': 'what', 'fortran_order': False, 'shape': (37, 5), }",
    "a list as dtype": "{'descr': [('', 5)], 'fortran_order': False, 'shape': (37, 5), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (37, 5), }",
    "no order": "{'descr': '<f4', 'fortran_order': 3, 'shape': (37, 5), }",
    "a list": "[1, 2]",
    "nothing": "",
    "bytes": "\x00\xff",
    "a call": "exit()",
    "half": "{'descr': '<f4', 'fortran_order'",
    "unhashable": "{[]: 1}",
}


def npy(header, numbers, version=1):
    text = header.encode("latin1") + b"\n"
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + numbers.tobytes()


@pytest.mark.parametrize("what", BAD_HEADERS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", [(C, D), (C, 1), (1, D)])
def test_a_malformed_header_is_a_value_error(what, version, shape, tmp_path):
    centers = tf.Variable(tf.zeros(shape))
    path = tmp_path / "centers.npy"
    path.write_bytes(npy(BAD_HEADERS[what], np.ones([C, D], "f"), version))
    with pytest.raises(ValueError, match=r"path: expected .*centers\.npy'"):
        tcl.tables.load(centers, path)
    assert not centers.numpy().any()


@pytest.mark.parametrize("head", [b"\x93NUMPY\x02\x00\xff\xff\xff\xff", b"\x93NUMPY\x09\x00"])
def test_a_file_of_another_version_or_length_is_a_value_error(centers, head, tmp_path):
    (tmp_path / "centers.npy").write_bytes(head + b"{}")
    with pytest.raises(ValueError, match="path: expected a complete .npy file"):
        tcl.tables.load(centers, tmp_path / "centers.npy")


@pytest.mark.parametrize("shape", [(C, 1), (1, D)])
def test_one_row_or_column_has_no_order(shape, tmp_path):
    numbers = np.asfortranarray(np.arange(max(shape), dtype="f").reshape(shape))
    header = f"{{'descr': '<f4', 'fortran_order': True, 'shape': {shape}, }}"
    (tmp_path / "centers.npy").write_bytes(npy(header, numbers))
    centers = tf.Variable(tf.zeros(shape))
    tcl.tables.load(centers, tmp_path / "centers.npy")
    assert np.array_equal(centers.numpy(), numbers)


@pytest.mark.parametrize("wrong", [np.ones([C, D], "f"), 3, None, ["a"]], ids=str)
@pytest.mark.parametrize("call", [tcl.tables.load, tcl.tables.save])
def test_something_else_than_a_path_is_refused(centers, call, wrong):
    words = rf"path: expected a path \(str, bytes or os.PathLike\), got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=words):
        call(centers, wrong)


def bad_files(path, numbers):
    np.save(path / "shape.npy", numbers[:, :4])
    np.save(path / "classes.npy", numbers[:-1])
    np.save(path / "dtype.npy", numbers.astype(np.float64))
    np.save(path / "whole.npy", numbers)
    whole = (path / "whole.npy").read_bytes()
    (path / "truncated.npy").write_bytes(whole[:-1])
    (path / "header.npy").write_bytes(whole[:20])
    (path / "empty.npy").write_bytes(b"")
    (path / "text.npy").write_text("no array at all")
    np.savez(path / "several.npy", numbers)
    os.replace(path / "several.npy.npz", path / "several.npy")


@pytest.mark.parametrize(
    "name, words",
    [
        ("shape", r"expected float32 \(37, 5\) as the centers are, got float32 \(37, 4\)"),
        ("classes", r"got float32 \(36, 5\)"),
        ("dtype", r"got float64 \(37, 5\)"),
        ("truncated", "expected a complete .npy file"),
        ("header", "expected a complete .npy file"),
        ("empty", "expected a complete .npy file"),
        ("text", "expected a complete .npy file"),
        ("several", "expected a .npy file of one array"),
    ],
)
def test_a_bad_file_changes_nothing(centers, name, words, tmp_path):
    before = centers.numpy()
    bad_files(tmp_path, before + 1)
    with pytest.raises(ValueError, match=f"path: .*{words}"):
        tcl.tables.load(centers, tmp_path / f"{name}.npy")
    assert np.array_equal(centers.numpy(), before)


def test_a_missing_file_is_named(centers, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npy"):
        tcl.tables.load(centers, tmp_path / "none.npy")


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, D)).astype(np.float32), rng.integers(0, C - 2, 200)


def test_class_means_of_a_dataset(samples, centers):
    features, labels = samples
    before = centers.numpy()
    features[7, 2], features[9, 0] = np.nan, np.inf
    labels[11] = -1
    dataset = tf.data.Dataset.from_tensor_slices((features, labels)).batch(32)
    counts = tcl.tables.from_dataset(dataset, centers, ignore_class=-1, progress=False)
    good = np.isfinite(features).all(axis=1)
    for j in range(C):
        members = features[good & (labels == j)].astype(np.float64)
        assert counts[j] == len(members)
        expected = members.mean(axis=0) if len(members) else before[j]
        np.testing.assert_allclose(centers.numpy()[j], expected, rtol=1e-5, atol=1e-6)
    assert not counts[-2:].any()


def test_class_means_of_millions():
    # A float32 sum of two million numbers 0.1 is off by a hundredth.
    centers = tf.Variable(tf.zeros([1, 2]))
    batch = (np.full([1000, 2], 0.1, np.float32), np.zeros(1000, np.uint8))
    tcl.tables.from_dataset([batch] * 2000, centers, progress=False)
    np.testing.assert_allclose(centers.numpy(), 0.1, rtol=1e-6)


def test_class_means_of_embedded_inputs(samples, centers, capsys):
    features, labels = samples
    model = keras.Sequential([keras.Input([D]), keras.layers.Dense(D)])
    batches = [(features[:100], labels[:100]), (features[100:], labels[100:])]
    tcl.tables.from_dataset(batches, centers, embed=model)
    embedded = np.asarray(model(features))
    j = labels[0]
    expected = embedded[labels == j].mean(axis=0)
    np.testing.assert_allclose(centers.numpy()[j], expected, rtol=1e-5, atol=1e-6)
    assert "2/2" in capsys.readouterr().out


def test_saving_into_no_folder_names_the_file(centers, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected .*none/centers.npy"):
        tcl.tables.save(centers, tmp_path / "none" / "centers.npy")


@pytest.mark.parametrize(
    "batch, words",
    [
        ((np.ones([2, 4]), [0, 1]), r"features: expected shape \[B, 5\], got \(2, 4\)"),
        ((np.ones([2, 5]), [0.0, 1.0]), r"labels: expected integers"),
        (
            (np.ones([2, 5]), [0, 1], [1.0, 1.0]),
            r"dataset: expected batches \(inputs, labels\), got 3",
        ),
        (np.ones([2, 5]), r"dataset: expected batches \(inputs, labels\), got ndarray"),
        ((np.ones([2, 5]), [0, C]), r"labels\[1\] = 37 is outside \[0, 37\)"),
    ],
)
def test_bad_batches_change_nothing(centers, batch, words):
    before = centers.numpy()
    good = (np.ones([2, 5]), np.array([0, 1]))
    with pytest.raises(ValueError, match=words):
        tcl.tables.from_dataset([good, batch], centers, progress=False)
    assert np.array_equal(centers.numpy(), before)


def test_no_second_copy_of_a_large_table(impl, tmp_path):
    # The table has 1 GiB, a block 64 MiB; TensorFlow needs some memory of its own.
    out = run_program("large_table_in_blocks", impl, cwd=tmp_path)
    seen = json.loads(out)
    table = 2**30
    assert table < seen["made"] < 1.6 * table
    assert seen["save"] < table / 4
    assert seen["load"] < table / 4
    assert seen["rows"] < table / 16
    assert seen["clear and read"] < table / 4
    assert seen["grow"] < 1.25 * table


@pytest.mark.native
def test_zeros_take_up_memory_only_where_they_are_written(tmp_path):
    out = run_program("large_table_of_zeros", cwd=tmp_path)
    assert int(out) < 2**26


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: keras.Variable(v)])
@pytest.mark.parametrize("initializer", ["zeros", "ones", "random_uniform", "seeded"])
@pytest.mark.parametrize("classes", [C, C + 1, 3 * C])
def test_a_table_grows(centers, wrap, initializer, classes):
    before, numbers = centers.numpy(), tcl.tables.RandomNormal(seed=3)
    if initializer == "seeded":
        initializer = numbers
    larger = tcl.tables.grow(wrap(centers), np.int64(classes), initializer=initializer)
    assert larger.shape == (classes, D) and not larger.trainable
    old, new = np.split(larger.numpy(), [C])
    assert np.array_equal(old, before) and np.array_equal(centers.numpy(), before)
    if initializer is numbers:
        assert np.array_equal(new, tcl.tables.create(classes, D, initializer=numbers).numpy()[C:])
    elif initializer == "random_uniform":
        assert len(np.unique(new)) == new.size
    else:
        assert (new == (initializer == "ones")).all()
    tcl.update_centers(tf.fill([1, D], 1000.0), [classes - 1], larger)
    assert np.flatnonzero((larger.numpy() > 200).any(axis=1)).tolist() == [classes - 1]
    assert np.array_equal(centers.numpy(), before)


@pytest.mark.parametrize("dtype, trainable", [("float32", True), ("float64", False)])
def test_a_larger_table_is_of_the_same_kind(dtype, trainable):
    centers = tf.Variable(tf.zeros([2, 3], dtype), trainable=trainable)
    larger = tcl.tables.grow(centers, 4, name="larger")
    assert larger.dtype == centers.dtype and larger.trainable is trainable
    assert larger.name == "larger:0"


@pytest.mark.parametrize(
    "error, wrong",
    [
        (ValueError, dict(num_classes=C - 1)),
        (TypeError, dict(num_classes=float(C + 1))),
        (TypeError, dict(centers=np.zeros([C, D], "f"))),
        (ValueError, dict(centers=tf.Variable([1.0]))),
        (MemoryError, dict(num_classes=10**13)),
        (ValueError, dict(initializer="none of Keras's")),
    ],
    ids=["fewer", "a float", "no variable", "a vector", "no memory", "initializer"],
)
def test_a_table_that_cannot_grow_says_why(centers, error, wrong):
    words = "centers" if error is MemoryError else next(iter(wrong))
    with pytest.raises(error, match=f"(?s){words}.*"):
        tcl.tables.grow(**dict(centers=centers, num_classes=C + 1) | wrong)


def test_sharded_centers_grow_by_a_file(tmp_path):
    smaller, normal = tcl.distribute.ShardedCenters(C, D), tcl.tables.RandomNormal(seed=1)
    with pytest.raises(TypeError, match=r"got ShardedCenters: .* load\(folder, grow=True\)"):
        tcl.tables.grow(smaller, C + 2)
    smaller.shards[0][1].assign(tf.fill([C, D], 3.0))
    smaller.save(os.fsencode(tmp_path))
    larger = tcl.distribute.ShardedCenters(C + 2, D, initializer=normal)
    before = larger.shards[0][1].numpy()
    with pytest.raises(ValueError, match=r"folder: expected a table float32 \(39, 5\), got"):
        larger.load(tmp_path)
    assert np.array_equal(larger.shards[0][1].numpy(), before)
    larger.load(tmp_path, grow=True)
    table = larger.shards[0][1].numpy()
    assert (table[:C] == 3).all() and np.array_equal(table[C:], before[C:])
    for sizes in ((C - 1, D), (C, D + 1)):
        with pytest.raises(ValueError, match="folder: .*or one of fewer rows, got float32"):
            tcl.distribute.ShardedCenters(*sizes).load(tmp_path, grow=True)
    with pytest.raises(TypeError, match="grow: expected True or False, got 1"):
        larger.load(tmp_path, grow=1)


WRONG_SAVES = {
    "null": None,
    "a list": [],
    "a number": 3,
    "an empty object": {},
    "serial": dict(serial="1"),
    "negative serial": dict(serial=-1),
    "parts": dict(parts=1.0),
    "no parts": dict(parts=0),
    "a bool": dict(parts=True),
    "shape": dict(shape=C),
    "one size": dict(shape=[C]),
    "a text as size": dict(shape=[C, "5"]),
    "dtype": dict(dtype=None),
}


@pytest.mark.parametrize("what", [*WRONG_SAVES, "cut off", "nested", "bytes"])
def test_a_save_of_another_structure_is_an_error(what, tmp_path):
    sharded = tcl.distribute.ShardedCenters(C, D)
    sharded.save(tmp_path)
    path = tmp_path / "sharded_centers.json"
    state, texts = json.loads(path.read_text()), dict(cut=b'{"serial"', nested=b"[" * 100_000)
    wrong = WRONG_SAVES.get(what)
    if what in WRONG_SAVES:
        content = json.dumps(state | wrong if isinstance(wrong, dict) and wrong else wrong).encode()
    else:
        content = texts.get(what.split()[0], b"\xff")
    path.write_bytes(content)
    for call in (sharded.load, sharded.save):
        with pytest.raises(ValueError, match="folder: expected what ShardedCenters.save writes"):
            call(tmp_path)
    assert path.read_bytes() == content


def test_a_save_removes_only_its_own_files_and_reaches_the_disk(tmp_path, monkeypatch):
    sharded, synced = tcl.distribute.ShardedCenters(C, D), []
    sharded.save(tmp_path)
    (tmp_path / "centers-best.npy").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        sync = os.fsync
        patch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
        sharded.save(tmp_path)
    assert len(os.listdir(tmp_path)) == 3 and (tmp_path / "centers-best.npy").exists()
    # The folder last: the new name of the state is in it.
    assert synced[-2:] == [
        (tmp_path / "sharded_centers.json").stat().st_ino,
        tmp_path.stat().st_ino,
    ]


def test_a_damaged_part_is_named(tmp_path):
    sharded = tcl.distribute.ShardedCenters(C, D)
    sharded.save(tmp_path)
    (part,) = tmp_path.glob("*.npy")
    part.write_bytes(npy("((((", np.ones([C, D], "f")))
    with pytest.raises(ValueError, match=f"folder: expected a complete .npy file .*{part.name}"):
        sharded.load(tmp_path)
