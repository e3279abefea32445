"""Rules for the tests themselves that the linters do not know."""

import ast
import inspect
from pathlib import Path

import pytest

from child import PROGRAMS, TESTS
from long_files import LONG_FILES

# Their sources are arguments of checks, not programs.
SOURCES = {"test_house.py", "test_private_apis.py"}
FILES = sorted([*TESTS.glob("*.py"), *(TESTS / "gpu").glob("*.py"), *PROGRAMS.glob("*.py")])


def parsed(file):
    return ast.parse(file.read_text())


def program_texts(tree):
    """Line numbers of strings that are Python programs, and of calls that take such strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Statements on several lines; prose is no Python.
            try:
                body = ast.parse(inspect.cleandoc(node.value)).body
            except (SyntaxError, ValueError):
                continue
            simple = (ast.Expr, ast.Pass)
            if len(body) > 1 and not all(isinstance(part, simple) for part in body):
                yield node.lineno
            elif any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in body):
                yield node.lineno
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("dedent", "exec", "eval"):
                yield node.lineno
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [ast.unparse(item) for item in node.elts]
            if "sys.executable" in items and "'-c'" in items:
                yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_program_in_a_string(file):
    found = [f"{file.name}:{line}" for line in program_texts(parsed(file))]
    assert found == [] or file.name in SOURCES


@pytest.mark.parametrize(
    "source",
    [
        'run("import tf_center_loss_op")',
        'run("\\n    import os\\n    print(os.name)\\n")',
        'run("x = 1\\nprint(x)")',
        "run(textwrap.dedent(text))",
        "run([sys.executable, '-c', text])",
    ],
)
def test_a_program_in_a_string_is_found(source):
    assert list(program_texts(ast.parse(source)))


def without_match(tree):
    """Line numbers of pytest.raises and pytest.warns that take any message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "pytest.raises",
            "pytest.warns",
        ):
            if not any(keyword.arg == "match" for keyword in node.keywords):
                yield node.lineno


# Ruff's PT011 does not see an exception in a variable.
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_every_expected_error_says_its_message(file):
    assert [f"{file.name}:{line}" for line in without_match(parsed(file))] == []


@pytest.mark.parametrize("source", ["pytest.raises(error)", "pytest.warns((A, B), f)"])
def test_an_error_of_any_message_is_found(source):
    assert list(without_match(ast.parse(source))) == [1]


def test_the_long_files_exist():
    assert [name for name in LONG_FILES if not (TESTS / name).exists()] == []


def unused_programs():
    """Programs that no test names."""
    tests = "\n".join(file.read_text() for file in TESTS.glob("test_*.py"))
    return [file.stem for file in PROGRAMS.glob("*.py") if f'"{file.stem}"' not in tests]


def test_a_test_runs_every_program():
    assert unused_programs() == []


@pytest.mark.parametrize("file", sorted(PROGRAMS.glob("*.py")), ids=lambda file: file.stem)
def test_a_program_names_its_test(file):
    doc = ast.get_docstring(parsed(file))
    names = [word.rstrip(".,:;") for word in doc.split() if word.startswith("test_")]
    assert names
    for name in names:
        assert Path(TESTS / name).exists(), name
        assert f'"{file.stem}"' in (TESTS / name).read_text()


PACKAGE = TESTS.parent / "tf_center_loss_op"


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_no_file_of_the_package_is_over_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400
