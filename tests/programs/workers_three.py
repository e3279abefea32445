"""Functions on three workers against the oracle; for test_distribute_workers.py."""

import tensorflow as tf

from replica_checks import CASES, check_functions, mirrored_table, sharded_table

strategy = tf.distribute.MultiWorkerMirroredStrategy()

check_functions(strategy, "auto", *mirrored_table(strategy), cases=CASES[:3])
check_functions(strategy, "auto", *sharded_table(strategy), cases=CASES[:3])
