"""Loss, gradient and centers on several replicas against the oracle; for test_distribute.py.

Arguments: the number of replicas, then the implementations.
"""

import sys

from replica_checks import CASES, check_functions, mirrored_table, sharded_table
from replicas import mirrored

replicas, (first, *others) = int(sys.argv[1]), sys.argv[2:]
strategy = mirrored(replicas)
cases = CASES if replicas == 2 else CASES[:2]
check_functions(strategy, first, *mirrored_table(strategy), cases=cases)
check_functions(strategy, first, *sharded_table(strategy), cases=cases[:-1])
for impl in others:
    check_functions(strategy, impl, *mirrored_table(strategy), cases=CASES[:2])
    check_functions(strategy, impl, *sharded_table(strategy), cases=CASES[:1])
