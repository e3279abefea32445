"""Prints what the CUDA kernels use on each architecture: `python -m bench.ptxas`.

The table has registers, spills, local memory and shared memory, as reported by ptxas. The program
needs nvcc, but no GPU.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90)


class Kernel(NamedTuple):
    """One kernel on one architecture, sizes in bytes."""

    name: str
    architecture: str
    registers: int
    stack_frame: int  # local memory per thread: arrays and spilled registers
    spill_stores: int
    spill_loads: int
    shared: int  # static part; the launcher sets the dynamic part


def nvcc():
    """Returns the path of the CUDA compiler, or None."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_all(architectures=ARCHITECTURES):
    """Compiles cuda/ for the architectures and, as PTX, for architectures after the last one.

    Returns the kernels and the compiler's warnings.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), "-std=c++17", f"-I{ROOT}", "-Xptxas=-v", "-t0", *targets]
        command += ["-c", ROOT / "cuda" / "center_loss.cu", "-o", Path(folder) / "center_loss.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    text = done.stderr
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout
    return parse(text), re.findall(r"^.*warning.*$", text, re.M)


def parse(text):
    """Returns the kernels that ptxas reports in this text."""
    found = re.finditer(
        r"Compiling entry function '(?P<name>.*?)' for '(?P<architecture>sm_\d+)'"
        r".*?(?P<stack_frame>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores,"
        r" (?P<spill_loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        text,
        re.S,
    )
    kernels = []
    for match in found:
        fields = ("registers", "stack_frame", "spill_stores", "spill_loads")
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                short(match["name"]),
                match["architecture"],
                shared=int(shared[1]) if shared else 0,
                **{field: int(match[field]) for field in fields},
            )
        )
    return sorted(kernels)


def short(name):
    """Removes namespaces and parameters from a name, which leaves `HashStep<Half, 4, true>`."""
    name = re.sub(r"tcl::(\(anonymous namespace\)::)?", "", name.removeprefix("void "))
    return name.split("(")[0]


def table(kernels):
    """Yields the lines of the table: one row per kernel, one column per architecture."""
    architectures = sorted({kernel.architecture for kernel in kernels})
    names = sorted({kernel.name for kernel in kernels})
    of = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    yield "registers per thread / bytes of spills / of local memory / of static shared memory"
    yield f"{'':32}" + "".join(f"{architecture:>16}" for architecture in architectures)
    for name in names:
        cells = [of[name, architecture] for architecture in architectures]
        yield f"{name:32}" + "".join(
            f"{f'{k.registers}/{k.spill_stores + k.spill_loads}/{k.stack_frame}/{k.shared}':>16}"
            for k in cells
        )


def main():
    """Prints the table."""
    if nvcc() is None:
        sys.exit("bench.ptxas: expected nvcc on the PATH or in /usr/local/cuda/bin, found none")
    kernels, warnings = compile_all()
    print(*warnings, *table(kernels), sep="\n")


if __name__ == "__main__":
    main()
