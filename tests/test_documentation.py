"""Every example of the documentation runs: Python blocks of the pages, examples of docstrings."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import tf_center_loss_op as tcl
from child import run_program
from documentation import PAGES, blocks

PUBLIC = ["", "tables", "distribute", "training", "nearest", "plots", "compat.v1"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_an_example(page):
    assert blocks(page)


@pytest.mark.parametrize(
    "page, line",
    [
        pytest.param(page, line, id=f"{page.name} line {line}")
        for page in PAGES
        for line in blocks(page)
    ],
)
def test_a_block_of_a_page_runs_alone(page, line, tmp_path):
    run_program("documentation_snippet", page, line, cwd=tmp_path)


def modules():
    """Names of all modules of the package that are written in Python."""
    names = [m.name for m in pkgutil.walk_packages(tcl.__path__, f"{tcl.__name__}.")]
    files = {name: importlib.util.find_spec(name).origin for name in names}
    return [tcl.__name__, *(name for name, file in files.items() if file.endswith(".py"))]


def doctests(module):
    """The docstrings of a module that have examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", modules())
def test_the_examples_of_a_module_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    output = []
    for test in doctests(module):
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


def public_objects():
    """{name: object} of each public function and class."""
    found = {}
    for path in PUBLIC:
        module = importlib.import_module(".".join(filter(None, [tcl.__name__, path])))
        for name, value in vars(module).items():
            # Without __all__, the functions and classes that the module defines.
            own = not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
            public = name in module.__all__ if hasattr(module, "__all__") else own
            if public and (inspect.isclass(value) or inspect.isfunction(value)):
                found[".".join(filter(None, [path, name]))] = value
    return found


PUBLIC_OBJECTS = public_objects()


@pytest.mark.parametrize("name", PUBLIC_OBJECTS)
def test_a_public_name_has_an_example(name):
    doc = inspect.getdoc(PUBLIC_OBJECTS[name]) or ""
    assert doctest.DocTestParser().get_examples(doc)


def test_all_public_modules_are_known():
    found = {path.split(".")[0] for path in PUBLIC if path}
    assert found == {name for name in tcl.__all__ if inspect.ismodule(getattr(tcl, name))}
