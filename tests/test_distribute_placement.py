"""A table in another device's memory: the op runs on that device, with the same results."""

import pytest

from child import run_program


@pytest.mark.native
def test_the_op_runs_beside_the_table(native_library, tmp_path):
    run_program("step_beside_its_table", cwd=tmp_path)
