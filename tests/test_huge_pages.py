"""The first step moves a large table to huge pages, with the same address and numbers."""

import json
import os
from pathlib import Path

import pytest

from child import run_program

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# MADV_COLLAPSE came with Linux 6.1.
OFFERED = (
    SETTING.exists()
    and "[never]" not in SETTING.read_text()
    and tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 1)
)


pytestmark = pytest.mark.native


@pytest.mark.skipif(not OFFERED, reason=f"{SETTING} says never, or Linux before 6.1")
def test_a_large_table_moves_to_huge_pages_in_place(tmp_path):
    seen = json.loads(run_program("large_table_on_huge_pages", cwd=tmp_path))
    assert seen["right"] and not seen["moved"]
    assert seen["share"] > 0.9


@pytest.mark.skipif(not OFFERED, reason=f"{SETTING} says never, or Linux before 6.1")
def test_a_table_that_was_read_before_moves_too(tmp_path):
    seen = json.loads(run_program("large_table_on_huge_pages", "read-first", cwd=tmp_path))
    assert seen["right"] and not seen["moved"]
    assert seen["share"] > 0.9


def test_the_environment_switches_it_off(tmp_path):
    seen = json.loads(
        run_program("large_table_on_huge_pages", cwd=tmp_path, TF_CENTER_LOSS_HUGE_PAGES="0")
    )
    assert seen["right"] and not seen["moved"]
    assert seen["grown"] == 0
