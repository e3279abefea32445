"""Finds the centers nearest to features, and measures distances to them, in bounded memory.

Distances come from differences that are summed in float64, never from |x|^2 - 2 x.c + |c|^2: in
float32 that expression has no correct digit for features near their centers and far from the
origin. It only selects the candidates. Its rounding error is bounded, and every center that it
cannot rule out is compared exactly: a few for each sample as a rule, depending on the data.

XLA compiles no shapes that depend on values: under ``jit_compile=True`` every difference is
computed.
"""

from tf_center_loss_op.nearest.distances import distance_to_center
from tf_center_loss_op.nearest.prediction import predict

__all__ = ["distance_to_center", "predict"]
