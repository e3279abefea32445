"""Random steps of the CPU kernels under sanitizers: tests/fuzz/cpu_kernels.cc, without TensorFlow.

Hostile labels, numbers that are not finite, threads in any order; each array ends at, or begins
after, a page that may not be touched, and what is only read is write-protected. The seeds are the
same in each run; `make fuzz` tries new ones for minutes. A seed that fails is repeated by running
the program that the test names with it, and becomes a literal test.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fuzzing import MINUTES

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "fuzz"
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-pthread", f"-I{ROOT}"]
X86 = platform.machine() in ("x86_64", "AMD64")

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREAD = ["-fsanitize=thread"]

# The row loops of the wider instruction sets compile for minutes under a sanitizer, which knows
# nothing of their masked loads and stores anyway: those are watched by the guard pages.
ISAS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mf16c"],
}


def compiler():
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def sources():
    files = [*(ROOT / "csrc").glob("*"), *(ROOT / "tests" / "fuzz").glob("*")]
    return sorted(file for file in files if file.suffix in (".h", ".cc"))


def make(output, *command):
    """Runs a compiler command for `output`, a name that says what went into it, only once."""
    if not output.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
        partial.rename(output)
    return output


def build(sanitizer, all_isas):
    """The program, with the kernels of the baseline instruction set under the sanitizer."""
    wider = ISAS if X86 and all_isas else {}
    flags = [*FLAGS, "-DTCL_HAVE_X86_ISAS=1"] if wider else FLAGS
    content = hashlib.sha256(repr([compiler(), flags, sanitizer, wider]).encode())
    for file in sources():
        content.update(file.read_bytes())
    stem = content.hexdigest()[:16]
    program = BUILT / f"{stem}-cpu_kernels"
    if program.exists():
        return program

    def compiled(name, source, *options):
        output = BUILT / f"{stem}-{name}.o"
        return make(output, compiler(), *flags, *options, "-c", ROOT / source)

    names = ("isa", "label_segments", "center_loss_cpu")
    objects = [compiled(name, f"csrc/{name}.cc", *sanitizer) for name in names]
    objects.append(compiled("cpu_kernels", "tests/fuzz/cpu_kernels.cc", *sanitizer))
    loops = "csrc/row_loops.cc"
    objects.append(compiled("baseline", loops, *sanitizer, "-DTCL_ISA=baseline"))
    objects += [compiled(isa, loops, *ISAS[isa], f"-DTCL_ISA={isa}") for isa in wider]
    return make(program, compiler(), *flags, *sanitizer, *objects)


@pytest.mark.parametrize(
    "sanitizer, all_isas, cases",
    [(ADDRESS, True, 2000), (THREAD, False, 400)],
    ids=["address-undefined", "thread"],
)
def test_random_steps(sanitizer, all_isas, cases):
    program = build(sanitizer, all_isas)
    first = time.time_ns() if MINUTES else 1
    options = dict(ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=1048576")
    line = [program, str(first), str(cases), str(60 * MINUTES)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | options)
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.endswith(" cases\n")
