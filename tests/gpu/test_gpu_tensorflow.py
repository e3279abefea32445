"""The ops on a GPU: the sweep of tests/test_sweep.py, placed there."""

import importlib.util

import pytest

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("no TensorFlow", allow_module_level=True)

import numpy as np
import tensorflow as tf

import test_sweep

globals().update({name: test for name, test in vars(test_sweep).items() if name[:5] == "test_"})


@pytest.fixture
def impl():
    return "native"


@pytest.fixture(autouse=True)
def place():
    """Places everything that a test creates on the GPU."""
    if not tf.config.list_logical_devices("GPU"):
        pytest.skip("TensorFlow finds no GPU")
    with tf.device("/GPU:0"):
        yield


@pytest.mark.parametrize("batch", [300, 5000], ids=["scanned", "hashed"])
def test_a_bad_label_is_nan_and_moves_nothing(batch):
    import tf_center_loss_op as tcl

    labels = np.arange(batch) % 7
    labels[[1, -1]] = 7, -3
    features, centers = tf.ones([batch, 4]), tf.Variable(tf.zeros([7, 4]))
    loss = tcl.center_loss(features, labels, centers, rule="mean", reduction="none", impl="native")
    assert loss.device.endswith("GPU:0") and centers.device.endswith("GPU:0")
    assert np.flatnonzero(np.isnan(loss)).tolist() == [1, batch - 1]
    np.testing.assert_array_equal(centers, np.full([7, 4], 0.5))
