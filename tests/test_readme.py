"""Every Python block of the README and of the guides runs as it stands, alone."""

import re
from pathlib import Path

import pytest

from child import run_python

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets():
    """(source) of each block, named by its page and line."""
    cases = []
    for page in filter(Path.exists, PAGES):
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            cases.append(pytest.param(block.group(1), id=f"{page.name} line {line}"))
    return cases


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_there_are_snippets(page):
    assert "\n```python\n" in page.read_text()


@pytest.mark.parametrize("source", snippets())
def test_snippet(source, tmp_path):
    run_python(source, tmp_path)
