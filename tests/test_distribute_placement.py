"""A table in the memory of another device: the op runs beside it, and gives the same."""

import pytest

from child import run_program


@pytest.mark.native
def test_the_op_runs_beside_the_table(native_library, tmp_path):
    # Two logical CPU devices: the first stands for the GPU with the model, the second for the host.
    run_program("step_beside_its_table", cwd=tmp_path)
