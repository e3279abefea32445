"""Center loss for TensorFlow and Keras, as one fused op."""

from tf_center_loss_op import compat
from tf_center_loss_op._native import build_info
from tf_center_loss_op.conventions import CONVENTIONS
from tf_center_loss_op.functional import center_loss, update_centers
from tf_center_loss_op.layer import CenterLoss

__all__ = ["CONVENTIONS", "CenterLoss", "build_info", "center_loss", "compat", "update_centers"]
