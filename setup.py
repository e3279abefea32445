"""Builds the native libraries with CMake and installs them into the package.

If the build is not possible, the package installs without them and computes with plain TensorFlow
ops. tf_center_loss_op/_build.json records what was built, or why nothing was.
TF_CENTER_LOSS_BUILD=require makes a failed build an error, TF_CENTER_LOSS_BUILD=off skips it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from backend import TENSORFLOW, find_tensorflow, find_tool
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# One folder per Python version. It is kept, so that a rebuild compiles only what changed.
BUILD = ROOT / "build" / sys.implementation.cache_tag
OPTIONAL_SOURCES = ("cuda/center_loss.cu", "csrc/tensorflow/xla_kernels.cc")
MODE = os.environ.get("TF_CENTER_LOSS_BUILD")


class NoNativeBuild(Exception):
    """Why there is no native library, in one line."""


def run(*command):
    """Runs a command and prints its output. A failure raises the first error line of the output."""
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        error = re.search(r"(?:CMake Error.*\n\s*|\berror: )(.+)", "".join(lines))
        what = error[1] if error else f"{command[0]} exited with status {process.returncode}"
        raise NoNativeBuild(f"the native build failed: {what}")


def configure_and_build(cmake, *options):
    # CMake's cache may name an old compiler or a temporary folder of pip, so it is deleted. The
    # object files stay, so the build is incremental.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    for detected in BUILD.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(detected)
    run(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *options)
    run(cmake, "--build", str(BUILD))


def build():
    """Builds the libraries and returns the record of it."""
    if MODE == "off":
        raise NoNativeBuild("switched off by TF_CENTER_LOSS_BUILD=off")
    tensorflow, cmake, ninja = find_tensorflow(), find_tool("cmake"), find_tool("ninja")
    if not tensorflow:
        raise NoNativeBuild(f"no {TENSORFLOW} to build against in this environment")
    if not (cmake and ninja):
        raise NoNativeBuild("cmake or ninja not found (pip install cmake ninja)")
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        raise NoNativeBuild("no C++ compiler found (on Debian and Ubuntu: apt install g++)")
    options = (
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTCL_TENSORFLOW_DIR={tensorflow[0]}",
    )
    try:
        configure_and_build(cmake, *options)
    except NoNativeBuild as failure:
        if not any((ROOT / source).exists() for source in OPTIONAL_SOURCES):
            raise
        print(f"{failure}; building again without CUDA and XLA", flush=True)
        configure_and_build(cmake, *options, "-DTCL_CUDA=OFF", "-DTCL_XLA=OFF")
    built = json.loads((BUILD / "built.json").read_text())
    return {"tensorflow": tensorflow[1], "native": True, "reason": None, **built}


def fingerprints(package):
    """Size and SHA-256 of each library in a folder. The package loads no others."""
    found = {}
    for library in sorted(package.glob("*.so")):
        content = library.read_bytes()
        found[library.name] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return found


class CMakeBuild(build_ext):
    def run(self):
        try:
            record = build()
            cuda = ", ".join(record["cuda"] or ()) or "none, because nvcc was not found"
            print(
                f"tf_center_loss_op: built for TensorFlow {record['tensorflow']}; "
                f"GPU architectures: {cuda}; XLA: {'yes' if record['xla'] else 'no'}",
                flush=True,
            )
        except NoNativeBuild as reason:
            if MODE == "require":
                raise SystemExit(f"TF_CENTER_LOSS_BUILD=require, but {reason}") from None
            print(f"tf_center_loss_op: plain TensorFlow ops only, because {reason}", flush=True)
            record = {"tensorflow": None, "native": False, "reason": str(reason)}
            record |= {"cuda": None, "xla": False, "compiler": None}
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        package = root / "tf_center_loss_op"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("*.so"):
            stale.unlink()
        if record["native"]:
            run(find_tool("cmake"), "--install", str(BUILD), "--prefix", str(package))
        record["libraries"] = fingerprints(package)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


# _kernels depends on the Python ABI. Declaring it as an extension gives the wheel the right tags.
setup(
    ext_modules=[Extension("tf_center_loss_op._kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
