"""Keras callbacks for training with centers, a mixin for models, and GPU atomics."""

from tf_center_loss_op._core.native import set_gpu_atomics
from tf_center_loss_op.training.after_step import UpdateCentersAfterStep
from tf_center_loss_op.training.backup import AtomicBackup
from tf_center_loss_op.training.monitor import CentersMonitor

__all__ = ["AtomicBackup", "CentersMonitor", "UpdateCentersAfterStep", "set_gpu_atomics"]
