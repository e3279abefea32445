"""Names of implementations that the report knows; it runs without PyTorch."""

KERNEL, ATOMIC, EMPTY, COPY = "kernel graph", "atomic graph", "empty launch", "copy"
COMPILED = ("compiled table", "compiled pairs")
TUTORIAL_OPS, FUSED_OP = "tutorial busy", "fused busy"  # steps in TensorFlow
OWN = (f", {KERNEL}", ", kernel", f", {ATOMIC}")  # how the names of what we answer for end
