"""Runs a Python block of a page as a program of its own; for test_documentation.py.

Arguments: the page, and the line where the block begins.
"""

import runpy
import sys
from pathlib import Path

from documentation import blocks

page, line = Path(sys.argv[1]), int(sys.argv[2])
# A file, because AutoGraph reads the source of what it converts.
program = Path("snippet.py")
program.write_text(blocks(page)[line])
sys.argv = [str(program)]
runpy.run_path(str(program), run_name="__main__")
