"""Moves the centers after the step of the optimizer."""

from __future__ import annotations

from typing import Any

from tf_center_loss_op._core import private_apis
from tf_center_loss_op.layer import CenterLoss


class UpdateCentersAfterStep:
    """Mixin for a `keras.Model` that moves its centers after each step of the optimizer.

    Equals, for each `CenterLoss` layer with ``deferred_update=True`` in the model:

        logs = super().train_step(data)
        layer.apply_deferred_update()

    The residuals are those of the forward pass, x_i - c_{y_i}: no sample is embedded again.

    Raises:
      RuntimeError: in ``train_step``, such a layer was not called in training mode.

    Determinism: as `center_loss`.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> class Model(tcl.training.UpdateCentersAfterStep, keras.Model):
    ...     pass
    """

    def train_step(self, *args: Any, **kwargs: Any) -> dict:
        """Runs the model's own step, then moves the centers."""
        logs = super().train_step(*args, **kwargs)
        for layer in private_apis.layers_of(self):
            if isinstance(layer, CenterLoss) and layer.deferred_update:
                layer.apply_deferred_update()
        return logs
