"""Interfaces of other times."""

from tf_center_loss_op.compat import v1

__all__ = ["v1"]
