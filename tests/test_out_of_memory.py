"""Memory that is not to be had is an error, not the end of the process, and nothing is written."""

import json

import pytest

from child import run_program

SCRATCH = "out of memory: could not allocate the scratch arrays of a step of 6000000 samples"
TABLE = "centers: expected memory for a table of 268435456 x 4 float32, 4.3 GB"
EXPECTED = dict(
    function=("ResourceExhaustedError", SCRATCH),
    xla=("ResourceExhaustedError", SCRATCH),
    eager=("ResourceExhaustedError", SCRATCH),
    loss=("ResourceExhaustedError", SCRATCH),
    zeros=("MemoryError", TABLE),
    ones=("MemoryError", TABLE),
    normal=("MemoryError", TABLE),
    layer=("MemoryError", TABLE),
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The errors of a process that may not have the memory it asks for."""
    out = run_program("step_without_memory", cwd=tmp_path_factory.mktemp("out_of_memory"))
    return json.loads(out)


@pytest.mark.native
@pytest.mark.parametrize("what", EXPECTED)
def test_missing_memory_is_an_error(native_library, errors, what):
    kind, words = EXPECTED[what]
    assert errors[what] is not None
    assert errors[what][0] == kind and words in errors[what][1]


@pytest.mark.native
def test_a_small_step_needs_no_more_memory(native_library, errors):
    assert errors["nothing"] is None
