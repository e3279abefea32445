"""The batches of a layer with deferred_update=True, until the centers move by them."""

from __future__ import annotations

import inspect
import warnings
from typing import NamedTuple

import keras
import tensorflow as tf

from tf_center_loss_op._core import variables

# A layer raises after this number of training calls without an update: a loop that never calls
# apply_deferred_update would otherwise fill the memory.
MOST_DEFERRED = 1024

# In eager mode, a fit that has kept this number of steps does not move the centers by itself.
_KEPT_STEPS = 8

HOW_TO_ACCUMULATE = (
    "In eager mode, call the layer k times, then apply_deferred_update(). In a tf.function, call "
    "both in that function: the layer k times from a Python loop (for part in [...]), or both in "
    "the body of the loop over a dataset. Where the training calls are in a function that is "
    "called k times, or the update comes after a loop in a tf.function, let them return or "
    "concatenate features and labels, and move the centers with "
    "tf_center_loss_op.update_centers(features, labels, layer.centers, alpha=layer.alpha, "
    "rule=layer.rule)"
)


class Batch(NamedTuple):
    """The batch of a training call."""

    features: tf.Tensor  # [B, D]
    labels: tf.Tensor  # [B] class ids
    ignore_class: int | None  # what it was computed with


class DeferredBatches:
    """The batches of the training calls since the centers last moved, for each replica.

    A class, because Keras would track a list as a part of the layer's state.
    """

    def __init__(self) -> None:
        self._batches_of: dict[int, list[Batch]] = {}  # by replica
        self._out_of_reach = False  # whether training calls were made in another graph
        self._warned = False

    def add(self, layer_name: str, batch: Batch) -> None:
        """Adds the batch of a training call."""
        batches = self._of_this_replica()
        if len(batches) >= MOST_DEFERRED:
            raise RuntimeError(
                "deferred_update: expected apply_deferred_update() at least once in "
                f"{MOST_DEFERRED} training calls of a layer with deferred_update=True, got none"
            )
        batches.append(batch)
        self._warn_in_fit(layer_name, len(batches))

    def take(self) -> list[Batch]:
        """Returns the batches and forgets them.

        Raises:
          RuntimeError: there are none.
        """
        taken = self._of_this_replica()
        self._batches_of[variables.replica()] = []
        if not taken:
            got = (
                "calls in another tf.function, or in a loop or branch of this one, whose tensors "
                "do not exist here"
                if self._out_of_reach
                else "none"
            )
            raise RuntimeError(
                "apply_deferred_update: expected a training call of the layer before it, in the "
                f"same tf.function or in eager mode, got {got}. {HOW_TO_ACCUMULATE}"
            )
        return taken

    def forget(self) -> None:
        """Forgets the batches."""
        self._batches_of[variables.replica()] = []

    def _of_this_replica(self) -> list[Batch]:
        # Tensors of an earlier trace that never applied the update, or of a loop or branch inside
        # this one, cannot be used here.
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        k = variables.replica()
        batches = self._batches_of.get(k, [])
        kept = [b for b in batches if getattr(b.features, "graph", None) is graph]
        self._out_of_reach |= len(kept) < len(batches)
        self._batches_of[k] = kept
        return kept

    def _warn_in_fit(self, layer_name: str, kept: int) -> None:
        """Warns once where Keras's own training step made the call: nothing follows that step."""
        if self._warned or (tf.executing_eagerly() and kept < _KEPT_STEPS):
            return
        if not _in_train_step_of_keras():
            return
        self._warned = True
        warnings.warn(
            f"The centers of the layer {layer_name!r} do not move in fit: with "
            "deferred_update=True they wait for apply_deferred_update(), which Keras's train_step "
            "does not call. Derive the model from "
            "tf_center_loss_op.training.UpdateCentersAfterStep, or use deferred_update=False",
            stacklevel=2,
        )


def _in_train_step_of_keras() -> bool:
    """Whether the running code was called by `keras.Model.train_step` of a model that keeps it."""
    code, frame = keras.Model.train_step.__code__, inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            kind = type(frame.f_locals["self"])
            return getattr(kind.train_step, "__code__", None) is code
        frame = frame.f_back
    return False
