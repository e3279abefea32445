"""Compiles rows.cc for this machine once per process, and loads it."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]

_array, _size = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def library():
    """Returns the library with the functions `MoveRows` and `Copy`."""
    source = Path(__file__).with_name("rows.cc")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.so"
        subprocess.run([COMPILER, *FLAGS, source, "-o", path], check=True)
        loaded = ctypes.CDLL(str(path))
    loaded.MoveRows.argtypes = [_array] * 4 + [_size, _size, ctypes.c_float]
    loaded.MoveRows.argtypes += [_array, _array, ctypes.c_int]
    loaded.Copy.argtypes = [_array, _array, _size, ctypes.c_int]
    loaded.MoveRows.restype = loaded.Copy.restype = None
    return loaded


def pointer(array):
    """Returns a pointer argument to the array's memory; the pointer keeps the array alive."""
    return array.ctypes.data_as(_array)
