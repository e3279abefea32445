"""Tables of centers too large to be held twice: made, filled, saved and loaded by blocks."""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from tf_center_loss_op import _arguments, _native

# What is held beside the table while it is filled, saved or loaded.
BLOCK_BYTES = 2**26


def create_centers(
    num_classes: int,
    dim: int,
    *,
    initializer: str | keras.initializers.Initializer = "zeros",
    dtype: str = "float32",
    name: str = "centers",
) -> tf.Variable:
    """A table of centers, made in place: at no time is there a second copy of it.

    Equals:

        tf.Variable(initializer([num_classes, dim], dtype), trainable=False, name=name)

    but tables of zeros and of `RandomCenters` lie on large memory pages, where the system has
    them, from the start, which makes their steps faster; and zeros take up memory only row by row,
    as classes are seen. Other Keras initializers make what they make.

    Args:
      num_classes: C >= 1.
      dim: D >= 1.
      initializer: a Keras initializer or its name.
      dtype: ``"float32"`` or ``"float64"``.
      name: of the variable.

    Returns:
      A ``tf.Variable`` ``[C, D]`` that no optimizer touches.

    Raises:
      ValueError: a size, the type or the initializer is not one of these.
      MemoryError: the system does not have the memory for the table. Of zeros, which may take up
        less than their size, it is asked for what it has in all, else for what is available now.

    >>> import tf_center_loss_op as tcl
    >>> tcl.tables.create(1000, 64).shape
    TensorShape([1000, 64])
    """
    for what, value in (("num_classes", num_classes), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what}: expected an int >= 1, got {value!r}")
    _arguments.one_of("dtype", dtype, ("float32", "float64"))
    make = in_place(keras.initializers.get(initializer))
    return tf.Variable(lambda: make((num_classes, dim), dtype), trainable=False, name=name)


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class RandomCenters(keras.initializers.Initializer):
    """Normal random numbers, made block by block in the table's own memory.

    `keras.initializers.RandomNormal` of a table needs two or three times the table while it runs.

    Args:
      stddev: their standard deviation, >= 0.
      seed: an int, for the same numbers again; None for others each time, which begin anew with
        `keras.utils.set_random_seed`.

    >>> import tf_center_loss_op as tcl
    >>> layer = tcl.CenterLoss(1000, centers_initializer=tcl.tables.RandomNormal(0.1, seed=0))
    """

    def __init__(self, stddev: float = 1.0, seed: int | None = None):
        self.stddev = _arguments.number("stddev", stddev)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected an int or None, got {seed!r}")
        self.seed = seed

    def __call__(self, shape, dtype=None):
        """The table."""
        dtype = tf.as_dtype(dtype or keras.config.floatx())
        return _filled(tuple(shape), dtype, self.blocks(shape, dtype))

    def blocks(self, shape, dtype) -> Callable:
        """What gives the rows [begin, end) of a table of this shape, for each of its blocks."""
        # Drawn from where Keras draws the seeds of its own.
        seed = random.getrandbits(31) if self.seed is None else self.seed

        def block(begin, end):
            numbers = [end - begin, *shape[1:]]
            return self.stddev * tf.random.stateless_normal(numbers, [seed, begin], dtype=dtype)

        return block

    def get_config(self):
        """The constructor's arguments."""
        return {"stddev": self.stddev, "seed": self.seed}


def in_place(initializer: keras.initializers.Initializer) -> Callable:
    """The initializer, or for zeros one that makes them as `create_centers` says."""
    if isinstance(initializer, keras.initializers.Zeros):
        return lambda shape, dtype=None: _zeros(tuple(shape), tf.as_dtype(dtype))
    return initializer


def clear_centers(centers: tf.Variable | keras.Variable) -> None:
    """Sets all centers to zero, in no memory: gives that of the table back.

    Equals ``centers.assign(tf.zeros_like(centers))``, which would make two tables of it.

    Call it before a ``tf.train.Checkpoint`` is read into a large table that has been trained.
    TensorFlow reads the whole tensor before it lets go of the old one, and may then make a copy.
    If that read fails the centers are zeros.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.

    Raises:
      TypeError: centers is no such variable.

    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(1000, 64, initializer="ones")
    >>> tcl.tables.clear(centers)
    >>> float(tcl.tables.rows([7], centers)[0, 0])
    0.0
    """
    table = _table(centers)
    # What is assigned is then the variable's buffer, and what is read next, too: no copies.
    for copy in getattr(table, "values", [table]):
        tf.raw_ops.DisableCopyOnRead(resource=copy.handle)
        copy.assign(_zeros(tuple(table.shape), table.dtype))


def centers_of(
    labels: tf.types.experimental.TensorLike, centers: tf.Variable | keras.Variable
) -> tf.Tensor:
    """The rows of these classes, without a copy of the table.

    Equals ``centers.numpy()[labels]``, which would copy all of it.

    Args:
      labels: int32 or int64 class ids of any shape ``[...]``, each in ``[0, C)``.
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.

    Returns:
      ``[..., D]`` in the centers' type.

    Raises:
      TypeError: labels or centers are not of these types.
      tf.errors.InvalidArgumentError: a label is out of range.
    """
    labels = tf.convert_to_tensor(labels)
    if labels.dtype not in (tf.int32, tf.int64):
        raise TypeError(f"labels: expected dtype int32 or int64, got {labels.dtype.name}")
    return tf.gather(_table(centers), labels)


def save_centers(centers: tf.Variable | keras.Variable, path: str | os.PathLike) -> None:
    """Writes the table to a NumPy file (``.npy``), block by block.

    The file appears under its name only when it is complete and on the disk: a process killed
    meanwhile leaves the old file, if there was one. `numpy.load(path, mmap_mode="r")` reads it.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: of the file; the folder must exist.

    Raises:
      TypeError: centers is no such variable.
      OSError: the file cannot be written.
    """
    table, path = _table(centers), Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {str(path)!r}")
    descriptor, scratch = tempfile.mkstemp(".tmp", path.name, path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            dtype = np.dtype(table.dtype.as_numpy_dtype)
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": tuple(table.shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for begin, end in _blocks(table.shape, dtype.itemsize):
                file.write(memoryview(tf.gather(table, tf.range(begin, end)).numpy()).cast("B"))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner only.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_centers(centers: tf.Variable | keras.Variable, path: str | os.PathLike) -> None:
    """Reads a file of `save_centers` into the table, in place and block by block.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.
      path: of a ``.npy`` file that holds an array of this shape and type.

    Raises:
      TypeError: centers is no such variable.
      FileNotFoundError: there is no such file.
      ValueError: the file is no ``.npy`` file, is cut off, or holds an array of another shape,
        another number of classes or another type. The table is unchanged.
    """
    table = _table(centers)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"path: expected a complete .npy file of numbers, got {os.fspath(path)!r}: {error}"
        ) from error
    if not isinstance(rows, np.ndarray):
        raise ValueError(f"path: expected a .npy file of one array, got {os.fspath(path)!r}")
    expected = f"{table.dtype.name} {tuple(table.shape)} as the centers are"
    if rows.shape != tuple(table.shape) or rows.dtype != table.dtype.as_numpy_dtype:
        raise ValueError(
            f"path: expected {expected}, got {rows.dtype} {rows.shape} in {os.fspath(path)!r}"
        )
    if not rows.flags.c_contiguous:
        raise ValueError(
            f"path: expected an array in C order, got {os.fspath(path)!r} in Fortran's"
        )
    # Read, not mapped: pages of a mapped file count as the process's memory.
    with open(path, "rb") as file:
        file.seek(rows.offset)
        for begin, end in _blocks(rows.shape, rows.itemsize):
            block = np.fromfile(file, rows.dtype, (end - begin) * rows.shape[1])
            _write(table, begin, end, block.reshape(end - begin, rows.shape[1]))


def h5_group(store: object) -> h5py.Group | None:
    """The group that a store of Keras's `save_weights` and `model.save` writes to or reads from.

    None for the others: NumPy's files, and weights in several files, where Keras decides which
    variable goes where.
    """
    group = getattr(store, "_h5_entry_group", None)
    # Empty groups that Keras has not made yet are dictionaries.
    one_file = isinstance(group, h5py.Group) and not hasattr(store, "sharding_config")
    return group if one_file else None


def write_h5(group: h5py.Group, key: str, centers: tf.Variable | keras.Variable) -> None:
    """Equals ``group[key] = centers.numpy()``, block by block."""
    table = _table(centers)
    dtype = table.dtype.as_numpy_dtype
    rows = group.create_dataset(key, shape=tuple(table.shape), dtype=dtype)
    for begin, end in _blocks(table.shape, table.dtype.size):
        rows[begin:end] = tf.gather(table, tf.range(begin, end)).numpy()


def read_h5(group: h5py.Group, key: str, centers: tf.Variable | keras.Variable) -> None:
    """Equals ``centers.assign(group[key])``, block by block, after all checks."""
    table, rows = _table(centers), group[key]
    name = f"{group.file.filename!r}, {group.name}/{key}"
    linked = not isinstance(group.get(key, getlink=True), h5py.HardLink)
    if linked or not isinstance(rows, h5py.Dataset) or rows.external or rows.is_virtual:
        raise ValueError(
            f"centers: expected an array in the file itself, got a group or a link in {name}"
        )
    if rows.id.get_storage_size() == 0:
        raise ValueError(
            f"centers: expected an array in the file, got a file that is cut off: {name}"
        )
    if rows.shape != tuple(table.shape) or rows.dtype != table.dtype.as_numpy_dtype:
        raise ValueError(
            f"centers: expected {table.dtype.name} {tuple(table.shape)} in the file, as the "
            f"layer's are, got {rows.dtype} {rows.shape} in {name}"
        )
    for begin, end in _blocks(table.shape, table.dtype.size):
        _write(table, begin, end, rows[begin:end])


def centers_from_dataset(
    dataset: Iterable,
    centers: tf.Variable | keras.Variable,
    *,
    embed: Callable | None = None,
    ignore_class: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Sets the centers to the means of their classes, in one pass over a dataset.

        c_j = mean of the x_i with y_i = j

    Kept in a second table, of which only the rows of classes that occur take up memory, and
    written when the pass is complete: an error on the way changes nothing.

    Args:
      dataset: an iterable of batches ``(inputs, labels)``, such as a ``tf.data.Dataset``.
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``, written in place.
      embed: a function or model from inputs to features ``[B, D]``; None where the inputs are the
        features.
      ignore_class: samples with this label are left out.
      progress: whether to draw a progress bar.

    Returns:
      int64 ``[C]``: how many samples of each class were counted. Classes without one keep their
      centers, and samples with a NaN or an infinity among their features are left out.

    Raises:
      TypeError, ValueError: an array is of the wrong type or shape, or a label is out of range.
    """
    table = _table(centers)
    classes, dim = table.shape
    counts = np.zeros(classes, np.int64)
    means = create_centers(classes, dim, dtype=table.dtype.name, name="means")
    total = tf.data.experimental.cardinality(dataset) if hasattr(dataset, "element_spec") else -1
    bar = keras.utils.Progbar(int(total) if total > 0 else None) if progress else None
    done = 0
    for done, batch in enumerate(dataset, 1):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = (
                f"{len(batch)} of them"
                if isinstance(batch, (tuple, list))
                else type(batch).__name__
            )
            raise ValueError(f"dataset: expected batches (inputs, labels), got {got}")
        inputs, labels = batch
        features = np.asarray(inputs if embed is None else embed(inputs))
        labels = np.asarray(labels)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features: expected shape [B, {dim}], got {features.shape}")
        if labels.dtype.kind not in "iu" or labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels: expected integers of shape {features.shape[:1]}, "
                f"got {labels.dtype} {labels.shape}"
            )
        kept = np.isfinite(features).all(axis=1)
        if ignore_class is not None:
            kept &= labels != ignore_class
        bad = np.flatnonzero(kept & ((labels < 0) | (labels >= classes)))
        if len(bad):
            raise ValueError(f"labels[{bad[0]}] = {labels[bad[0]]} is outside [0, {classes})")
        present, place, now = np.unique(
            labels[kept].astype(np.int64), return_inverse=True, return_counts=True
        )
        counts[present] += now
        # Means that move on, not sums: in float32 a sum of millions takes up nothing small.
        sums = np.zeros([len(present), dim])
        np.add.at(sums, place, features[kept].astype(np.float64))
        before = tf.gather(means, present).numpy().astype(np.float64)
        after = before + (sums - now[:, np.newaxis] * before) / counts[present, np.newaxis]
        means.scatter_update(tf.IndexedSlices(tf.cast(after, table.dtype), present))
        if bar:
            bar.update(done, finalize=False)
    if bar:
        bar.target = done
        bar.update(done, finalize=True)
    seen = np.flatnonzero(counts)
    rows = max(1, BLOCK_BYTES // (dim * table.dtype.size))
    for begin in range(0, len(seen), rows):
        block = seen[begin : begin + rows]
        table.scatter_update(tf.IndexedSlices(tf.gather(means, block), block))
    return counts


def _table(centers):
    """The resource variable [C, D] behind `centers`."""
    variable = _arguments.unwrap(centers)
    if not (isinstance(variable, tf.Variable) and hasattr(variable, "handle")):
        raise TypeError(
            "centers: expected a tf.Variable (a resource variable) or a keras.Variable around "
            f"one, got {type(centers).__name__}"
        )
    if variable.shape.rank != 2:
        raise ValueError(f"centers: expected shape [C, D], got {variable.shape}")
    return variable


def _blocks(shape, itemsize):
    rows = max(1, BLOCK_BYTES // (int(shape[1]) * itemsize))
    return [(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]


def _write(table, begin, end, rows):
    table.scatter_update(tf.IndexedSlices(rows, tf.range(begin, end)))


def _zeros(shape, dtype):
    # The op's memory is the CPU's.
    if tf.config.list_physical_devices("GPU"):
        return tf.zeros(shape, dtype)
    lazy = _native.usable()
    _check_memory(shape, dtype, ("MemTotal", "SwapTotal") if lazy else _AVAILABLE)
    return _native.ops().tcl_zeros(shape=shape, dtype=dtype) if lazy else tf.zeros(shape, dtype)


_AVAILABLE = ("MemAvailable", "SwapFree")
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def _check_memory(shape, dtype, fields):
    """Raises where a table has no room in what /proc/meminfo says of these fields.

    The system gives memory away that it does not have, and ends the process when it is touched:
    with zeros that would be after hours of training.
    """
    room = _room(fields)
    needed = math.prod(shape) * dtype.size
    if needed > room:
        raise MemoryError(
            f"centers: expected a table that fits into {room / 1e9:.1f} GB of memory "
            f"({' and '.join(fields)}), got {shape[0]} x {shape[1]} {dtype.name}, "
            f"{needed / 1e9:.1f} GB"
        )


def _room(fields):
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    sizes = dict(line.split(":") for line in lines)
    room = sum(1024 * int(sizes[field].split()[0]) for field in fields)
    for path in map(Path, _CGROUP_LIMITS):
        limit = path.read_text().strip() if path.exists() else "max"
        room = min(room, math.inf if limit == "max" else int(limit))
    return room


def _filled(shape, dtype, block):
    """A tensor whose rows [begin, end) are block(begin, end)."""
    if not tf.config.list_physical_devices("GPU"):
        _check_memory(shape, dtype, _AVAILABLE)
    # In the scope of a strategy tf.Variable would make a table for each replica.
    table = ResourceVariable(lambda: _zeros(shape, dtype), trainable=False)
    for begin, end in _blocks(shape, dtype.size):
        _write(table, begin, end, block(begin, end))
    # What is read is the buffer itself then, not a copy.
    tf.raw_ops.DisableCopyOnRead(resource=table.handle)
    return table.read_value()
