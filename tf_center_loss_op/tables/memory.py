"""Creates, reads and clears a table of centers without a second copy of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

from tf_center_loss_op._core import arguments, native
from tf_center_loss_op._core.variables import resource_table

# Fields of /proc/meminfo: the sum of TOTAL is all memory, that of AVAILABLE the memory free now.
TOTAL = ("MemTotal", "SwapTotal")
AVAILABLE = ("MemAvailable", "SwapFree")

_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def create(
    num_classes: int,
    dim: int,
    *,
    initializer: str | keras.initializers.Initializer = "zeros",
    dtype: str = "float32",
    name: str = "centers",
) -> tf.Variable:
    """Creates a table of centers in place: at no time is there a second copy of it.

    Equals:

        tf.Variable(initializer([num_classes, dim], dtype), trainable=False, name=name)

    A table of zeros or of `RandomNormal` lies on large memory pages from the start, where the
    system has them, which makes its steps faster. Zeros take up memory page by page, as classes are
    seen. Other Keras initializers run as they are and may hold several tables while they run.

    Args:
      num_classes: C, an int >= 1 (of Python or NumPy).
      dim: D, an int >= 1.
      initializer: a Keras initializer or its name.
      dtype: ``"float32"`` or ``"float64"``.
      name: the name of the variable.

    Returns:
      A ``tf.Variable`` ``[C, D]`` that is not trainable.

    Raises:
      TypeError: a size is no int.
      ValueError: a size, the dtype or the initializer is not one of these.
      MemoryError: the memory does not hold the table, or the process may not have it. A table of
        zeros, which may stay smaller than its size, is compared with the total memory, any other
        with the memory available now.

    >>> import tf_center_loss_op as tcl
    >>> tcl.tables.create(1000, 64).shape
    TensorShape([1000, 64])
    """
    shape = arguments.positive("num_classes", num_classes), arguments.positive("dim", dim)
    arguments.one_of("dtype", dtype, ("float32", "float64"))
    make = in_place(keras.initializers.get(initializer))
    # Zeros are checked where they are made, as a layer makes them.
    lazy = isinstance(make, LazyZeros)
    if not (lazy or tf.config.list_physical_devices("GPU")):
        check_room(shape, tf.as_dtype(dtype), AVAILABLE)
    with out_of_memory(shape, tf.as_dtype(dtype)):
        return tf.Variable(lambda: make(shape, dtype), trainable=False, name=name)


def clear(centers: tf.Variable | keras.Variable) -> None:
    """Sets all centers to zero and returns the memory of the table to the system.

    Equals ``centers.assign(tf.zeros_like(centers))``, which would allocate a second table.

    Call `clear` before a ``tf.train.Checkpoint`` is read into a large table that has been trained.
    TensorFlow reads the whole tensor before it releases the old one, and may then copy it. If that
    read fails, the centers are zeros.

    Args:
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.

    Raises:
      TypeError: centers is no such variable.
      ValueError: centers is of another rank.

    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(1000, 64, initializer="ones")
    >>> tcl.tables.clear(centers)
    >>> float(tcl.tables.rows([7], centers)[0, 0])
    0.0
    """
    table = resource_table(centers)
    for copy in getattr(table, "values", [table]):
        # The assigned tensor then becomes the variable's buffer, and reads return that buffer.
        tf.raw_ops.DisableCopyOnRead(resource=copy.handle)
        copy.assign(zeros(tuple(table.shape), table.dtype))


def rows(
    labels: tf.types.experimental.TensorLike, centers: tf.Variable | keras.Variable
) -> tf.Tensor:
    """Reads the centers of the given classes without a copy of the table.

    Equals ``centers.numpy()[labels]``, which would copy the whole table.

    Args:
      labels: int32 or int64 class ids of any shape ``[...]``, each in ``[0, C)``.
      centers: a resource ``tf.Variable`` or a ``keras.Variable`` ``[C, D]``.

    Returns:
      ``[..., D]`` in the dtype of the centers.

    Raises:
      TypeError: labels or centers are not of these types.
      ValueError: centers is of another rank.
      tf.errors.InvalidArgumentError: a label is out of range.

    >>> import tf_center_loss_op as tcl
    >>> centers = tcl.tables.create(1000, 64)
    >>> tcl.tables.rows([[7, 8]], centers).shape
    TensorShape([1, 2, 64])
    """
    labels = tf.convert_to_tensor(labels)
    if labels.dtype not in (tf.int32, tf.int64):
        raise TypeError(f"labels: expected dtype int32 or int64, got {labels.dtype.name}")
    return tf.gather(resource_table(centers), labels)


class LazyZeros:
    """Stands for Keras's initializer of zeros and takes up memory only where they are written."""

    def __call__(self, shape: tuple[int, ...], dtype: str | tf.DType | None = None) -> tf.Tensor:
        """The zeros."""
        return zeros(tuple(shape), tf.as_dtype(dtype))


def in_place(initializer: keras.initializers.Initializer) -> Callable[..., tf.Tensor]:
    """The initializer itself; for Keras's zeros, one that allocates them lazily."""
    return LazyZeros() if isinstance(initializer, keras.initializers.Zeros) else initializer


def zeros(shape: tuple[int, ...], dtype: tf.DType) -> tf.Tensor:
    """Zeros that take up memory only where they are written.

    With a GPU, or without the native library, they are those of `tf.zeros`.

    Raises:
      MemoryError: the memory does not hold them.
    """
    # The native op allocates on the CPU only.
    if tf.config.list_physical_devices("GPU"):
        return tf.zeros(shape, dtype)
    lazy = native.usable()
    check_room(shape, dtype, TOTAL if lazy else AVAILABLE)
    with out_of_memory(shape, dtype):
        if not lazy:
            return tf.zeros(shape, dtype)
        return native.ops().tcl_zeros(shape=tf.constant(shape, tf.int64), dtype=dtype)


@contextlib.contextmanager
def out_of_memory(shape: tuple[int, ...], dtype: tf.DType) -> Iterator[None]:
    """Makes TensorFlow's error of an allocation a MemoryError that names the table."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(
            f"centers: expected memory for a table of {shape[0]} x {shape[1]} {dtype.name}, "
            f"{math.prod(shape) * dtype.size / 1e9:.1f} GB, which the process may not have: "
            f"{error.message}"
        ) from error


def check_room(shape: tuple[int, ...], dtype: tf.DType, fields: tuple[str, ...]) -> None:
    """Checks that the memory holds a table.

    Linux grants more memory than there is and kills the process that touches it. A table of zeros
    is touched row by row, so that could happen after hours of training.

    Args:
      shape: of the table.
      dtype: of the table.
      fields: the fields of /proc/meminfo that count, `TOTAL` or `AVAILABLE`.

    Raises:
      MemoryError: the table is larger than the sum of the fields or than the limit of the cgroup.
    """
    free = room(fields)
    needed = math.prod(shape) * dtype.size
    if needed > free:
        raise MemoryError(
            f"centers: expected a table that fits into {free / 1e9:.1f} GB of memory "
            f"({' and '.join(fields)}), got {shape[0]} x {shape[1]} {dtype.name}, "
            f"{needed / 1e9:.1f} GB"
        )


def room(fields: tuple[str, ...]) -> float:
    """The sum of fields of /proc/meminfo in bytes, at most the limit of the process's cgroup.

    Infinite where there is no /proc/meminfo.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    sizes = dict(line.split(":") for line in lines)
    total = sum(1024 * int(sizes[field].split()[0]) for field in fields)
    for path in map(Path, _CGROUP_LIMITS):
        limit = path.read_text().strip() if path.exists() else "max"
        total = min(total, math.inf if limit == "max" else int(limit))
    return total
