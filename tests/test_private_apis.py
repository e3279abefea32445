"""Private names of TensorFlow and Keras stand in one file, and a missing one has a clear error."""

import ast
import importlib
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from tf_center_loss_op._core import private_apis

PACKAGE = Path(tcl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PRIVATE_MODULES = ("keras.src", "tensorflow.python")


def private_names(source):
    """(line, name) of each import of a private module and each private attribute of an object."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            private = private and node.attr != "_replace"  # public, of a named tuple
            if private and not own:
                found.append((node.lineno, f"._{node.attr[1:]}"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(PRIVATE_MODULES):
                found.append((node.lineno, node.value))
    return [(line, name) for line, name in found if name.startswith((*PRIVATE_MODULES, "._"))]


@pytest.mark.parametrize(
    "source",
    [
        "import tensorflow.python.eager",
        "from keras.src.backend import get_keras_mask",
        "def f(model): return model._flatten_layers()",
        "import importlib; importlib.import_module('keras.src.losses')",
        "tables._blocks(1)",
    ],
)
def test_the_search_finds_a_private_name(source):
    assert private_names(source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_a_private_name(path):
    allowed = path.name == "private_apis.py"
    assert allowed or private_names(path.read_text()) == []


def reloaded(monkeypatch, name):
    """Imports the package's list of private names, with one missing."""
    module = importlib.import_module(name.module)
    monkeypatch.delattr(module, name.name)
    monkeypatch.delitem(sys.modules, private_apis.__name__)
    importlib.import_module(private_apis.__name__)


@pytest.mark.parametrize("name", private_apis.NAMES, ids=lambda name: name.name)
def test_a_missing_name_is_named_in_plain_words(monkeypatch, name):
    parent = sys.modules["tf_center_loss_op._core"]
    monkeypatch.setattr(parent, "private_apis", private_apis)  # restored after the failed import
    with pytest.raises(ImportError, match="needs the private name") as caught:
        reloaded(monkeypatch, name)
    for word in (f"{name.module}.{name.name}", name.why, tf.__version__, keras.__version__):
        assert word in str(caught.value)


def test_every_name_says_why_and_since_when():
    for name in private_apis.NAMES:
        assert name.why.startswith("to ")
        assert name.since.startswith(("TensorFlow 2.", "Keras 3."))


ATTRIBUTES = {
    "_value": lambda: private_apis.variable_of(object()),
    "_flatten_layers": lambda: private_apis.layers_of(object()),
    "_symbolic_build": lambda: private_apis.build_on_batch(object(), None),
    "_initial_epoch": lambda: private_apis.start_at_epoch(object(), 3),
    "_cross_device_ops": lambda: private_apis.collective_launchers(
        type("Strategy", (), {"extended": object()})
    ),
    "_device": lambda: private_apis.CollectiveLauncher(object()),
    "experimental_acd_manager": lambda: private_apis.run_out_of_program_order(object(), []),
    "outer_graph": lambda: private_apis.outer_graph(object()),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_missing_attribute_is_named_in_plain_words(name):
    with pytest.raises(ImportError, match=rf"needs the private name \S+\.{name} to "):
        ATTRIBUTES[name]()
