"""Prints where the warning of the fallback points to, for both functions; for test_fallback.py."""

import os
import sys
import warnings

import tensorflow as tf

import tf_center_loss_op as tcl
from tf_center_loss_op._core import dispatch

centers = tf.Variable(tf.zeros([3, 2]))
for function in (tcl.center_loss, tcl.update_centers):
    dispatch._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(tf.ones([1, 2]), [0], centers)
    places = [os.path.basename(each.filename) for each in caught]
    print(places == [os.path.basename(sys.argv[0])])
