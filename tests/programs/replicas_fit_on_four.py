"""A trained layer on four replicas against one replica; for test_distribute.py."""

from replica_checks import check_fit
from replicas import mirrored

strategy = mirrored(4)

check_fit(strategy, [{}])
