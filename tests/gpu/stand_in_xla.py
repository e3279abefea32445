"""The emulator in the place of a GPU under XLA: the CPU gets the program that a GPU would get, and
csrc/tensorflow/xla_gpu_call.cc calls the emulated launchers.

Both have to come before the process uses XLA, the emulated call also before the package.
"""

import ctypes
from pathlib import Path

import tensorflow as tf

import emulated


def take_the_place_of_a_gpu():
    load_the_emulated_call()
    compile_for_the_cpu_as_for_a_gpu()


def load_the_emulated_call():
    """Registers the call of the CUDA kernel for XLA's CPU."""
    flags = (
        f"-isystem{tf.sysconfig.get_include()}",
        *("-D_GLIBCXX_USE_CXX11_ABI=1", "-DNDEBUG", "-DTCL_HAVE_CUDA", "-DTCL_EMULATED_CUDA"),
        f"{tf.sysconfig.get_lib()}/libtensorflow_framework.so.2",
        "-Wl,--no-undefined",
    )
    file = emulated.ROOT / "csrc" / "tensorflow" / "xla_gpu_call.cc"
    library = emulated.build(entry=(file, flags), flags=("-fvisibility=hidden",))
    # The package's XLA library finds this library's XlaWorkspaceBytes first, so a package without
    # CUDA is enough.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compile_for_the_cpu_as_for_a_gpu():
    """Gives the CPU the lowerings of XLA_GPU_JIT: TensorFlow lowers no variable for a device that
    does not exist."""

    class String(ctypes.Structure):  # of libstdc++
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("size", ctypes.c_size_t),
            ("rest", ctypes.c_byte * 16),
        ]

    library = ctypes.CDLL(str(Path(tf.__file__).parent / "libtensorflow_cc.so.2"))
    # XlaOpRegistry::GetCompilationDevice(const std::string&, const DeviceRegistration**), which
    # begins with the name of the set of kernels.
    find = library[
        "_ZN10tensorflow13XlaOpRegistry20GetCompilationDeviceERKNSt7__cxx1112basic_stringIcSt11char"
        "_traitsIcESaIcEEEPPKNS0_18DeviceRegistrationE"
    ]
    find.restype = ctypes.c_bool
    name, found = ctypes.create_string_buffer(b"CPU"), ctypes.POINTER(String)()
    assert find(ctypes.byref(String(ctypes.addressof(name), 3)), ctypes.byref(found))
    kernels = found.contents
    assert ctypes.string_at(kernels.data, kernels.size) == b"XLA_CPU_JIT"
    ctypes.memmove(kernels.data, b"XLA_GPU_JIT", kernels.size)
