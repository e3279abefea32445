"""Pictures of embeddings and their centers: a figure, and files for TensorBoard's projector."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import _arguments, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More colors than these nobody tells apart.
_MOST_IN_LEGEND = 20


def export_projector(
    log_dir: str | os.PathLike,
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike | None = None,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    name: str = "embeddings",
    max_samples: int = 5000,
    seed: int = 0,
) -> Path:
    """Writes features, labels and centers as files that TensorBoard's embedding projector reads.

    ``<name>.tsv`` holds a row of numbers for each point, exact to float32;
    ``<name>_metadata.tsv`` its label and whether it is a "sample" or a "center";
    ``projector_config.pbtxt`` names both, beside what it named before. Then
    ``tensorboard --logdir <log_dir>`` shows them; https://projector.tensorflow.org takes the two
    .tsv files as they are.

    Args:
      log_dir: the folder; it is made where it is missing.
      features: numbers ``[N, D]``. Rows with a NaN or an infinity are left out.
      labels: class ids or, without centers, names ``[N]``.
      centers: ``[C, D]``, a variable, tensor or NumPy array. The rows of the classes that occur
        among the written samples are written too; the table is not read as a whole.
      class_names: the name of each class id; the default is the number itself. Tabs and line
        breaks, which would tear the rows apart, become ``\\t``, ``\\n`` and ``\\r``.
      name: of the files and in the projector's menu: letters, digits, ``-`` and ``_``.
      max_samples: of more samples so many are written, drawn at random.
      seed: of that draw.

    Returns:
      The path of ``projector_config.pbtxt``.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.

    >>> import tempfile
    >>> import tf_center_loss_op as tcl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = tcl.plots.export_projector(folder, [[1.0, 2.0]], ["a name"])
    ...     file.with_name("embeddings_metadata.tsv").read_text()
    'label\\tkind\\na name\\tsample\\n'

    Source: Smilkov et al., "Embedding Projector: Interactive Visualization and Interpretation of
    Embeddings", 2016, arXiv:1611.05469.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits, '-' and '_', got {name!r}")
    points = _points(features, labels, centers, max_samples, seed)
    kinds = ["sample"] * len(points.labels) + ["center"] * len(points.classes)
    ids = [*points.labels, *points.classes]
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.tsv", "w") as file:
        for rows in (points.features, points.centers):
            np.savetxt(file, rows, fmt="%.9g", delimiter="\t")
    with open(folder / f"{name}_metadata.tsv", "w", encoding="utf-8", newline="\n") as file:
        file.write("label\tkind\n")
        for label, kind in zip(ids, kinds, strict=True):
            file.write(f"{_escaped(_name(label, class_names))}\t{kind}\n")
    config = folder / "projector_config.pbtxt"
    entry = (
        "embeddings {\n"
        f'  tensor_name: "{name}"\n'
        f'  tensor_path: "{name}.tsv"\n'
        f'  metadata_path: "{name}_metadata.tsv"\n'
        "}\n"
    )
    known = config.read_text() if config.exists() else ""
    if entry not in known:
        config.write_text(known + entry)
    return config


def draw_embeddings(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike | None = None,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    title: str | None = None,
    max_samples: int = 5000,
    seed: int = 0,
) -> Figure:
    """Draws features as points in the plane, in the color of their class, and centers as crosses.

    Features of more than two dimensions are projected on the first two principal components of
    the drawn samples, the centers with them:

        _, s, vt = numpy.linalg.svd(x - x.mean(0), full_matrices=False)
        points = (x - x.mean(0)) @ vt[:2].T

    The axes say how much of the variance these hold: classes that overlap in the picture may be
    apart in the dimensions that it leaves out. Both axes have one scale, so that distances in the
    picture are comparable.

    Args:
      features: as in `export_projector`.
      labels: as in `export_projector`.
      centers: as in `export_projector`.
      class_names: as in `export_projector`. Up to twenty classes have a legend.
      title: above the picture.
      max_samples: of more samples so many are drawn, picked at random.
      seed: of that pick.

    Returns:
      A ``matplotlib.figure.Figure``; ``figure.savefig("embeddings.png")`` keeps it.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: an argument is of the wrong type, shape or value.

    >>> import tf_center_loss_op as tcl
    >>> figure = tcl.plots.embeddings([[0.0, 1.0], [2.0, 1.0]], [0, 1], [[0.0, 0.0], [2.0, 0.0]])
    >>> figure.axes[0].get_xlabel()
    'dimension 1'

    Source: Wen et al., ECCV 2016, figure 3.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_embeddings needs matplotlib: pip install matplotlib") from error
    points = _points(features, labels, centers, max_samples, seed)
    (x, c), axis_labels = _plane(points.features, points.centers)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    classes, color = np.unique(points.labels, return_inverse=True)
    few = len(classes) <= _MOST_IN_LEGEND
    # In a long list neighbors in the order of the labels would look alike: tab20 repeats instead.
    colors = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    for i, label in enumerate(classes):
        axes.scatter(
            *x[color == i].T,
            s=9,
            alpha=0.6,
            linewidths=0,
            color=colors[i % len(colors)],
            label=_name(label, class_names) if few else None,
        )
    if len(c):
        axes.scatter(*c.T, s=70, marker="X", color="white", edgecolors="black", label="centers")
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], title=title)
    axes.set_aspect("equal", "datalim")
    axes.grid(alpha=0.3)
    if few and len(classes):
        figure.legend(loc="outside right upper", frameon=False, markerscale=1.5)
    return figure


class _Points(NamedTuple):
    features: np.ndarray  # [n, D] float32
    labels: np.ndarray  # [n] class ids or names
    centers: np.ndarray  # [m, D], of these classes
    classes: np.ndarray  # [m]


def _points(features, labels, centers, max_samples, seed):
    """The samples that are shown and the centers of their classes, checked."""
    features, labels = _array(features), _array(labels)
    max_samples = _arguments.positive("max_samples", max_samples)
    if features.ndim != 2:
        raise ValueError(f"features: expected shape [N, D], got {features.shape}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels: expected shape {features.shape[:1]}, one for each row of features "
            f"{features.shape}, got {labels.shape}"
        )
    ids = labels.dtype.kind in "iu"
    if not ids and labels.dtype.kind not in "USO":
        raise TypeError(f"labels: expected class ids or names, got {labels.dtype}")
    chosen = np.arange(len(labels))
    if len(labels) > max_samples:
        # In their order, and before the rows are read: they may be on disk.
        chosen = np.sort(np.random.default_rng(seed).choice(len(labels), max_samples, False))
    features, labels = np.asarray(features[chosen], np.float32), labels[chosen]
    finite = np.isfinite(features).all(axis=1)
    features, labels = features[finite], labels[finite]
    if centers is None:
        return _Points(features, labels, features[:0], labels[:0])
    if not ids:
        raise TypeError(
            "labels: expected class ids where centers are given (class_names turns them into "
            f"names), got {labels.dtype}"
        )
    classes = np.unique(labels)
    centers = _arguments.unwrap(centers)
    if not isinstance(centers, tf.Variable):
        centers = _array(centers)
    if len(centers.shape) != 2 or centers.shape[1] != features.shape[1]:
        raise ValueError(
            f"centers: expected shape [C, {features.shape[1]}] for features of shape "
            f"[N, {features.shape[1]}], got {tuple(centers.shape)}"
        )
    bad = classes[(classes < 0) | (classes >= centers.shape[0])]
    if len(bad):
        raise ValueError(
            f"labels: expected class ids in [0, {centers.shape[0]}), the rows of centers, "
            f"got {bad[0]}"
        )
    if isinstance(centers, tf.Variable):
        rows = tables.centers_of(classes, centers).numpy()
    else:
        rows = centers[classes]
    return _Points(features, labels, np.asarray(rows, np.float32), classes)


def _plane(x, c):
    """x and c in two dimensions, and what to call these."""
    dimensions = x.shape[1]
    if dimensions <= 2:
        pad = [(0, 0), (0, 2 - dimensions)]
        names = ["dimension 1", "dimension 2" if dimensions == 2 else ""]
        return (np.pad(x, pad), np.pad(c, pad)), names
    if not len(x):
        return (x[:, :2], c[:, :2]), ["", ""]
    mean = x.mean(0, dtype=np.float64)
    _, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    axes = np.zeros([2, dimensions])  # one sample has no second component
    axes[: len(vt[:2])] = vt[:2]
    share = np.zeros(2)
    share[: len(s[:2])] = 100 * s[:2] ** 2 / max(np.sum(s**2), np.finfo(float).tiny)
    names = [f"principal component {i + 1} ({share[i]:.0f} % of the variance)" for i in range(2)]
    return ((x - mean) @ axes.T, (c - mean) @ axes.T), names


def _array(value):
    value = _arguments.unwrap(value)
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def _name(label, class_names):
    if isinstance(label, bytes):
        return label.decode("utf-8", "replace")
    if class_names is None or isinstance(label, str):
        return str(label)
    try:
        return str(class_names[int(label)])
    except (LookupError, ValueError) as error:
        raise ValueError(f"class_names: expected a name for class {label}, got none") from error


def _escaped(text):
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
