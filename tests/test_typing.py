"""The public interface: names, signatures, annotations, docstrings, py.typed."""

import inspect
import json
import re
import sys
from importlib import resources

import pytest

import tf_center_loss_op as tcl
from child import run_program

REQUIRED = inspect.Parameter.empty
STEP = {"alpha": 0.5, "rule": "paper"}
SIGNATURES = {
    "center_loss": (
        dict(features=REQUIRED, labels=REQUIRED, centers=REQUIRED),
        STEP
        | dict(
            reduction="mean",
            sample_weight=None,
            ignore_class=None,
            update_centers=True,
            impl="auto",
            name=None,
        ),
    ),
    "update_centers": (
        dict(features=REQUIRED, labels=REQUIRED, centers=REQUIRED),
        STEP | dict(ignore_class=None, impl="auto", name=None),
    ),
    "CenterLoss": (
        dict(num_classes=REQUIRED),
        dict(loss_weight=1.0)
        | STEP
        | dict(reduction="mean", centers_initializer="zeros", ignore_class=None, impl="auto")
        | dict(deferred_update=False, distance_metric=True, sharded=False),
    ),
    "distribute.GlobalBatchLoss": (dict(loss=REQUIRED), dict(name=None)),
    "compat.v1.center_loss": (dict(features=REQUIRED, labels=REQUIRED, alpha=0.0), {}),
    "nearest.predict": (
        dict(features=REQUIRED, centers=REQUIRED),
        dict(k=1, threshold=None, block=None, name=None),
    ),
    "nearest.distance_to_center": (
        dict(features=REQUIRED, labels=REQUIRED, centers=REQUIRED),
        dict(name=None),
    ),
    "training.CentersMonitor": (
        dict(log_dir=REQUIRED, dataset=None),
        dict(layer=None, embed=None, freq="epoch", max_samples=10_000, max_classes=4096),
    ),
    "plots.export_projector": (
        dict(log_dir=REQUIRED, features=REQUIRED, labels=REQUIRED, centers=None),
        dict(class_names=None, name="embeddings", max_samples=5000, seed=0),
    ),
    "plots.embeddings": (
        dict(features=REQUIRED, labels=REQUIRED, centers=None),
        dict(class_names=None, title=None, max_samples=5000, seed=0),
    ),
    "build_info": ({}, {}),
}


def find(name):
    value = tcl
    for part in name.split("."):
        value = getattr(value, part)
    return value


def parameters(name):
    return inspect.signature(find(name)).parameters.values()


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_as_documented(name):
    positional, keywords = SIGNATURES[name]
    both = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {p.name: p.default for p in parameters(name) if p.kind is both} == positional
    only = inspect.Parameter.KEYWORD_ONLY
    assert {p.name: p.default for p in parameters(name) if p.kind is only} == keywords
    others = [p.kind for p in parameters(name) if p.kind not in (both, only)]
    layer_kwargs = [inspect.Parameter.VAR_KEYWORD] if name == "CenterLoss" else []
    assert others == layer_kwargs


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_parameter_is_annotated(name):
    assert [p.name for p in parameters(name) if p.annotation is REQUIRED] == []
    if not inspect.isclass(find(name)):
        assert inspect.signature(find(name)).return_annotation is not REQUIRED


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_docstring_begins_with_a_sentence(name):
    first, *_ = inspect.getdoc(find(name)).splitlines()
    assert first.endswith(".")


def test_public_names_are_in_all():
    names = {"center_loss", "update_centers", "CenterLoss", "CONVENTIONS", "compat", "build_info"}
    assert names <= set(tcl.__all__)
    assert all(hasattr(tcl, name) for name in tcl.__all__)
    public = {name for name in dir(tcl) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(tcl, name))}
    assert public - modules <= set(tcl.__all__)


def test_build_info_has_its_keys():
    info = tcl.build_info()
    assert set(info) == {"native", "reason", "tf_built", "tf_running", "cuda", "xla", "library"}
    assert isinstance(info["native"], bool)


def test_the_package_is_marked_as_typed():
    assert resources.files(tcl).joinpath("py.typed").is_file()


def test_an_import_prints_nothing(tmp_path):
    done = run_program("import_the_package", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Warning" not in done.stderr


def test_the_import_brings_only_what_functions_and_layer_need(tmp_path):
    modules = json.loads(run_program("modules_of_the_import", cwd=tmp_path).splitlines()[-1])
    own = {name for name in modules if name.startswith("tf_center_loss_op")}
    assert "tf_center_loss_op.layer" in own
    for name in ("training", "nearest", "plots", "compat"):
        assert not any(each.startswith(f"tf_center_loss_op.{name}") for each in own)
    others = {name.split(".")[0] for name in set(modules) - own}
    # TensorFlow makes a module of the ops of a library and names it by a hash.
    others = {name for name in others if not re.fullmatch("[0-9a-f]{40}", name)}
    # TensorFlow and Keras import parts of themselves when they are first used.
    assert others <= {"tensorflow", "keras", *sys.stdlib_module_names}
