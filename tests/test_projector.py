"""The files for TensorBoard's projector: exact numbers, untorn rows, a bounded size."""

import re

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from messages import about

N, D, C = 30, 4, 6


@pytest.fixture
def data():
    """Features, labels of which the last class is missing, centers."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(N, D)).astype("f") * np.float32([1e-30, 1, 1e9, 1 / 3]),
        np.arange(N) % (C - 1),
        rng.normal(size=(C, D)).astype("f"),
    )


def read(folder, name="embeddings"):
    """Points and rows of the metadata."""
    points = np.loadtxt(folder / f"{name}.tsv", np.float32, delimiter="\t", ndmin=2)
    header, *rows = (folder / f"{name}_metadata.tsv").read_text().removesuffix("\n").split("\n")
    assert header == "label\tkind"
    rows = [tuple(row.split("\t")) for row in rows]
    assert len(rows) == len(points) and all(len(row) == 2 for row in rows)
    return points, rows


def entries(config):
    """The entries of the configuration file: {tensor: (its file, the file of the labels)}."""
    blocks = config.read_text().split("embeddings {\n")[1:]
    fields = [dict(re.findall(r'^  (\w+): "(.*)"$', block, re.MULTILINE)) for block in blocks]
    return {f["tensor_name"]: (f.get("tensor_path"), f.get("metadata_path")) for f in fields}


@pytest.mark.parametrize("source", [np.asarray, tf.constant, tf.Variable])
def test_numbers_and_labels(tmp_path, data, source):
    features, labels, centers = data
    config = tcl.plots.export_projector(
        tmp_path / "new" / "folder", source(features), source(labels), source(centers)
    )
    assert config == tmp_path / "new" / "folder" / "projector_config.pbtxt"
    points, rows = read(config.parent)
    assert np.array_equal(points, np.concatenate([features, centers[: C - 1]]))
    assert rows[:N] == [(str(label), "sample") for label in labels]
    assert rows[N:] == [(str(label), "center") for label in range(C - 1)]
    assert entries(config) == {"embeddings": ("embeddings.tsv", "embeddings_metadata.tsv")}


@pytest.mark.parametrize("kind", [list, dict])
def test_names(tmp_path, data, kind):
    names = ["plain", "tab\there", "two\nlines", "return\r", "Ünïcode 数", "unused"]
    given = names if kind is list else dict(enumerate(names[: C - 1]))
    tcl.plots.export_projector(tmp_path, *data, class_names=given)
    shown = ["plain", "tab\\there", "two\\nlines", "return\\r", "Ünïcode 数"]
    rows = read(tmp_path)[1]
    assert [row[0] for row in rows[:N]] == [shown[label] for label in data[1]]
    assert [row[0] for row in rows[N:]] == shown


@pytest.mark.parametrize("source", [list, np.asarray, tf.constant])
def test_labels_that_are_names(tmp_path, source):
    tcl.plots.export_projector(tmp_path, np.eye(3), source(["a", "b\tc", "ä"]))
    assert read(tmp_path)[1] == [("a", "sample"), ("b\\tc", "sample"), ("ä", "sample")]


def test_at_most_max_samples_are_written(tmp_path, data):
    features, labels, centers = data
    tcl.plots.export_projector(tmp_path, *data, max_samples=7)
    points, rows = read(tmp_path)
    kinds = [row[1] for row in rows]
    assert kinds.count("sample") == 7
    places = [int(np.flatnonzero((features == point).all(1))[0]) for point in points[:7]]
    assert places == sorted(set(places))
    assert [row[0] for row in rows[:7]] == [str(label) for label in labels[places]]
    classes = np.unique(labels[places])
    assert [row[0] for row in rows[7:]] == [str(label) for label in classes]
    assert np.array_equal(points[7:], centers[classes])
    again, other = tmp_path / "again", tmp_path / "other"
    tcl.plots.export_projector(again, *data, max_samples=7)
    tcl.plots.export_projector(other, *data, max_samples=7, seed=1)
    assert np.array_equal(read(again)[0], points)
    assert not np.array_equal(read(other)[0][:7], points[:7])


def test_a_huge_table_costs_nothing(tmp_path):
    # A sparse table of 1 TB; only the rows of two classes are read.
    centers = np.broadcast_to(np.ones(256, "f"), [10**9, 256])
    tcl.plots.export_projector(tmp_path, np.ones([2, 256]), [5, 10**9 - 1], centers)
    assert len(read(tmp_path)[0]) == 4


def test_not_finite(tmp_path, data):
    features, labels, _ = data
    features[3, 0], features[4] = np.nan, np.inf
    tcl.plots.export_projector(tmp_path, features, labels)
    points, rows = read(tmp_path)
    assert len(rows) == N - 2 and np.isfinite(points).all()


def test_several_exports_share_a_folder(tmp_path, data):
    config = tmp_path / "projector_config.pbtxt"
    config.write_text('embeddings {\n  tensor_name: "mine"\n}\n')
    for name in ("train", "test", "train"):
        tcl.plots.export_projector(tmp_path, *data, name=name)
    assert list(entries(config)) == ["mine", "train", "test"]
    assert entries(config)["test"] == ("test.tsv", "test_metadata.tsv")


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(name="a/b"), ValueError, ["name", "letters", "a/b"]),
        (dict(name=""), ValueError, ["name", "letters", "''"]),
        (dict(max_samples=0), ValueError, ["max_samples", ">= 1", "0"]),
        (dict(features=np.zeros(N)), ValueError, ["features", "[N, D]", "(30,)"]),
        (dict(labels=np.zeros(N - 1, int)), ValueError, ["labels", "(30,)", "(29,)"]),
        (dict(labels=np.zeros(N)), TypeError, ["labels", "class ids or names", "float64"]),
        (dict(labels=["a"] * N), TypeError, ["labels", "class_names", "<U1"]),
        (dict(labels=np.full(N, C)), ValueError, ["labels", "[0, 6)", "6"]),
        (dict(labels=np.full(N, -1)), ValueError, ["labels", "[0, 6)", "-1"]),
        (dict(centers=np.zeros([C, D + 1])), ValueError, ["centers", "[C, 4]", "(6, 5)"]),
        (dict(class_names=["a"]), ValueError, ["class_names", "class 1"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, data, wrong, error, words):
    arguments = dict(zip(["features", "labels", "centers"], data, strict=True)) | wrong
    with pytest.raises(error, match=about(*words)):
        tcl.plots.export_projector(tmp_path, **arguments)
    assert not (tmp_path / "projector_config.pbtxt").exists()
