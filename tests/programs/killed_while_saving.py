"""Is killed while it saves a table to the path given; for test_whole_files.py."""

import os
import signal
import sys

import tf_center_loss_op as tcl


def kill(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)


os.fsync = kill
tcl.tables.save(tcl.tables.create(100, 3, initializer="ones"), sys.argv[1])
