"""Center loss for TensorFlow and Keras, as one fused op."""

from __future__ import annotations

import importlib
from types import ModuleType

from tf_center_loss_op import distribute, tables
from tf_center_loss_op._core import native as _native
from tf_center_loss_op._core.native import build_info
from tf_center_loss_op.conventions import CONVENTIONS
from tf_center_loss_op.functional import center_loss, update_centers
from tf_center_loss_op.layer import CenterLoss

__all__ = [
    "CONVENTIONS",
    "CenterLoss",
    "build_info",
    "center_loss",
    "compat",
    "distribute",
    "nearest",
    "plots",
    "tables",
    "training",
    "update_centers",
]

# Loading the library registers the ops, so that a graph or a SavedModel that holds them loads.
_native.usable()

# The functions and the layer do not need these modules, so they are imported at their first use.
_IMPORTED_ON_USE = ("compat", "nearest", "plots", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _IMPORTED_ON_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
