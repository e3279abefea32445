"""Centers in the scope of a strategy that is not supported; for test_distribute.py.

Argument: the strategy, such as tf.distribute.experimental.CentralStorageStrategy.
"""

import operator
import sys

import pytest
import tensorflow as tf

import tf_center_loss_op as tcl

path = sys.argv[1].removeprefix("tf.")
name = path.split(".")[-1]
with operator.attrgetter(path)(tf)().scope():
    for make in (lambda: tcl.CenterLoss(3), lambda: tcl.distribute.ShardedCenters(3, 2)):
        with pytest.raises(ValueError, match=f"strategy: {name}.*not supported: use "):
            make()
