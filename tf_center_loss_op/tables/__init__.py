"""Tables of centers: created, read, saved, loaded and filled without a second copy of them."""

from tf_center_loss_op.tables.class_means import from_dataset
from tf_center_loss_op.tables.files import load, save
from tf_center_loss_op.tables.growth import grow
from tf_center_loss_op.tables.initializers import RandomNormal
from tf_center_loss_op.tables.memory import clear, create, rows

__all__ = ["RandomNormal", "clear", "create", "from_dataset", "grow", "load", "rows", "save"]
