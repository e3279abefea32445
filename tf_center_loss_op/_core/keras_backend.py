"""Refuses a Keras that the layer, the losses and the callbacks of the package cannot work with."""

from __future__ import annotations

import os

import keras


def require_keras_on_tensorflow(what: str) -> None:
    """Raises unless Keras 3 runs on TensorFlow and is what `tf.keras` means.

    Args:
      what: the name of the Keras object that is made.

    Raises:
      RuntimeError: another backend, or ``TF_USE_LEGACY_KERAS=1``.
    """
    backend = keras.config.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            f"{what}: expected Keras 3 on TensorFlow, got the backend {backend!r}: set "
            "KERAS_BACKEND=tensorflow before Keras is imported"
        )
    # The values that TensorFlow takes for true.
    legacy = os.environ.get("TF_USE_LEGACY_KERAS")
    if legacy in ("1", "true", "True"):
        raise RuntimeError(
            f"{what}: expected Keras 3 on TensorFlow, got TF_USE_LEGACY_KERAS={legacy}, with which "
            "tf.keras is Keras 2: unset it, or use the functions center_loss and update_centers, "
            "which need no Keras model"
        )
