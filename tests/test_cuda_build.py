"""nvcc compiles the CUDA kernels without spills and within the registers; needs no GPU."""

import pytest

from bench import ptxas

MOST_REGISTERS = {"ScanStep": 255, "HashStep": 128, "Backward": 128}

TEXT = """\
ptxas info    : Compiling entry function 'void tcl::(anonymous namespace)::HashStep<tcl::Half, 4, \
true>(tcl::(anonymous namespace)::Parameters<tcl::Half>)' for 'sm_75'
ptxas info    : Function properties for void tcl::(anonymous namespace)::HashStep<tcl::Half, 4, \
true>
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 48 bytes smem, 632 bytes cmem[0]
ptxas info    : Compiling entry function 'void tcl::(anonymous namespace)::Backward<float>(float)' \
for 'sm_90'
ptxas info    : Function properties for void tcl::(anonymous namespace)::Backward<float>(float)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_the_output_of_ptxas_is_parsed():
    assert ptxas.parse(TEXT) == [
        ptxas.Kernel("Backward<float>", "sm_90", 40, 0, 0, 0, 0),
        ptxas.Kernel("HashStep<Half, 4, true>", "sm_75", 72, 8, 4, 12, 48),
    ]


def test_no_kernel_spills_or_takes_too_many_registers(capsys):
    if ptxas.nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels are compiled where it is installed")
    kernels, warnings = ptxas.compile_all()
    with capsys.disabled():
        print("", *ptxas.table(kernels), sep="\n")
    assert not warnings
    names = {kernel.name for kernel in kernels}
    # For four types: a backward pass, and a scanned step, a hashed one and a hashed one with
    # atomics, each for aligned rows and for others.
    assert len(names) == 4 * (3 * 2 + 1)
    assert len(kernels) == len(names) * len(ptxas.ARCHITECTURES)
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.stack_frame == 0, kernel
        # The limit of the launch bounds. The blocks of HashStep must be resident at the same time.
        assert kernel.registers <= MOST_REGISTERS[kernel.name.split("<")[0]], kernel
