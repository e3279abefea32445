"""The PEP 517 backend: setuptools, with build requirements that depend on the environment.

The op library loads only into the TensorFlow minor version it was built for, so it is built against
the TensorFlow of the target environment. sysconfig finds that environment even under pip's build
isolation. TensorFlow is a build requirement only if the environment has none.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parents[1]
TENSORFLOW = re.search(r"^tensorflow.*$", (ROOT / "requirements.txt").read_text(), re.M)[0]
TENSORFLOW_MINOR = re.search(r">=(\d+\.\d+)", TENSORFLOW)[1]


def find_tensorflow():
    """The TensorFlow to build against as (package folder, version), or None."""
    sites = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path)
    for site in dict.fromkeys(sites):
        headers = Path(site, "tensorflow", "include", "tensorflow", "core", "public", "version.h")
        for name in ("tensorflow", "tensorflow-cpu"):
            # The version is read from the package metadata: the headers do not contain it, and
            # importing TensorFlow is slow.
            for distribution in metadata.distributions(name=name, path=[site]):
                if distribution.version.startswith(f"{TENSORFLOW_MINOR}.") and headers.exists():
                    return Path(site, "tensorflow"), distribution.version
    return None


def find_tool(name):
    """The path of a program that runs, or None."""
    for path in (None, sysconfig.get_path("scripts")):
        program = shutil.which(name, path=path)
        # The program is run once, because under build isolation the scripts of the target
        # environment may be on PATH and fail, as they cannot import their packages.
        if program and subprocess.run([program, "--version"], capture_output=True).returncode == 0:
            return program
    return None


def _requirements():
    if os.environ.get("TF_CENTER_LOSS_BUILD") == "off":
        return []
    tools = [name for name in ("cmake", "ninja") if not find_tool(name)]
    return tools if find_tensorflow() else [*tools, TENSORFLOW]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools would also pack modules that an earlier build left there and that are now deleted.
    for stale in ROOT.glob("build/lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
