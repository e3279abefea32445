"""Imports the package, and prints nothing of its own; for test_typing.py."""

import tf_center_loss_op  # noqa: F401
