"""The test files that take longest, in the order in which they begin."""

# Files that take minutes, begun first: `--dist loadfile` gives a file to one worker, and one begun
# last would keep that worker busy alone. The Makefile passes --no-loadscope-reorder: xdist would
# begin with the files of the most tests.
LONG_FILES = [
    "test_xla_gpu.py",
    "test_cuda_schedules.py",
    "test_cuda_emulated.py",
    "test_fuzz_kernels.py",
    "test_xla.py",
    "test_distribute.py",
    "test_distribute_workers.py",
    "test_distribute_paper.py",
    "test_distribute_servers.py",
    "test_documentation.py",
    "test_compat_v1.py",
    "test_resume.py",
    "test_fuzz_paths.py",
    "test_in_place.py",
]
