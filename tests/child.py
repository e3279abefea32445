"""Runs Python source in a process of its own, away from the source tree."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_python(source, cwd, *, paths=(), check=True, timeout=300, **environment):
    """Standard output of `source` run in `cwd`; with check=False the finished process."""
    env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="2")
    env.pop("TF_CENTER_LOSS_IMPL", None)
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), str(TESTS)])
    env.update(environment)
    # A file, because AutoGraph reads the source of what it converts.
    program = Path(cwd) / "program.py"
    program.write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, program],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if not check:
        return done
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def memory(field):
    """A size of this process by its name in /proc, such as VmHWM (the peak), in bytes.

    The peak that `resource.getrusage` gives begins with that of the process which started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"field: {field!r} is none of /proc/self/status")
