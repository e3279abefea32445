"""Prints by how much CentersMonitor raises the peak of the memory; for test_monitor.py.

The table has 256 MiB and is in copy-on-read mode, in which a dense read copies it.
"""

import keras
import numpy as np

import tf_center_loss_op as tcl
from measure import memory


def fit(classes, labels):
    x, y = keras.Input([64]), keras.Input([], dtype="int32")
    model = keras.Model([x, y], tcl.CenterLoss(classes)(x, y))
    model.compile("sgd")
    data = [np.ones([256, 64], "f"), labels]
    before = memory("VmHWM")
    monitor = tcl.training.CentersMonitor("logs", [(data,)], freq=2)
    model.fit(data, batch_size=64, epochs=2, verbose=0, callbacks=[monitor])
    return before, memory("VmHWM")


labels = np.arange(256)
fit(5000, labels)  # for what TensorFlow allocates once
before, after = fit(2**20, labels * 4001)
print(after - before)
