"""Checks features and centers, and reads rows of the centers without a copy of the whole."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core.variables import StatelessCenters, TableLike, unwrap
from tf_center_loss_op._core.xla import in_xla
from tf_center_loss_op.distribute.sharded import ShardedCenters

# The label of "no class".
NO_LABEL = -1

_FLOATS = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


class VariableByHandle(TableLike):
    """A tf.Variable whose handle is an argument of a traced function: one trace serves them all."""

    shape = tf.TensorShape([None, None])

    def __init__(self, handle: tf.Tensor, dtype: tf.DType):
        self.handle, self.dtype = handle, dtype

    def sparse_read(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """Called by `tf.gather`."""
        rows = tf.raw_ops.ResourceGather(
            resource=self.handle, indices=indices, dtype=self.dtype, name=name
        )
        return tf.ensure_shape(rows, self.shape)


class ArrayByKey(TableLike):
    """A NumPy array whose key is an argument of a traced function: one trace serves them all."""

    shape = tf.TensorShape([None, None])
    _arrays: dict[int, np.ndarray] = {}  # those of the calls that are running
    _keys = itertools.count()

    def __init__(self, key: tf.Tensor, dtype: tf.DType):
        self.key, self.dtype = key, dtype

    @classmethod
    @contextlib.contextmanager
    def keyed(cls, array: np.ndarray) -> Iterator[int]:
        """A key by which the array can be read until the context ends."""
        key = next(cls._keys)
        cls._arrays[key] = array
        try:
            yield key
        finally:
            del cls._arrays[key]

    @classmethod
    def find(cls, key: np.ndarray) -> np.ndarray:
        """The array of this key."""
        return cls._arrays[int(key)]


# What stands for a variable or an array in one piece.
_STANDING_FOR_ONE = (StatelessCenters, VariableByHandle, ArrayByKey)


class CenterRows:
    """Rows of the centers, read from a variable, a tensor or a NumPy array.

    Attributes:
      shape: ``[C, D]``.
      static_rows: C, or None where it is not known while tracing.
      width: D; None only in a traced function that takes the centers as an argument.
      source, source_dtype: the variable, tensor or array, and its dtype.
      dtype: the dtype of the distances, float32 or float64. Rows are read in this dtype.
    """

    def __init__(self, centers: Any, *, any_width: bool = False):
        centers = unwrap(centers)
        if isinstance(centers, ShardedCenters):
            raise TypeError(
                "centers: expected one table, got ShardedCenters: load its save() into one of a "
                "single replica, and give the variable in its shards"
            )
        if not (isinstance(centers, (tf.Variable, np.ndarray, TableLike)) or tf.is_tensor(centers)):
            centers = tf.convert_to_tensor(centers)
        if isinstance(centers, np.ndarray) and in_xla():
            centers = tf.convert_to_tensor(centers)
        self.source = centers
        self.source_dtype = tf.as_dtype(centers.dtype)
        if self.source_dtype not in _FLOATS:
            raise TypeError(f"centers: expected dtype {_names()}, got {self.source_dtype.name}")
        shape = tf.TensorShape(centers.shape)
        if shape.rank != 2 or not (shape[1] or any_width):
            raise ValueError(f"centers: expected shape [C, D] with D known and > 0, got {shape}")
        self.shape, self.static_rows, self.width = shape, shape[0], shape[1]
        self.dtype = tf.float64 if self.source_dtype == tf.float64 else tf.float32

    def count(self) -> tf.Tensor:
        """C, int64."""
        if self.static_rows is not None:
            return tf.constant(self.static_rows, tf.int64)
        if isinstance(self.source, ArrayByKey):
            count = tf.numpy_function(_rows, [self.source.key], tf.int64)
            return tf.ensure_shape(count, [])
        if isinstance(self.source, (tf.Variable, VariableByHandle)):
            return tf.raw_ops.VariableShape(input=self.source.handle, out_type=tf.int64)[0]
        return tf.shape(self.source, tf.int64)[0]

    def block(self, start: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        """The rows [start, stop)."""
        if isinstance(self.source, np.ndarray):
            return self._from_numpy(lambda a, b: self.source[a:b], start, stop)
        if isinstance(self.source, ArrayByKey):
            return self._from_numpy(_slice, self.source.key, start, stop)
        if tf.is_tensor(self.source) and not isinstance(self.source, tf.Variable):
            return tf.cast(self.source[start:stop], self.dtype)
        # A slice of a variable would read the whole table, and copy it in copy-on-read mode.
        return self.take(tf.range(start, stop))

    def take(self, labels: tf.Tensor) -> tf.Tensor:
        """The rows of these labels."""
        if isinstance(self.source, np.ndarray):
            return self._from_numpy(lambda y: self.source[y], labels)
        # Without stop_gradient a tape would keep every block of a trainable variable.
        return tf.stop_gradient(tf.cast(tf.gather(self.source, labels), self.dtype))

    def _from_numpy(self, read: Callable[..., np.ndarray], *places: tf.Tensor) -> tf.Tensor:
        # The array is read when the op runs: a conversion to a tensor would load all of it.
        rows = tf.numpy_function(read, places, self.source_dtype)
        return tf.cast(tf.ensure_shape(rows, [None, self.width]), self.dtype)


def checked(features: Any, centers: Any) -> tuple[tf.Tensor, CenterRows]:
    """The features as a tensor ``[..., D]`` of the dtype of the distances, and the centers.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or shape.
    """
    features = tf.convert_to_tensor(features)
    if features.dtype not in _FLOATS:
        raise TypeError(f"features: expected dtype {_names()}, got {features.dtype.name}")
    table = CenterRows(centers)
    if features.dtype == tf.float64:
        table.dtype = tf.float64
    if features.shape.rank is None or features.shape.rank < 1:
        raise ValueError(f"features: expected shape [..., D], got {features.shape}")
    if not features.shape[-1:].is_compatible_with([table.width]):
        raise ValueError(
            f"features: expected shape [..., {table.width}] for centers of shape {table.shape}, "
            f"got {features.shape}"
        )
    return tf.stop_gradient(tf.cast(features, table.dtype)), table


def _rows(key: np.ndarray) -> np.int64:
    return np.int64(len(ArrayByKey.find(key)))


def _slice(key: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    return ArrayByKey.find(key)[start:stop]


def _names() -> str:
    return ", ".join(dtype.name for dtype in _FLOATS)
