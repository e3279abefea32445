"""Finds and loads the native libraries once, and reports what was found."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import tensorflow as tf

from tf_center_loss_op._core import arguments, private_apis

REBUILD = (
    "pip install --force-reinstall --no-deps tf_center_loss_op (from a checkout: pip install .)"
)

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "libtf_center_loss_op.so"
_XLA_LIBRARY = _PACKAGE / "libtf_center_loss_op_xla.so"
_RECORD = _PACKAGE / "_build.json"


class BuildInfo(TypedDict):
    """What `build_info` returns."""

    native: bool  # the fused op is loaded
    reason: str | None  # why it is not loaded
    tf_built: str | None  # the TensorFlow version that the library was built for
    tf_running: str  # the TensorFlow version that runs
    cuda: list[str] | None  # the GPU architectures of the library's kernels
    xla: list[str]  # the devices for which the fused op compiles under XLA
    library: str | None  # the path of the loaded library


class _Loaded(NamedTuple):
    ops: Any  # the module of generated op functions, None where unusable
    reason: str | None  # why unusable
    xla_reason: str | None = None  # why XLA cannot compile usable ops, None where it can


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@functools.cache
def _record() -> dict[str, Any]:
    """What the build recorded about itself; empty if the file is missing or damaged."""
    try:
        record = json.loads(_RECORD.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if _is_record(record) else {}


def _is_record(value: Any) -> bool:
    """Whether a value is a record as setup.py writes it."""
    if not isinstance(value, dict):
        return False
    cuda = [] if value.get("cuda") is None else value["cuda"]
    libraries = value.get("libraries")
    if not (isinstance(cuda, list) and isinstance(libraries, dict)):
        return False
    texts = [value.get("tensorflow") or "", value.get("reason") or "", *cuda]
    return all(isinstance(text, str) for text in texts) and all(
        isinstance(library, dict)
        and isinstance(library.get("size"), int)
        and isinstance(library.get("sha256"), str)
        for library in libraries.values()
    )


def _not_as_built(path: Path) -> str | None:
    """How a library differs from the one that was built, None where it is that one.

    The loader ends the process with a signal where a file is cut off, and XLA where one registers
    lowerings for ops that are not there.
    """
    if not path.is_file():
        return f"there is no {path.name} in {path.parent}"
    built = _record()["libraries"].get(path.name)
    if built is None:
        return f"{_RECORD} does not list {path.name}"
    hashed, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                hashed.update(part)
                size += len(part)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if size != built["size"]:
        return f"{path} has {size} bytes, {built['size']} were built"
    if hashed.hexdigest() != built["sha256"]:
        return f"{path} is not the file that was built: its SHA-256 differs from that in {_RECORD}"
    return None


@functools.cache
def _load() -> _Loaded:
    record = _record()
    built = record.get("tensorflow")
    if not record:
        return _Loaded(None, f"{_RECORD}, which names the libraries, is missing or damaged")
    if record.get("reason"):
        return _Loaded(None, f"it was not built: {record['reason']}")
    # A library of another minor version cannot load, and the loader's error does not say so.
    if built is not None and _minor(built) != _minor(tf.__version__):
        return _Loaded(None, f"it was built for TensorFlow {built}, this is {tf.__version__}")
    if reason := _not_as_built(_LIBRARY):
        return _Loaded(None, reason)
    try:
        ops = tf.load_op_library(str(_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        return _Loaded(None, f"it does not load: {error}")
    return _Loaded(ops, None, _load_xla())


def _load_xla() -> str | None:
    """Loads what XLA needs to compile the ops. Returns why that is not possible."""
    if reason := _not_as_built(_XLA_LIBRARY):
        return reason
    # The ops come first: XLA aborts the process when it meets a lowering of an unknown op.
    try:
        tf.load_library(str(_XLA_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        return f"it does not load: {error}"
    return None


def ops() -> Any:
    """The generated functions of the native ops; None unless `usable`."""
    return _load().ops


def usable() -> bool:
    """Whether the native ops are loaded."""
    return _load().ops is not None


def why_unusable(device_type: str | None, under_xla: bool) -> str | None:
    """Why the native ops cannot run on a device of this type; None if they can."""
    loaded = _load()
    if loaded.ops is None:
        return loaded.reason
    if under_xla and lacks_xla_only():
        return f"under XLA it needs {_XLA_LIBRARY.name}: {loaded.xla_reason}"
    if device_type is not None and device_type not in _devices():
        return (
            f"the centers lie on a {device_type}, and it was built for {' and '.join(_devices())} "
            "only (for a GPU it needs nvcc)"
        )
    return None


def lacks_xla_only() -> bool:
    """Whether the native ops are loaded, but not what XLA needs to compile them."""
    return usable() and _load().xla_reason is not None


def supports_jit() -> bool:
    """Whether the fused op compiles under XLA for every device that TensorFlow uses here."""
    used = {device.device_type for device in tf.config.get_visible_devices()}
    return used <= set(build_info()["xla"])


def _devices() -> list[str]:
    """The types of the devices that the library has kernels for."""
    return ["CPU", "GPU"] if _record().get("cuda") else ["CPU"]


def build_info() -> BuildInfo:
    """Which native libraries are installed, and whether the fused op is loaded.

    Returns:
      A dict: ``native`` (bool, the fused op is loaded), ``reason`` (why not, else None),
      ``tf_built`` and ``tf_running`` (TensorFlow versions), ``cuda`` (list of GPU architectures
      that the library holds kernels for, None without), ``xla`` (list of the devices, "CPU" and
      "GPU", for which the fused op compiles under ``jit_compile=True``; on other devices plain
      TensorFlow ops are compiled instead), ``library`` (path of the loaded library, None without).

    >>> import tf_center_loss_op as tcl
    >>> sorted(tcl.build_info())
    ['cuda', 'library', 'native', 'reason', 'tf_built', 'tf_running', 'xla']
    """
    native = usable()
    return {
        "native": native,
        "reason": _load().reason,
        "tf_built": _record().get("tensorflow"),
        "tf_running": tf.__version__,
        "cuda": _record().get("cuda") if native else None,
        "xla": _devices() if native and _load().xla_reason is None else [],
        "library": str(_LIBRARY) if native else None,
    }


# ------------------------------------------------------------------------ atomics on a GPU

_gpu_atomics: bool | None = None  # the argument of set_gpu_atomics


def set_gpu_atomics(enabled: bool) -> None:
    """Lets the fused op sum residuals on a GPU by float atomics, in any order.

    Off by default: the same inputs then give the same bits. The environment variable
    ``TF_CENTER_LOSS_GPU_ATOMICS=1`` turns it on for a process that never calls this function.
    Atomics have no effect on the CPU and under XLA. The setting applies to the calls that are
    traced or run after this one.

    Args:
      enabled: True or False.

    Raises:
      TypeError: ``enabled`` is not a bool.
      RuntimeError: ``enabled`` is True under ``tf.config.experimental.enable_op_determinism()``.
        If that is called later, the next call of the op raises.

    >>> import tf_center_loss_op as tcl
    >>> tcl.training.set_gpu_atomics(False)
    """
    global _gpu_atomics
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    if enabled:
        _refuse_atomics_under_determinism("enabled")
    _gpu_atomics = enabled


def gpu_atomics() -> bool:
    """The attribute `atomic` of the ops: whether they sum residuals on a GPU by float atomics."""
    if _gpu_atomics is not None:
        name, wanted = "set_gpu_atomics", _gpu_atomics
    else:
        name = "TF_CENTER_LOSS_GPU_ATOMICS"
        value = os.environ.get(name, "0")
        arguments.one_of(f"{name} (environment)", value, ("0", "1"))
        wanted = value == "1"
    if wanted:
        _refuse_atomics_under_determinism(name)
    return wanted


def _refuse_atomics_under_determinism(name: str) -> None:
    if private_apis.is_op_determinism_enabled():
        raise RuntimeError(
            f"{name}: expected False under tf.config.experimental.enable_op_determinism(), got "
            "True: the order in which threads arrive decides a sum by atomics"
        )
