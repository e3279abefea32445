"""Every example of the documentation runs: Python blocks of the pages, examples of docstrings."""

import doctest
import importlib
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
    found = pkgutil.walk_packages(tcl.__path__, f"{tcl.__name__}.")
    return [
        tcl.__name__,
        *(module.name for module in found if not module.name.endswith("_kernels")),
    ]


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
    """(name, object) of each public function and class."""
    for path in PUBLIC:
        module = importlib.import_module(".".join(filter(None, [tcl.__name__, path])))
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield ".".join(filter(None, [path, name])), value


def test_every_public_name_has_an_example():
    parse = doctest.DocTestParser().get_examples
    found = list(public_objects())
    assert len(found) > 10
    assert [name for name, value in found if not parse(inspect.getdoc(value) or "")] == []
