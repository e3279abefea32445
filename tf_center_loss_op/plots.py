"""Draws embeddings with their centers, and exports them to TensorBoard's embedding projector."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_center_loss_op import tables
from tf_center_loss_op._core import arguments
from tf_center_loss_op._core.variables import unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embeddings", "export_projector"]

# The number of colors of matplotlib's largest qualitative color map.
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

    Equals, with a file of labels and an entry in the projector's configuration:

        points = numpy.concatenate([features, centers[numpy.unique(labels)]])
        numpy.savetxt(f"{log_dir}/{name}.tsv", points, "%.9g", delimiter="\\t")

    ``<name>.tsv`` holds a row of numbers for each point, with the nine digits that identify a
    float32. ``<name>_metadata.tsv`` holds its label and whether it is a "sample" or a "center".
    ``projector_config.pbtxt`` gets an entry for both and keeps its other entries. The command
    ``tensorboard --logdir <log_dir>`` shows the points; https://projector.tensorflow.org reads the
    two .tsv files.

    Args:
      log_dir: the folder, created where it is missing.
      features: numbers ``[N, D]``. Rows with a NaN or an infinity are left out.
      labels: class ids or, without centers, names ``[N]``.
      centers: ``[C, D]``, a variable, tensor or NumPy array. Only the rows of the classes that
        occur among the written samples are read and written.
      class_names: the name of each class id; the default is the number itself. Tabs and line
        breaks, which would break the rows of the file, become ``\\t``, ``\\n`` and ``\\r``.
      name: the name of the files and in the projector's menu: letters, digits, ``-`` and ``_``.
      max_samples: the largest number of samples that are written, >= 1. Of more samples, a random
        selection is written.
      seed: the seed of that selection.

    Returns:
      The path of ``projector_config.pbtxt``.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.

    Determinism: the same arguments give the same files.

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


def embeddings(
    features: tf.types.experimental.TensorLike,
    labels: tf.types.experimental.TensorLike,
    centers: tf.Variable | keras.Variable | tf.types.experimental.TensorLike | None = None,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    title: str | None = None,
    max_samples: int = 5000,
    seed: int = 0,
) -> Figure:
    """Draws features as points in the color of their class, and centers as crosses.

    Equals, where D = 2, the drawing of the features x themselves. Features of more dimensions, and
    the centers with them, are projected on the first two principal components of the drawn samples:

        _, s, vt = numpy.linalg.svd(x - x.mean(0), full_matrices=False)
        points = (x - x.mean(0)) @ vt[:2].T

    The labels of the axes show which share of the variance these components hold. Classes that
    overlap in the figure may be separate in the other dimensions. Both axes have the same scale, so
    that distances in the figure are comparable.

    Args:
      features: as in `export_projector`.
      labels: as in `export_projector`.
      centers: as in `export_projector`.
      class_names: as in `export_projector`. The figure has a legend for up to twenty classes.
      title: the title of the figure.
      max_samples: the largest number of samples that are drawn, >= 1. Of more samples, a random
        selection is drawn.
      seed: the seed of that selection.

    Returns:
      A ``matplotlib.figure.Figure``; ``figure.savefig("embeddings.png")`` saves it.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: an argument is of the wrong type, shape or value.

    Determinism: the same arguments select and place the same points.

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
        raise ImportError("plots.embeddings needs matplotlib: pip install matplotlib") from error
    points = _points(features, labels, centers, max_samples, seed)
    (x, c), axis_labels = _plane(points.features, points.centers)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    classes, color = np.unique(points.labels, return_inverse=True)
    few = len(classes) <= _MOST_IN_LEGEND
    # More than twenty classes repeat the colors of tab20: a continuous color map would give
    # neighbors in the order of the labels colors that look alike.
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
    """The samples that are shown, and the centers of their classes."""

    features: np.ndarray  # [n, D] float32
    labels: np.ndarray  # [n] class ids or names
    centers: np.ndarray  # [m, D] float32
    classes: np.ndarray  # [m] the class ids of the centers


def _points(features: Any, labels: Any, centers: Any, max_samples: int, seed: int) -> _Points:
    """Checks the arguments and selects the samples.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, shape or value.
    """
    features, labels = _array(features), _array(labels)
    max_samples = arguments.positive("max_samples", max_samples)
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
        # Sorted, so that the samples keep their order. Selected before the rows are read, because
        # a memory-mapped array is on disk.
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
    centers = unwrap(centers)
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
        rows = tables.rows(classes, centers).numpy()
    else:
        rows = centers[classes]
    return _Points(features, labels, np.asarray(rows, np.float32), classes)


def _plane(x: np.ndarray, c: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
    """Projects samples x [n, D] and centers c [m, D] on two dimensions; also names the axes."""
    dimensions = x.shape[1]
    if dimensions <= 2:
        pad = [(0, 0), (0, 2 - dimensions)]
        names = ["dimension 1", "dimension 2" if dimensions == 2 else ""]
        return (np.pad(x, pad), np.pad(c, pad)), names
    if not len(x):
        return (x[:, :2], c[:, :2]), ["", ""]
    mean = x.mean(0, dtype=np.float64)
    _, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    axes = np.zeros([2, dimensions])  # zeros remain where one sample has no second component
    axes[: len(vt[:2])] = vt[:2]
    share = np.zeros(2)
    share[: len(s[:2])] = 100 * s[:2] ** 2 / max(np.sum(s**2), np.finfo(float).tiny)
    names = [f"principal component {i + 1} ({share[i]:.0f} % of the variance)" for i in range(2)]
    return ((x - mean) @ axes.T, (c - mean) @ axes.T), names


def _array(value: Any) -> np.ndarray:
    value = unwrap(value)
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def _name(label: Any, class_names: Sequence[str] | Mapping[int, str] | None) -> str:
    if isinstance(label, bytes):
        return label.decode("utf-8", "replace")
    if class_names is None or isinstance(label, str):
        return str(label)
    try:
        return str(class_names[int(label)])
    except (LookupError, ValueError) as error:
        raise ValueError(f"class_names: expected a name for class {label}, got none") from error


def _escaped(text: str) -> str:
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
