"""Center loss for TensorFlow and Keras, as one fused op."""

from tf_center_loss_op import compat
from tf_center_loss_op._native import build_info, set_gpu_atomics
from tf_center_loss_op.backup import AtomicBackup
from tf_center_loss_op.conventions import CONVENTIONS
from tf_center_loss_op.distribute import MultiWorkerMirroredStrategy, ShardedCenters
from tf_center_loss_op.functional import center_loss, update_centers
from tf_center_loss_op.layer import CenterLoss, UpdateCentersAfterStep
from tf_center_loss_op.losses import GlobalBatchLoss
from tf_center_loss_op.monitor import CentersMonitor
from tf_center_loss_op.nearest import distance_to_center, nearest_centers
from tf_center_loss_op.pictures import draw_embeddings, export_projector
from tf_center_loss_op.tables import (
    RandomCenters,
    centers_from_dataset,
    centers_of,
    clear_centers,
    create_centers,
    load_centers,
    save_centers,
)

__all__ = [
    "AtomicBackup",
    "CONVENTIONS",
    "CenterLoss",
    "CentersMonitor",
    "GlobalBatchLoss",
    "MultiWorkerMirroredStrategy",
    "RandomCenters",
    "ShardedCenters",
    "UpdateCentersAfterStep",
    "build_info",
    "center_loss",
    "centers_from_dataset",
    "centers_of",
    "clear_centers",
    "compat",
    "create_centers",
    "distance_to_center",
    "draw_embeddings",
    "export_projector",
    "load_centers",
    "nearest_centers",
    "save_centers",
    "set_gpu_atomics",
    "update_centers",
]
