"""Chooses what computes a call: native ops or plain TensorFlow, on one replica or several."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from pathlib import Path
from typing import Protocol

import tensorflow as tf

from tf_center_loss_op._core import arguments, native, variables, xla
from tf_center_loss_op._core.arguments import Arguments
from tf_center_loss_op._core.graph_ops import GraphOps
from tf_center_loss_op._core.native_ops import NativeOps
from tf_center_loss_op.distribute.replicated import Replicated
from tf_center_loss_op.distribute.sharded import ShardedCenters
from tf_center_loss_op.distribute.sharded_step import Sharded


class Implementation(Protocol):
    """What computes a call: `NativeOps`, `GraphOps`, `Replicated` or `Sharded`.

    Each method takes checked arguments. `NativeOps` and `GraphOps` work on the batch that they are
    given. `Replicated` and `Sharded` exchange batches between the replicas and use one of those two
    on each replica; the loss that they return is this replica's share of the global batch's loss.
    """

    def center_loss(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """The loss, and ||x_i - c_{y_i}||^2 [B]; the centers have moved if a.update_centers."""

    def sum_loss_and_residual(self, a: Arguments) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum of ||x_i - c_{y_i}||^2 / 2, without weights, and the residual x_i - c_{y_i}.

        The residual [B, D] is in the centers' type, and no gradient flows through it. The centers
        have moved if a.update_centers.
        """

    def update_centers(self, a: Arguments) -> tf.Operation | None:
        """The step of the centers alone."""

    def update_from_residual(self, a: Arguments, residual: tf.Tensor) -> tf.Operation | None:
        """The step of the centers from a residual [B, D] that `sum_loss_and_residual` returned.

        That call has checked the labels of the batch; `GraphOps` does not check them again.
        `GraphOps` takes from a.features which samples are finite, `NativeOps` from the residual.
        """


def implementation(impl: str, centers: tf.Variable | variables.TableLike) -> Implementation:
    """The implementation that `impl` asks for, on these checked centers.

    A keras.Variable in a ``keras.StatelessScope`` gets `GraphOps` whatever `impl` is.

    Raises:
      RuntimeError: ``impl="native"``, and the native ops cannot run or the centers are partitioned.
      ValueError: ``impl``, or what the environment variable ``TF_CENTER_LOSS_IMPL`` sets for
        "auto", is none of `arguments.IMPLEMENTATIONS`.
    """
    chosen: Implementation
    if _choose(impl, getattr(centers, "device", None) or "") == "native":
        chosen = NativeOps()
    else:
        chosen = GraphOps()
    if isinstance(centers, ShardedCenters):
        return Sharded(chosen)
    if impl == "native" and isinstance(centers, variables.PartitionedCenters):
        raise RuntimeError(
            "impl: 'native' cannot run on centers that a partitioner has split over several "
            "variables; expected 'auto' or 'graph'"
        )
    if isinstance(centers, variables.TableLike):
        # No variable with a handle that the op could write to. Nor is there a copy on each replica,
        # which `Replicated` needs: parameter servers hold one table, a StatelessScope one value.
        return GraphOps()
    return Replicated(chosen) if variables.replicas() > 1 else chosen


def _choose(impl: str, device: str) -> str:
    """Either "native" or "graph"; device: the centers' TensorFlow device string, "" if none."""
    arguments.one_of("impl", impl, arguments.IMPLEMENTATIONS)
    if impl == "auto":
        impl = os.environ.get("TF_CENTER_LOSS_IMPL", "auto")
        arguments.one_of("TF_CENTER_LOSS_IMPL (environment)", impl, arguments.IMPLEMENTATIONS)
    if impl == "graph":
        return "graph"
    device_type = tf.DeviceSpec.from_string(device).device_type
    reason = native.why_unusable(device_type, xla.in_xla())
    if reason is None:
        return "native"
    if impl == "native":
        raise RuntimeError(
            f"impl: 'native' cannot run: {reason}. To rebuild the library: {native.REBUILD}"
        )
    # A library built without its XLA part is a normal build: no warning for a compiled function.
    if not (xla.in_xla() and native.lacks_xla_only()):
        _warn_once(reason)
    return "graph"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "tf_center_loss_op: no native library, computing with plain TensorFlow ops instead, with "
        f"the same results but slower: {reason}. To rebuild it: {native.REBUILD}",
        RuntimeWarning,
        stacklevel=_stacklevel_of_the_caller(),
    )


def _stacklevel_of_the_caller() -> int:
    """The stacklevel, as `_warn_once` passes it, of the nearest caller outside the package."""
    package = str(Path(__file__).parent.parent)
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level
