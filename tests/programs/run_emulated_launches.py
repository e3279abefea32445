"""Runs launches of emulated kernels, which may crash; for test_cuda_schedules.py.

Arguments: the library, and the barrier to skip or "".
"""

import sys

from test_cuda_schedules import launch_after_launch

launch_after_launch(*sys.argv[1:])
