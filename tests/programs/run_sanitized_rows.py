"""Runs rows of cases under AddressSanitizer, then prints "done"; for test_cuda_schedules.py.

Arguments: the library, and the rows by their name in the test, such as ROWS.
"""

import sys

import test_cuda_schedules

library, rows = sys.argv[1:]
test_cuda_schedules.sanitized_rows(library, getattr(test_cuda_schedules, rows))
print("done")
