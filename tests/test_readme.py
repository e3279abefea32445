"""Every Python block of the README runs as it stands, alone."""

import re
from pathlib import Path

import pytest

from child import run_python

README = Path(__file__).resolve().parent.parent / "README.md"


def snippets():
    """(line, source) of each block; without a README one case that fails."""
    if not README.exists():
        return [pytest.param(0, None, id="missing")]
    text = README.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    starts = [(text.count("\n", 0, block.start()) + 1, block.group(1)) for block in blocks]
    return [pytest.param(*start, id=f"line {start[0]}") for start in starts]


def test_there_are_snippets():
    assert README.exists()
    assert snippets()


@pytest.mark.parametrize("line, source", snippets())
def test_snippet(line, source, tmp_path):
    assert source, f"no {README.name}"
    run_python(source, tmp_path)
