"""GlobalBatchLoss on two replicas against the loss on one; for test_distribute.py."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import check_fit, check_same, differs, main_loss, trained, trained_for_two
from replicas import mirrored

strategy = mirrored(2)

# Keras's mean of the replicas' means differs, because the last batch is uneven.
alone = contextlib.nullcontext()
one = trained(alone, loss=main_loss)[:2]
assert differs(check_same, *trained(strategy.scope(), loss=main_loss)[:2], *one)
check_same(*trained(strategy.scope())[:2], *one)


def total():
    return tcl.distribute.GlobalBatchLoss(main_loss(reduction="sum"))


check_fit(strategy, [{"loss": total}])

*one, predicted = trained_for_two(alone, lambda loss: loss)
*two, of_two = trained_for_two(strategy.scope(), tcl.distribute.GlobalBatchLoss)
check_same(*two, *one)
for name in predicted:
    np.testing.assert_allclose(of_two[name], predicted[name], rtol=1e-5, atol=1e-6)
*two, _ = trained_for_two(strategy.scope(), lambda loss: loss)
assert differs(check_same, *two, *one)

# A loss that is already a mean cannot become a mean over the global batch.
with strategy.scope():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", tcl.distribute.GlobalBatchLoss(lambda y, p: tf.reduce_mean(y - p)))
with pytest.raises(ValueError, match="loss: expected one that gives the loss of each"):
    model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
