"""Finds and loads the native library, once, and says what was found."""

import functools
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

# There is no public way to ask whether op determinism is on, or whether the graph that is being
# traced will be compiled, or is a part of the one around it.
from tensorflow.python.framework.config import is_op_determinism_enabled
from tensorflow.python.ops import control_flow_v2_func_graphs
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from tf_center_loss_op import _arguments

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "libtf_center_loss_op.so"
_XLA_LIBRARY = _PACKAGE / "libtf_center_loss_op_xla.so"
_LOOPS_AND_BRANCHES = (
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
    control_flow_v2_func_graphs.CondBranchFuncGraph,
)
_STEPS = ("TclCenterLossStep", "TclUpdateCenters")
_REBUILD = (
    "pip install --force-reinstall --no-deps tf_center_loss_op (from a checkout: pip install .)"
)


class _Native(NamedTuple):
    ops: object  # the module of generated op functions, None where unusable
    reason: str | None  # why unusable
    xla: bool = False  # whether the ops compile under XLA


def _minor(version):
    return ".".join(version.split(".")[:2])


@functools.cache
def _record():
    """What the build wrote down about itself."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _load():
    record = _record()
    built = record.get("tensorflow")
    if record.get("reason"):
        return _Native(None, f"it was not built: {record['reason']}")
    if not _LIBRARY.is_file():
        return _Native(None, f"there is no {_LIBRARY.name} in {_PACKAGE}")
    # Loading a library of another minor version can only fail, and its error explains nothing.
    if built is not None and _minor(built) != _minor(tf.__version__):
        return _Native(None, f"it was built for TensorFlow {built}, this is {tf.__version__}")
    try:
        ops = tf.load_op_library(str(_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        return _Native(None, f"it does not load: {error}")
    return _Native(ops, None, _load_xla())


def _load_xla():
    # Only after the ops themselves: XLA aborts the process over a lowering of unknown ops.
    try:
        tf.load_library(str(_XLA_LIBRARY))
    except (tf.errors.OpError, OSError):
        return False
    return True


def ops():
    """The generated functions of the native ops; they must be usable()."""
    return _load().ops


def usable():
    """Whether the native ops are loaded."""
    return _load().ops is not None


def _devices():
    """The types of the devices that the library has kernels for."""
    return ["CPU", "GPU"] if _record().get("cuda") else ["CPU"]


def supports_jit():
    """Whether the fused op compiles under XLA for every device that TensorFlow uses here."""
    used = {device.device_type for device in tf.config.get_visible_devices()}
    return used <= set(build_info()["xla"])


def in_xla():
    """Whether the graph that is being traced will be compiled (``jit_compile=True``)."""
    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(graph)


def reads_in_xla(centers):
    """What a step of the centers is to wait for, in a graph that XLA will compile.

    TensorFlow orders the step after earlier reads of the table, but XLA knows no order but that of
    data, and would copy a table that is read in no order with the step. So this is for the step to
    take as inputs: of what was computed from each read, the first that is smaller than the table,
    in this graph and, for a step in a loop or a branch, in the graphs around it.
    """
    graph = tf.compat.v1.get_default_graph()
    if not (in_xla() and isinstance(centers, tf.Variable)):
        return []
    found = []
    # In a graph of TensorFlow 1 no program order makes what stands there part of this run.
    while graph.building_function:
        with graph.as_default():
            # Without a gradient, of which a loop would keep one for each of its inputs.
            found += [tf.stop_gradient(tensor) for tensor in _from_reads(graph, centers)]
        if not isinstance(graph, _LOOPS_AND_BRANCHES):
            break  # its function may be called from elsewhere
        graph = graph.outer_graph
    return found


def _from_reads(graph, centers):
    handle, size = graph.capture(centers.handle), centers.shape.num_elements()
    large, small = {handle.ref()}, []
    for op in graph.get_operations():
        if large.isdisjoint(tensor.ref() for tensor in op.inputs):
            continue
        if op.type in _STEPS and op.inputs[0] is handle:
            small = []  # that step waits for them, and this one for that
            continue
        for tensor in op.outputs:
            if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
                continue
            elements = tensor.shape.num_elements()
            if elements is not None and size is not None and elements >= size:
                large.add(tensor.ref())
            else:
                small.append(tensor)
    return small


@functools.cache
def _warn_once(reason):
    warnings.warn(
        f"tf_center_loss_op: no native library, computing with plain TensorFlow ops instead, with "
        f"the same results but slower: {reason}. To rebuild it: {_REBUILD}",
        RuntimeWarning,
        stacklevel=5,
    )


def choose(impl, device=""):
    """ "native" or "graph" for what the caller and TF_CENTER_LOSS_IMPL ask for.

    device: where the centers lie, as TensorFlow writes it.
    """
    _arguments.one_of("impl", impl, _arguments.IMPLEMENTATIONS)
    if impl == "auto":
        impl = os.environ.get("TF_CENTER_LOSS_IMPL", "auto")
        _arguments.one_of("TF_CENTER_LOSS_IMPL (environment)", impl, _arguments.IMPLEMENTATIONS)
    if impl == "graph":
        return "graph"
    warns = True
    device_type = tf.DeviceSpec.from_string(device).device_type
    if not usable():
        reason = _load().reason
    elif in_xla() and not _load().xla:
        reason = f"under XLA it needs {_XLA_LIBRARY.name}, which is not there or does not load"
        warns = False
    elif device_type not in (None, *_devices()):
        reason = (
            f"the centers lie on {device}, and it was built for {' and '.join(_devices())} only "
            "(for a GPU it needs nvcc)"
        )
    else:
        return "native"
    if impl == "native":
        raise RuntimeError(
            f"impl: 'native' cannot run: {reason}. To rebuild the library: {_REBUILD}"
        )
    if warns:
        _warn_once(reason)
    return "graph"


_gpu_atomics = None  # what set_gpu_atomics was given


def set_gpu_atomics(enabled: bool) -> None:
    """Whether the fused op may sum residuals on a GPU by float atomics, in any order.

    Off by default: the same inputs then give the same bits. The environment variable
    ``TF_CENTER_LOSS_GPU_ATOMICS=1`` turns it on for a process that never calls this. The CPU and
    XLA are not concerned. Calls that are traced or run afterwards take it up.

    Args:
      enabled: True or False.

    Raises:
      TypeError: ``enabled`` is no bool.
      RuntimeError: True under ``tf.config.experimental.enable_op_determinism()``, here or, where
        that is called later, at the next call of the op.

    >>> import tf_center_loss_op as tcl
    >>> tcl.training.set_gpu_atomics(False)
    """
    global _gpu_atomics
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    if enabled:
        _refuse_atomics_under_determinism("enabled")
    _gpu_atomics = enabled


def gpu_atomics():
    """Whether ops are to be made with `atomic`."""
    if _gpu_atomics is not None:
        name, wanted = "set_gpu_atomics", _gpu_atomics
    else:
        name = "TF_CENTER_LOSS_GPU_ATOMICS"
        value = os.environ.get(name, "0")
        _arguments.one_of(f"{name} (environment)", value, ("0", "1"))
        wanted = value == "1"
    if wanted:
        _refuse_atomics_under_determinism(name)
    return wanted


def _refuse_atomics_under_determinism(name):
    if is_op_determinism_enabled():
        raise RuntimeError(
            f"{name}: expected False under tf.config.experimental.enable_op_determinism(), got "
            "True: a sum by atomics depends on the order in which threads come"
        )


def build_info() -> dict:
    """What is installed and what runs.

    Returns:
      A dict: ``native`` (bool, the fused op is loaded), ``reason`` (why not, else None),
      ``tf_built`` and ``tf_running`` (TensorFlow versions), ``cuda`` (list of GPU architectures
      the library holds kernels for, None without), ``xla`` (list of the devices, "CPU" and "GPU",
      for which the fused op compiles under ``jit_compile=True``; elsewhere plain TensorFlow ops
      stand in), ``library`` (path of the loaded library, None without).
    """
    native = usable()
    return {
        "native": native,
        "reason": _load().reason,
        "tf_built": _record().get("tensorflow"),
        "tf_running": tf.__version__,
        "cuda": _record().get("cuda") if native else None,
        "xla": _devices() if _load().xla else [],
        "library": str(_LIBRARY) if native else None,
    }
