"""Runs the search in the graph that is being traced, or in one of its own in eager mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_center_loss_op._core import private_apis
from tf_center_loss_op._core.variables import is_resource_variable
from tf_center_loss_op.nearest.distances import by_blocks
from tf_center_loss_op.nearest.inputs import ArrayByKey, CenterRows, VariableByHandle
from tf_center_loss_op.nearest.search import nearest

# How many samples are compared with the table at a time.
SAMPLES = 512

# How a traced function takes the centers: as an argument of which shape and dtype (None: that of
# the centers), and what makes the centers of it.
_HANDLE = ((), tf.resource, VariableByHandle)
_KEY = ((), tf.int64, ArrayByKey)
_TENSOR = ((None, None), None, lambda tensor, dtype: tensor)


def search(x: tf.Tensor, table: CenterRows, k: int, block: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The labels and distances [n, k] of the nearest centers, see `nearest`.

    In eager mode a traced function runs the search: op by op it takes more than twice the time.
    Its trace depends on the dtypes and on k only. It takes variables by their handles and arrays by
    keys, so it holds none of them when the call has ended.
    """
    centers = table.source
    if not tf.executing_eagerly():
        return _by_samples(x, table, k, block)
    if isinstance(centers, np.ndarray):
        with ArrayByKey.keyed(centers) as key:
            return _run(_KEY, x, table, tf.constant(key, tf.int64), k, block)
    if is_resource_variable(centers) and not isinstance(centers, tf.distribute.DistributedValues):
        return _run(_HANDLE, x, table, centers.handle, k, block)
    if tf.is_tensor(centers) and not isinstance(centers, tf.Variable):
        return _run(_TENSOR, x, table, centers, k, block)
    return _by_samples(x, table, k, block)


def _run(
    kind: tuple, x: tf.Tensor, table: CenterRows, centers: tf.Tensor, k: int, block: int
) -> tuple[tf.Tensor, tf.Tensor]:
    function = _traced(kind, table.source_dtype, table.dtype, k)
    with private_apis.stop_recording():
        return function(x, centers, tf.constant(block, tf.int64))


@functools.lru_cache(maxsize=64)
def _traced(kind: tuple, source_dtype: tf.DType, dtype: tf.DType, k: int) -> Callable[..., Any]:
    """The search as a function of the samples, the centers and the rows of a block."""
    shape, argument_dtype, made = kind

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], dtype),
            tf.TensorSpec(shape, argument_dtype or source_dtype),
            tf.TensorSpec([], tf.int64),
        ],
        autograph=False,
    )
    def nearest_centers(
        x: tf.Tensor, centers: tf.Tensor, block: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        table = CenterRows(made(centers, source_dtype), any_width=True)
        table.dtype = dtype
        return _by_samples(x, table, k, block)

    return nearest_centers


def _by_samples(
    x: tf.Tensor, table: CenterRows, k: int, block: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    return by_blocks(
        tf.shape(x)[0],
        SAMPLES,
        lambda start, stop: nearest(x[start:stop], table, k, block),
        [(tf.int64, [None, k]), (table.dtype, [None, k])],
    )
