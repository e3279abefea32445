"""Prints the error of a plot where matplotlib cannot be imported; for test_drawing.py."""

import sys

sys.modules["matplotlib"] = None
import tf_center_loss_op as tcl

tcl.plots.export_projector(".", [[1.0]], [0])
try:
    tcl.plots.embeddings([[1.0]], [0])
except ImportError as error:
    print(error)
