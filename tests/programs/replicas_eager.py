"""Steps outside of tf.function on two replicas against the oracle; for test_distribute.py.

Arguments: the implementations.
"""

import sys

from replica_checks import CASES, check_functions, mirrored_table, sharded_table
from replicas import mirrored

strategy = mirrored(2)

for impl in sys.argv[1:]:
    check_functions(strategy, impl, *mirrored_table(strategy), cases=CASES[:2], eager=True)
check_functions(strategy, impl, *sharded_table(strategy), cases=CASES[:2], eager=True)
