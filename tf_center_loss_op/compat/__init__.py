"""Interfaces of earlier versions of TensorFlow."""

from tf_center_loss_op.compat import v1

__all__ = ["v1"]
