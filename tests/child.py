"""Runs the programs of tests/programs, each in a process of its own, away from the source tree."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROGRAMS = TESTS / "programs"


def command(name, *arguments):
    """The command line of a program with its arguments."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def environment(*, paths=(), **changes):
    """This process's environment with `changes`.

    A program imports the helpers of tests/, and modules in `paths` before those.
    """
    env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="2")
    env.pop("TF_CENTER_LOSS_IMPL", None)
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), str(TESTS)])
    return env | changes


def run_program(name, *arguments, cwd, paths=(), check=True, timeout=300, **changes):
    """Standard output of a program run in `cwd`; with check=False the finished process."""
    return _run(command(name, *arguments), cwd, environment(paths=paths, **changes), check, timeout)


def run_pytest(*arguments, cwd=TESTS.parent, timeout=300, **changes):
    """Standard output of pytest, which must pass; it uses no plugins of this run."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = environment(**changes)
    return _run([*line, *map(str, arguments)], cwd, env, True, timeout)


def _run(line, cwd, env, check, timeout):
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    if not check:
        return done
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
