"""The CUDA kernels of cuda/, compiled for the host and run by the emulator in tests/emulator."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
KERNELS = ROOT / "cuda"
BUILT = ROOT / "build" / "emulator"

# No FORTIFY_SOURCE: it reports a longjmp to another stack as an error.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-D_FORTIFY_SOURCE=0", "-U_FORTIFY_SOURCE"]
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")
# For the kernels only: reports every memory access to the emulator.
RACES = ("-fsanitize=thread",)

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
        ("tuning", ctypes.c_int * 6),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "classes")),
        *((name, ctypes.c_void_p) for name in ("features", "labels", "sample_weight")),
        *((name, ctypes.c_void_p) for name in ("centers", "loss", "residual", "squared_distance")),
        ("ignore_class", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("loss_weight", ctypes.c_double),
        ("workspace", _Workspace),
        ("clock", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("feature_type", "rule", "reduction")),
        *(
            (name, ctypes.c_bool)
            for name in (
                "long_labels",
                "features_are_residuals",
                "has_ignore_class",
                "update_centers",
                "numbers_in_memory",
                "atomic",
            )
        ),
    ]


def _compiler():
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def sanitizer_libraries():
    """The value of LD_PRELOAD for a Python that loads a library built with SANITIZE."""
    return [
        _output(_compiler(), f"-print-file-name={name}.so") for name in ("libasan", "libstdc++")
    ]


def _output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _compile(source, flags, includes):
    """The object file of `source`, compiled only if it or a header has changed."""
    command = [_compiler(), *FLAGS, *flags, *(f"-I{folder}" for folder in includes)]
    content = hashlib.sha256(repr(command).encode() + source.read_bytes())
    for folder in (EMULATOR, ROOT / "csrc", source.parent, ROOT / "cuda"):
        for file in sorted(p for p in folder.glob("*") if p.suffix in (".h", ".cuh")):
            content.update(file.read_bytes())
    return _make(content, ".o", [*command, "-c", "-x", "c++", source])


def _make(content, suffix, command):
    made = BUILT / f"{content.hexdigest()[:16]}{suffix}"
    if not made.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
        partial.rename(made)  # a library that is loaded may not be written over
    return made


@functools.cache
def build(*, kernels=KERNELS, entry=(EMULATOR / "entry.cc", ()), flags=(), races=False):
    """Compiles `kernels` with the emulator, unless unchanged; returns the path of the library.

    `kernels` may be a changed copy of the folder cuda/, from `changed`, which is for float32 alone.
    `entry` is the file that calls the launchers, and what it is compiled and linked with.
    """
    if kernels != KERNELS:
        flags = (*flags, "-DTCL_FLOAT_ONLY")
    includes = [EMULATOR, kernels.parent, ROOT]
    caller, caller_flags = entry
    objects = [
        _compile(EMULATOR / "emulator.cc", flags, includes),
        _compile(caller, (*flags, *caller_flags), includes),
    ]
    own_flags = (*flags, *RACES) if races else flags
    objects.append(_compile(kernels / "center_loss.cu", own_flags, includes))
    content = hashlib.sha256(repr([flags, caller_flags, *objects]).encode())
    linked = [flag for flag in caller_flags if not flag.startswith("-D")]
    return _make(content, ".so", [_compiler(), *FLAGS, *flags, *objects, *linked])


def changed(*changes):
    """A copy of cuda/ for float32 alone, with `changes`: pairs of an old text, which must occur
    exactly once, and a new one."""
    texts = {file.name: file.read_text() for file in sorted(KERNELS.iterdir())}
    kernels = texts["center_loss.cu"]
    for feature in ("double", "Half", "BFloat16"):
        kernels = kernels.replace(f"TCL_INSTANTIATE({feature})\n", "\n")  # no line is moved
    texts["center_loss.cu"] = kernels
    for old, new in changes:
        found = [name for name, text in texts.items() for _ in range(text.count(old))]
        if len(found) != 1:
            raise ValueError(f"{len(found)} places in cuda/, expected one, have the text {old!r}")
        texts[found[0]] = texts[found[0]].replace(old, new)
    folder = BUILT / hashlib.sha256(repr(texts).encode()).hexdigest()[:16] / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    return folder


class EmulatorError(RuntimeError):
    """A launch that failed: a deadlock, threads that meet in different places, a race."""


class Workspace:
    """A launch's workspace: zero at first, kept from launch to launch."""

    def __init__(self, library, batch, dim, dtype, atomic=False, tuning=None, phases=False):
        constants = tuning_defaults(library) | (tuning or {})
        self.struct = _Workspace(None, batch, dim, np.dtype(dtype).itemsize, atomic)
        self.struct.tuning[:] = list(constants.values())
        self.size = library.tcl_emulator_workspace_bytes(ctypes.byref(self.struct))
        # These first bytes must be zero even if the workspace is used for one launch only.
        self.clear_size = library.tcl_emulator_workspace_clear_bytes(ctypes.byref(self.struct))
        self.memory = np.zeros(self.size // 8 + 2, np.uint64)
        address = self.memory.ctypes.data
        self.offset = -address % 16
        self.struct.memory = address + self.offset
        self.clock = None
        if phases:
            names = []
            while name := library.tcl_emulator_phase(len(names)):
                names.append(name.decode())
            blocks = library.tcl_emulator_blocks(ctypes.byref(self.struct), batch)
            self.phase_names, self.clock = names, np.zeros([blocks, len(names)], np.uint64)

    def clock_of(self, batch):
        """The array of a launch's phase clock; None unless the launch is of the whole batch."""
        whole = self.clock is not None and batch == self.struct.batch
        return self.clock.ctypes.data if whole else None

    def phases(self):
        """(name, first, last): when the first and the last block passed a point of the last launch,
        in microseconds after the first began."""
        return phase_times(self.phase_names, self.clock)


def phase_times(names, clock):
    """The same from [blocks, phases] nanoseconds; zero where the block did not pass the point."""
    started = clock[:, 0].min()
    passed = {name: clock[:, k][clock[:, k] > 0] - started for k, name in enumerate(names)}
    return [
        (name, float(times.min()) / 1e3, float(times.max()) / 1e3)
        for name, times in passed.items()
        if len(times)
    ]


def tuning_defaults(library):
    """{name: default} of the launch constants."""
    value, defaults = ctypes.c_int(), {}
    while name := library.tcl_emulator_tuning(len(defaults), ctypes.byref(value)):
        defaults[name.decode()] = value.value
    return defaults


class Emulator:
    """The kernels with a schedule: `seed` 0 is in order, others by chance, of four the first with
    warps and the third with threads that hardly run; `skip` names a barrier, release or acquire,
    "device.cuh:42", that is left out; with `races`, for a library built with them, accesses that
    nothing orders are errors."""

    def __init__(self, *, seed=0, multiprocessors=2, races=False, skip="", library=None):
        self._file = library or build()
        self._library = ctypes.CDLL(str(self._file))
        for function in ("workspace_bytes", "workspace_clear_bytes", "blocks"):
            getattr(self._library, f"tcl_emulator_{function}").restype = ctypes.c_int64
        for function in ("error", "tuning", "phase"):
            getattr(self._library, f"tcl_emulator_{function}").restype = ctypes.c_char_p
        self._schedule = (
            ctypes.c_uint64(seed),
            multiprocessors,
            ctypes.c_bool(races),
            skip.encode(),
        )

    def workspace(self, batch, dim, dtype=np.float32, atomic=False, tuning=None, phases=False):
        """A workspace for float32 or float64 centers and batches up to this size."""
        self._configure()
        return Workspace(self._library, batch, dim, dtype, atomic, tuning, phases)

    def tuning(self):
        """{name: default} of the launch constants."""
        return tuning_defaults(self._library)

    def phases(self, workspace):
        """(name, first, last) of the points that the last launch passed, as Workspace.phases."""
        return workspace.phases()

    def memory_of(self, workspace):
        """The bytes of the workspace after the last launch."""
        return workspace.memory.view(np.uint8)[workspace.offset :][: workspace.size]

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
        ignore_class=None,
        update_centers=True,
        loss_weight=1.0,
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
            ignore_class=ignore_class or 0,
            alpha=alpha,
            loss_weight=loss_weight,
            workspace=workspace.struct,
            clock=workspace.clock_of(batch),
            feature_type=FEATURE_TYPES.index(features.dtype),
            rule=RULES.index(rule),
            reduction=REDUCTIONS.index(reduction),
            long_labels=labels.dtype == np.int64,
            features_are_residuals=features_are_residuals,
            has_ignore_class=ignore_class is not None,
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

    def _configure(self):
        self._library.tcl_emulator_configure(*self._schedule)

    def _call(self, function, *arguments):
        self._configure()
        error = getattr(self._library, function)(*arguments)
        if error:
            text = self._library.tcl_emulator_error(error).decode()
            raise EmulatorError(re.sub("@([0-9a-f]+)@", self._line, text))

    def _line(self, found):
        """The source line of an address in the library, if addr2line is installed."""
        if not shutil.which("addr2line"):
            return f"address {found[1]}"
        return Path(_output("addr2line", "-e", self._file, found[1]).split()[0]).name
