"""The CUDA kernels of cuda/, compiled for the host and run by the emulator in tests/emulator."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
KERNELS = ROOT / "cuda" / "center_loss.cu"

# No FORTIFY_SOURCE: it takes a longjmp to another stack for a mistake.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-D_FORTIFY_SOURCE=0", "-U_FORTIFY_SOURCE"]
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]

FEATURE_TYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
RULES = ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"]
REDUCTIONS = ["sum", "mean", "none"]


class _Workspace(ctypes.Structure):
    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("center_size", ctypes.c_int64),
        ("atomic", ctypes.c_bool),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "classes")),
        *((name, ctypes.c_void_p) for name in ("features", "labels", "sample_weight")),
        *((name, ctypes.c_void_p) for name in ("centers", "loss", "residual", "squared_distance")),
        ("ignore_label", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("workspace", _Workspace),
        *((name, ctypes.c_int32) for name in ("feature_type", "rule", "reduction")),
        *(
            (name, ctypes.c_bool)
            for name in (
                "long_labels",
                "features_are_residuals",
                "has_ignore_label",
                "update_centers",
                "numbers_in_memory",
                "atomic",
            )
        ),
    ]


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh"))


@functools.cache
def build(*, kernels=KERNELS, flags=()):
    """Compiles `kernels` with the emulator; returns the library's path. Unchanged files: at once.

    `kernels` may be a changed copy of cuda/center_loss.cu.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    command = [compiler, *FLAGS, *flags, f"-I{EMULATOR}", f"-I{ROOT}"]
    sources = [EMULATOR / "emulator.cc", EMULATOR / "entry.cc"]
    content = hashlib.sha256(repr(command).encode())
    for file in [*_files(EMULATOR), *_files(ROOT / "cuda"), *_files(ROOT / "csrc"), kernels]:
        content.update(file.read_bytes())
    library = ROOT / "build" / "emulator" / f"{content.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*command, *sources, "-x", "c++", kernels, "-o", partial],
            check=True,
            capture_output=True,
            text=True,
        )
        partial.rename(library)
    return library


class Workspace:
    """Memory of a launch's bookkeeping, zero at first and kept from launch to launch."""

    def __init__(self, library, batch, dim, dtype, atomic=False):
        self.struct = _Workspace(None, batch, dim, np.dtype(dtype).itemsize, atomic)
        size = library.tcl_emulator_workspace_bytes(ctypes.byref(self.struct))
        self.memory = np.zeros(size // 8 + 2, np.uint64)  # NumPy's large arrays lie on 16 bytes
        address = self.memory.ctypes.data
        self.struct.memory = address + -address % 16


class Emulator:
    """The kernels with a schedule: `seed` 0 is in order, others by chance, odd ones with warps
    that hardly run; `skip` names a barrier, "device.cuh:42", that is left out."""

    def __init__(self, *, seed=0, multiprocessors=2, skip="", library=None):
        self._library = ctypes.CDLL(str(library or build()))
        self._library.tcl_emulator_workspace_bytes.restype = ctypes.c_int64
        self._library.tcl_emulator_error.restype = ctypes.c_char_p
        self._schedule = (ctypes.c_uint64(seed), multiprocessors, skip.encode())

    def workspace(self, batch, dim, dtype=np.float32, atomic=False):
        """A workspace for float32 or float64 centers and batches up to this size."""
        return Workspace(self._library, batch, dim, dtype, atomic)

    def center_loss_step(
        self,
        features,
        labels,
        centers,
        *,
        alpha=0.5,
        rule="paper",
        reduction="mean",
        sample_weight=None,
        ignore_label=None,
        update_centers=True,
        weight=1.0,
        features_are_residuals=False,
        numbers_in_memory=False,
        atomic=False,
        workspace=None,
    ):
        """One step; centers move in place. Returns loss, residual and squared distances."""
        features, labels = np.ascontiguousarray(features), np.ascontiguousarray(labels)
        batch, dim = features.shape
        dtype = centers.dtype
        if workspace is None:
            workspace = self.workspace(batch, dim, dtype, atomic)
        loss = np.full([batch] if reduction == "none" else [], -77, dtype)
        residual = np.full([batch, dim], -77, dtype)
        squared = np.full([batch], -77, dtype)
        if sample_weight is not None:
            sample_weight = np.ascontiguousarray(sample_weight, dtype)
        step = _Step(
            batch=batch,
            dim=dim,
            classes=len(centers),
            features=features.ctypes.data,
            labels=labels.ctypes.data,
            sample_weight=None if sample_weight is None else sample_weight.ctypes.data,
            centers=centers.ctypes.data,
            loss=loss.ctypes.data,
            residual=residual.ctypes.data,
            squared_distance=squared.ctypes.data,
            ignore_label=ignore_label or 0,
            alpha=alpha,
            weight=weight,
            workspace=workspace.struct,
            feature_type=FEATURE_TYPES.index(features.dtype),
            rule=RULES.index(rule),
            reduction=REDUCTIONS.index(reduction),
            long_labels=labels.dtype == np.int64,
            features_are_residuals=features_are_residuals,
            has_ignore_label=ignore_label is not None,
            update_centers=update_centers,
            numbers_in_memory=numbers_in_memory,
            atomic=atomic,
        )
        self._call("tcl_emulator_step", ctypes.byref(step))
        return loss, residual, squared

    def backward(self, upstream, residual, dtype, in_place=False):
        """upstream times residual, rounded to dtype."""
        batch, dim = residual.shape
        gradient = residual if in_place else np.full([batch, dim], -77, dtype)
        self._call(
            "tcl_emulator_backward",
            FEATURE_TYPES.index(dtype),
            ctypes.c_void_p(upstream.ctypes.data),
            ctypes.c_bool(upstream.ndim == 1),
            ctypes.c_void_p(residual.ctypes.data),
            ctypes.c_void_p(gradient.ctypes.data),
            ctypes.c_int64(batch),
            ctypes.c_int64(dim),
        )
        return gradient

    def _call(self, function, *arguments):
        self._library.tcl_emulator_configure(*self._schedule)
        error = getattr(self._library, function)(*arguments)
        if error:
            raise RuntimeError(self._library.tcl_emulator_error(error).decode())
