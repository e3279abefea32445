"""compute-sanitizer finds nothing in small steps, but finds a planted error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized.py")
FOUND = 86  # the exit status that says so


def sanitize(tool, *arguments):
    """The finished process; skips if the tool is not installed."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("no compute-sanitizer")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
        + [sys.executable, str(PROGRAM), *arguments],
        # Without caching, an array's allocation ends with the array.
        env=os.environ
        | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(PROGRAM.parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )
    # The tool's message. An operation of the program that is "not supported" is a failure.
    if "Device not supported" in done.stdout and "steps done" not in done.stdout:
        pytest.skip(f"compute-sanitizer cannot work here: {done.stdout[-300:]}")
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_nothing_is_found(kernels, tool):
    done = sanitize(tool)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "steps done" in done.stdout


def test_what_is_planted_is_found(kernels):
    done = sanitize("memcheck", "planted")
    assert done.returncode != 0 and "Invalid __global__ read" in done.stdout, done.stdout[-3000:]
