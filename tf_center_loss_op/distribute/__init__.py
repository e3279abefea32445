"""Center loss under a `tf.distribute` strategy: every step is that of the global batch."""

from tf_center_loss_op.distribute.global_batch_loss import GlobalBatchLoss
from tf_center_loss_op.distribute.sharded import ShardedCenters
from tf_center_loss_op.distribute.strategies import MultiWorkerMirroredStrategy

__all__ = ["GlobalBatchLoss", "MultiWorkerMirroredStrategy", "ShardedCenters"]
